"""Reading runs: formats, names of columns, and everything in a table that must not pass in silence."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.laws import records
from cluster.laws.fit import fit
from cluster.laws.records import DataProblem, load, usable
from datamodules.store import Store
from tests.conftest import unavailable

ROW: dict[str, Any] = {"params": 1e6, "tokens": 1e8, "flops": 6e14, "loss": 3.0}


def write_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_csv_and_json_lines_give_the_same(tmp_path: Path) -> None:
    rows = [{**ROW, "params": n, "run_id": f"r{n:g}"} for n in (1e6, 2e6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    for source in (write_csv(tmp_path / "a.csv", rows), str(tmp_path / "a.jsonl"), str(tmp_path / "a.json")):
        runs = load(source)
        np.testing.assert_array_equal(runs["n"], [1e6, 2e6])
        assert runs.names == ["row 1 (r1e+06)", "row 2 (r2e+06)"]


def test_parquet(tmp_path: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        unavailable("Parquet tests need pyarrow: pip install 'keel[test]'")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, {**ROW, "loss": 2.5}]), tmp_path / "a.parquet")
    np.testing.assert_array_equal(load(str(tmp_path / "a.parquet"))["loss"], [3.0, 2.5])
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataProblem, match="not valid Parquet"):
        load(str(tmp_path / "b.parquet"))


def test_parquet_without_its_reader_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataProblem, match=r"pip install 'keel\[parquet\]'"):
        load(str(tmp_path / "a.parquet"))


def record(n: int, **more: Any) -> dict[str, Any]:
    config = {"optim": {"lr": 1e-3}, "model": {"width": n}, "train": {"global_batch": 8}, "seed": 0}
    return {
        "run_id": f"r{n}",
        "status": "ok",
        "parameters": n * 1000,
        "tokens": None,
        "samples": 64 * n,
        "flops": n * 1e9,
        "flops_convention": "counted",
        "loss": 3.0 / n,
        "metrics": {"val/loss": 4.0 / n},
        "environment": {"revision": "abc"},
        "config": config,
        **more,
    }


def test_records_of_a_store(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for n in (1, 2, 3):
        store.write(f"sweep/run{n}/record.jsonl", json.dumps(record(n)).encode())
        store.write(f"sweep/run{n}/metrics/0001-000000.jsonl", b'{"step": 1, "loss": 9}\n')
    runs = load(str(tmp_path / "sweep"), {"loss": "metrics.val/loss"})
    np.testing.assert_allclose(runs["loss"], [4.0, 2.0, 4 / 3])
    np.testing.assert_allclose(runs["d"], [64, 128, 192])
    np.testing.assert_allclose(runs["lr"], 1e-3)
    assert runs.text["code"] == ["abc"] * 3
    found = records.base_config(str(tmp_path / "sweep"))
    assert found is not None and found["model"]["width"] == 3


def test_nan_diverged_and_negative_rows_are_named(tmp_path: Path) -> None:
    rows = [{**ROW, "loss": loss, "status": s} for loss, s in ((3, "ok"), ("nan", "ok"), (3, "diverged"), (-1, "ok"))]
    kept = usable(load(write_csv(tmp_path / "a.csv", rows)), ("n", "d"))
    assert kept.names == ["row 1"]
    assert kept.warnings == [
        "left out, loss is not a positive number: row 2, row 4",
        "left out, status diverged: row 3",
    ]
    only_nan = usable(load(write_csv(tmp_path / "b.csv", rows[:2])), ("n", "d"))
    assert only_nan.warnings == ["left out, loss is NaN or infinite: row 2"]


def test_too_few_runs_say_what_became_of_the_others(tmp_path: Path) -> None:
    rows = [{**ROW, "params": n, "loss": "nan"} for n in (1e6, 2e6)] + [ROW]
    with pytest.raises(DataProblem, match=r"only 1 can be used \(left out, loss is NaN or infinite: row 1, row 2\)"):
        fit("chinchilla", load(write_csv(tmp_path / "a.csv", rows)))


def test_duplicates(tmp_path: Path) -> None:
    twice = [{**ROW, "run_id": "a"}, {**ROW, "run_id": "b"}, {**ROW, "run_id": "a"}]
    runs = load(write_csv(tmp_path / "a.csv", twice))
    assert len(runs) == 2 and runs.warnings == ["duplicates, counted once: row 3 (a)"]
    twice[2]["loss"] = 2.9
    with pytest.raises(DataProblem, match=r"row 1 \(a\) and row 3 \(a\) have the same run id but different results"):
        load(write_csv(tmp_path / "a.csv", twice))


def test_mixed_flop_conventions_are_refused(tmp_path: Path) -> None:
    rows = [{**ROW, "params": n, "flops_convention": k} for n, k in ((1e6, "6ND"), (2e6, "2ND"), (3e6, "6ND"))]
    path = write_csv(tmp_path / "a.csv", rows)
    with pytest.raises(DataProblem, match=r"2 ways.*'2ND': row 2; '6ND': row 1, row 3.*--convention"):
        load(path)
    assert len(load(path, convention="6ND")) == 2
    with pytest.raises(DataProblem, match="no records count FLOPs as '3ND'; they have 2ND, 6ND"):
        load(path, convention="3ND")


def test_another_code_version_is_named(tmp_path: Path) -> None:
    rows = [{**ROW, "params": n, "code_rev": rev} for n, rev in ((1e6, "a"), (2e6, "a"), (3e6, "b"))]
    assert load(write_csv(tmp_path / "a.csv", rows)).warnings == ["of another code version than a: row 3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"loss": "los"}}, "--column loss=los: the records have no 'los'"),
        ({"columns": {"lss": "loss"}}, "no column 'lss'; choose from n, d"),
        ({"where": ["size"]}, "condition 'size' is not of the form name=value"),
        ({"where": ["size=3"]}, "the records have no column 'size'"),
        ({"where": ["loss=9"]}, "that satisfy loss=9"),
    ],
)
def test_wrong_names_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataProblem, match=message):
        load(write_csv(tmp_path / "a.csv", [ROW]), **options)


def test_words_in_a_column_of_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match="not a number: row 2: loss='low'"):
        load(write_csv(tmp_path / "a.csv", [ROW, {**ROW, "loss": "low"}]))


def test_missing_file_and_column(tmp_path: Path) -> None:
    with pytest.raises(DataProblem, match="no file at"):
        load(str(tmp_path / "none.csv"))
    with pytest.raises(DataProblem, match="no column 'd'"):
        fit("chinchilla", load(write_csv(tmp_path / "a.csv", [{"params": 1e6, "loss": 3.0}])))

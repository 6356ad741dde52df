"""What a sweep adds to itself: values beyond an edge, the run that tells most, and never more than it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.sweep.adaptive import Adaptive, kept
from cluster.sweep.config import load
from cluster.sweep.expand import expand
from cluster.sweep.results import Results, of_record
from cluster.sweep.status import status
from cluster.sweep.table import Row, Table, read_table
from datamodules.store import Store


def tell(table: Table, loss: Any) -> None:
    """Results as if all rows without one had been run; `loss(row)` None: it diverged."""
    results = Results(Store(table.url), "loss")
    results.refresh()
    new = [row for row in table.rows if row.id not in results.rows]
    records = [
        {
            "status": "ok" if loss(row) is not None else "diverged",
            "run_id": row.id,
            "loss": loss(row),
            "samples": row.samples,
            "tokens": row.samples * row.tokens_per_sample,
            "flops": row.flops,
            "throughput": {"elapsed_seconds": row.flops / 1e9},
        }
        for row in new
    ]
    results.add([of_record(row, record, "loss") for row, record in zip(new, records, strict=True)])


def grown(raw: dict[str, Any], table: Table) -> tuple[Table, list[Row], list[str]]:
    adaptive = Adaptive(load(raw))
    table.save(Store(table.url))
    more = adaptive.additions(table, Results(Store(table.url), "loss").refresh())
    return table.with_rows(more), more, adaptive.notes


def test_an_optimum_at_the_edge_is_followed_and_no_further_than_allowed(sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"optim.lr": [1e-3, 4e-3], "model.width": [8, 16], "seed": [0, 1]}
    sweep["adaptive"] = {"edges": 2}

    def loss(row: Row) -> float | None:
        rate, width = row.axes["optim.lr"], row.axes["model.width"]
        if width == 16:
            return None if rate > 2e-3 else 1.0  # stable at the lowest rate only: the optimum is below
        return 1.0 / rate  # ever better

    table = expand(load(sweep))
    assert grown(sweep, table)[1] == []  # not before the table is done
    tried = []
    for _ in range(4):
        tell(table, loss)
        table, more, notes = grown(sweep, table)
        tried.append(sorted({(row.axes["model.width"], row.axes["optim.lr"]) for row in more}))
        assert all(row.extra == "edge" for row in more) and len(more) == 2 * len(tried[-1])
    assert tried == [[(8, 0.016), (16, 0.00025)], [(8, 0.064), (16, 6.25e-05)], [], []]
    assert "nothing is tried beyond it any more" in " ".join(notes)


def test_additions_stay_within_the_cap_and_outlive_the_driver(sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"optim.lr": [1e-3, 4e-3]}
    sweep |= {"adaptive": {"edges": 3}, "cap": {"runs": 3}}
    table = expand(load(sweep))
    tell(table, lambda row: 1 / row.axes["optim.lr"])
    table, more, _ = grown(sweep, table)
    assert len(more) == 1
    table.save(Store(table.url))
    tell(table, lambda row: 1 / row.axes["optim.lr"])
    assert "the cap forbids it" in " ".join(grown(sweep, table)[2])
    fresh = expand(load(sweep))
    assert kept(fresh, read_table(Store(table.url))) == more
    other = expand(load(sweep, ["base.seed=99"]))
    assert kept(other, read_table(Store(table.url))) == []  # these would be other runs


def test_the_next_run_is_the_one_that_tells_most_per_hour(sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"model.width": [8, 16, 32], "d": [4e3, 1.6e4, 6.4e4], "optim.lr": [1e-2, 2e-2]}
    sweep["adaptive"] = {
        "runs": 2,
        "target": 1e14,
        "candidates": {"model.width": [8, 32, 64], "d": [4e3, 6.4e4, 2.56e5]},
    }
    table = expand(load(sweep))

    def loss(row: Row) -> float:
        wiggle = 1 + 0.003 * (int(row.id[:4], 16) / 65535 - 0.5)
        data = row.samples * row.tokens_per_sample
        return (
            (1.5 + 40 * row.parameters**-0.4 + 30 * data**-0.35) * wiggle * (1.1 if row.axes["optim.lr"] > 1e-2 else 1)
        )

    tell(table, loss)
    for count in (1, 2):
        table, more, notes = grown(sweep, table)
        assert [row.extra for row in more] == ["design"], notes
        assert more[0].axes["optim.lr"] == 1e-2 and "more per hour than from any of" in notes[-1]
        tell(table, loss)
        assert sum(row.extra == "design" for row in table.rows) == count
    assert grown(sweep, table)[1] == []
    sweep["adaptive"]["candidates"] = {"depth": [1]}
    sweep["adaptive"]["runs"] = 9
    with pytest.raises(ValueError, match=r"adaptive\.candidates: depth is no axis"):
        grown(sweep, table)


def test_a_sweep_that_grows_by_itself(
    sweep: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep["grid"] = {"optim.lr": [1e-4, 1e-3]}
    sweep |= {"packed": {"stacked": True}, "executor": "packed", "adaptive": {"edges": 1}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    assert cli.main(["sweep", "run", str(path), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "0.01 is tried" in said and "3 done" in said
    assert [row.axes["optim.lr"] for row in read_table(Store(sweep["url"])).rows] == [1e-4, 1e-3, 1e-2]
    assert cli.main(["sweep", "run", str(path), "--workers", "1"]) == 0
    assert "of 3 rows" not in capsys.readouterr().out
    assert status(read_table(Store(sweep["url"]))).counts["ok"] == 3

"""`keel fit`: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from cluster import cli
from cluster.laws import selftest, synthetic
from cluster.laws.records import Runs
from datamodules.store import Store
from tests.cluster.test_report import assert_self_contained, sections
from trainer.records import MetricsWriter, start_attempt, write_record


def save(path: Path, runs: Runs, **text: list[str]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*runs.columns, *text])
        writer.writerows(zip(*runs.columns.values(), *text.values(), strict=True))
    return str(path)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("laws") / "ladder.csv", synthetic.ladder(0.003, 1))


def test_a_ladder(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", table, "--target", "1e23", "--draws", "200", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for part in ("chinchilla", "CONVERGED", "best N at C=1e+23", "most influential run: row", "fit.html"):
        assert part in printed
    summary = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert summary["fits"]["chinchilla"]["parameters"]["alpha"] == pytest.approx(0.34, abs=0.04)
    assert set(summary["intervals"]) == {"pairs", "budgets"}
    assert summary["optimum"]["loss"]["low"] < synthetic.loss_of(*(summary["optimum"][k]["value"] for k in "nd"))
    assert len(summary["influence"]) == 50
    page = (tmp_path / "out" / "fit.html").read_text()
    assert_self_contained(page)
    assert {"fit", "laws", "isoflop", "optimum", "residuals", "influence", "json"} <= set(sections(page))
    assert page.count("<svg") >= 5


def test_learning_rates_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = synthetic.rate_curves(-0.5, diverge_at=1e9)
    source = save(tmp_path / "rates.csv", runs, status=runs.status)
    assert cli.main(["fit", source, "--out", str(tmp_path / "out")]) == 0
    assert "learning rate over width: does not transfer: the best rate goes as size^-0.50" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "fit.json").read_text())["learning_rate"]
    assert summary["boundary"]["width"][0]["exponent"] == pytest.approx(-0.5, abs=0.12)
    assert summary["sensitivity"]["width=64"]["grid"][0] == 2.0**-13
    page = (tmp_path / "out" / "fit.html").read_text()
    assert "rates" in sections(page)


def test_compute_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = np.geomspace(1e15, 1e20, 20)
    source = save(tmp_path / "c.csv", Runs({"c": c, "loss": 1.5 + 3 * (c / 1e15) ** -0.3}, [], []))
    assert cli.main(["fit", source, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert summary["fits"]["saturating"]["parameters"]["E"] == pytest.approx(1.5, abs=1e-3)
    assert summary["floor"]["identified"] is True
    flat = save(tmp_path / "flat.csv", Runs({"c": c[:8], "loss": 3 * (c[:8] / 1e15) ** -0.05}, [], []))
    assert cli.main(["fit", flat, "--form", "saturating,power", "--out", str(tmp_path / "flat")]) == 0
    assert "not identified" in capsys.readouterr().out


def test_training_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for n in np.geomspace(3e6, 3e9, 13):
        for horizon in (10, 30, 100):
            d = np.linspace(0.02, 1, 50) * n * horizon
            rows += [
                (f"{n:.3g}-{horizon}", n, 6 * n * x, x, y)
                for x, y in zip(d, synthetic.loss_of(0 * d + n, d), strict=True)
            ]
    with (tmp_path / "curves.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("run_id", "n", "c", "d", "loss"), *rows])
    assert cli.main(["fit", str(tmp_path / "curves.csv"), "--curves", "--out", str(tmp_path / "out")]) == 0
    assert "approach 1" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "fit.json").read_text())["approach_1"]
    assert found["n"]["exponent"] == pytest.approx(0.4516, abs=0.06)


def test_training_curves_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n in np.geomspace(1e4, 1e6, 9):
        for horizon in (2, 40):
            store, steps = Store(str(tmp_path / "runs" / f"{n:.0f}-{horizon}")), 100
            d = n * horizon
            start_attempt(store, {})
            writer = MetricsWriter(store, 1)
            seen = np.arange(1, steps + 1) / steps * d
            loss = 1.0 + 20 * n**-0.4 + 30 * seen**-0.4
            writer.extend({"step": i + 1, "loss": float(value)} for i, value in enumerate(loss))
            writer.close()
            write_record(store, {"status": "ok", "steps": steps, "flops": 6 * n * d, "samples": d, "parameters": n})
    for status in ("diverged", "pruned"):  # their curves lie far below, and must not count
        store = Store(str(tmp_path / "runs" / status))
        start_attempt(store, {})
        writer = MetricsWriter(store, 1)
        writer.extend({"step": i + 1, "loss": 0.9 + 1e-4 * (100 - i)} for i in range(100))
        writer.close()
        write_record(store, {"status": status, "steps": 100, "flops": 1e11, "samples": 1e5, "parameters": 3e5})
    words = ["fit", str(tmp_path / "runs"), "--curves", "--where", "status=ok"]
    assert cli.main(words) == 2 and cli.main([*words[:3], "--column", "loss=val_loss"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all("for a folder of runs they have no effect" in line for line in lines)
    assert cli.main(["fit", str(tmp_path / "runs"), "--curves", "--last", "1", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "fit.json").read_text())["approach_1"]
    assert found["n"]["exponent"] == pytest.approx(0.5, abs=0.15)


def test_critical_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = np.array([8.0, 16, 32, 64, 128])
    source = save(tmp_path / "b.csv", Runs({"batch": sizes, "steps": 1000 * (1 + 50 / sizes)}, [], []))
    assert cli.main(["fit", source, "--critical-batch", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "fit.json").read_text())["critical_batch"]
    assert found["critical"] == pytest.approx(50) and "critical batch" in capsys.readouterr().out


def test_critical_batch_from_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    mean, spread, columns = np.full(50, 0.1), 0.2, {}
    for name, size in (("small", 8), ("large", 64)):
        noise = rng.standard_normal((300, 50)) * spread / np.sqrt(size)
        columns |= {f"batch_{name}": np.full(300, float(size)), f"grad_sq_{name}": ((mean + noise) ** 2).sum(axis=1)}
    source = save(tmp_path / "g.csv", Runs(columns, [], []))
    assert cli.main(["fit", source, "--critical-batch", "--out", str(tmp_path / "out")]) == 0
    assert "simple noise scale" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "fit.json").read_text())["critical_batch"]
    truth = 50 * spread**2 / (50 * 0.1**2)
    assert found["noise_scale"] == pytest.approx(truth, rel=0.15)
    assert found["interval"][0] < truth < found["interval"][1] < 1.5 * truth
    columns["batch_small"][0] = 16
    source = save(tmp_path / "two.csv", Runs(columns, [], []))
    assert cli.main(["fit", source, "--critical-batch"]) == 2
    assert "choose one of each with --where" in capsys.readouterr().err
    columns["batch_small"][0], columns["grad_sq_large"] = 8, columns["grad_sq_small"]
    source = save(tmp_path / "noise.csv", Runs(columns | {"grad_sq_small": columns["grad_sq_small"] * 9}, [], []))
    assert cli.main(["fit", source, "--critical-batch"]) == 2
    assert "no signal above their noise" in capsys.readouterr().err


def test_seeds_give_an_interval_of_their_own(tmp_path: Path) -> None:
    runs = synthetic.ladder()
    many = {name: np.repeat(values, 3) for name, values in runs.columns.items()} | {
        "seed": np.tile(range(3), len(runs))
    }
    many["loss"] = many["loss"] * np.exp(0.005 * np.random.default_rng(0).standard_normal(len(many["loss"])))
    source = save(tmp_path / "seeds.csv", Runs(many, [], []))
    words = ["--form", "chinchilla", "--draws", "50", "--out", str(tmp_path / "out")]
    assert cli.main(["fit", source, *words]) == 0
    summary = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert summary["seed_noise"] == pytest.approx(0.005, rel=0.2)
    assert summary["intervals"]["seeds"]["alpha"]["se"] == pytest.approx(0.0152 / 3**0.5, rel=0.6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit"], "needs a SOURCE"),
        (["fit", "TABLE", "--form", "chinchila"], "--form chinchila: choose from chinchilla"),
        (["fit", "TABLE", "--target", "-3"], "--target -3: must be greater than 0"),
        (["fit", "TABLE", "--column", "loss"], "write it as --column NAME=NAME_IN_THE_SOURCE"),
        (["fit", "TABLE", "--form", "operator"], "no column 'u'"),
        (["fit", "nowhere.csv"], "no file at nowhere.csv"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, table: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([table if word == "TABLE" else word for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and message in lines[0], lines


def test_selftest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fit", "--selftest"]) == 0, capsys.readouterr().out
    printed = capsys.readouterr().out
    assert re.search(r"^(\d\d) of \1 checks passed", printed, re.MULTILINE) and "FAILED" not in printed


def test_selftest_command_reports_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(selftest, "PARTS", (selftest.allocation,))
    assert cli.main(["fit", "--selftest"]) == 0
    assert "8 of 8 checks passed" in capsys.readouterr().out
    monkeypatch.setitem(synthetic.TRUTH, "alpha", 0.35)
    assert cli.main(["fit", "--selftest"]) == 1
    assert "FAILED" in capsys.readouterr().out

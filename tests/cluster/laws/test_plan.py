"""`keel plan` and `keel score`: a runnable config, a prediction that cannot be changed, an honest log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cluster import cli
from cluster.laws import score as scores
from cluster.laws.allocation import loss_at
from cluster.laws.analysis import Options, analyse
from cluster.laws.plan import Asked, plan
from cluster.laws.records import DataProblem, of_columns
from datamodules.store import Store
from tests.helpers.runs import fno_config, lm_config
from trainer.build import flops_per_sample, measure
from trainer.config import config_hash, load
from trainer.parametrization.horizon import rate_factor


def ladder(sigma: float = 0.002) -> Any:
    """Runs of a size that a test can plan for: thousands of parameters."""
    rng = np.random.default_rng(0)
    n, d = (axis.ravel() for axis in np.meshgrid(np.geomspace(2e3, 2e5, 6), np.geomspace(1e4, 1e6, 6), indexing="ij"))
    loss = (1.0 + 20 * n**-0.4 + 30 * d**-0.35) * np.exp(sigma * rng.standard_normal(36))
    return of_columns(n=n, d=d, c=6 * n * d, loss=loss, lr=np.full(36, 2e-3), batch=np.full(36, 8.0))


def table(path: Path, runs: Any) -> str:
    rows = [dict(zip(runs.columns, values, strict=True)) for values in zip(*runs.columns.values(), strict=True)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def run_plan(tmp_path: Path, raw: dict[str, Any], *more: str) -> int:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(raw))
    source = table(tmp_path / "runs.jsonl", ladder())
    words = [
        "plan",
        source,
        "--budget",
        "2e12",
        "--config",
        str(tmp_path / "base.yaml"),
        "--out",
        str(tmp_path / "plan"),
    ]
    return cli.main([*words, "--log", str(tmp_path / "log"), "--draws", "100", *more])


@pytest.mark.parametrize(("kind", "per_pair"), [(fno_config, 152), (lm_config, 6.1)])
def test_the_config_has_the_size_and_the_data_that_were_chosen(
    kind: Any, per_pair: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = kind(str(tmp_path / "old"), str(tmp_path / "data"), val_every=8)  # of 8 steps: at the end
    assert run_plan(tmp_path, raw) == 0
    prediction = json.loads((tmp_path / "plan" / "prediction.json").read_text())
    config = load(str(tmp_path / "plan" / "run.yaml"))
    n, per_sample = measure(config)
    assert prediction["n"] == n
    assert prediction["d"] == config.train.max_steps * config.train.global_batch * per_sample
    assert config.train.val_every == config.train.max_steps
    spent = flops_per_sample(config) * config.train.max_steps * config.train.global_batch
    assert spent == prediction["flops"] == pytest.approx(2e12, rel=0.01)  # as the network counts, not as 6 N D
    assert spent / (n * prediction["d"]) == pytest.approx(per_pair, rel=0.02)
    for name in ("n", "d"):
        low, high = prediction["intervals"][name]
        assert low < prediction[name] < high
    found = analyse(ladder(), Options(draws=10)).fits["chinchilla"].values
    losses = [loss_at(found, n * k, prediction["d"] / k) for k in (0.8, 1.0, 1.25)]
    assert losses[1] == min(losses)  # it is the best size for what its own network costs
    assert prediction["regret"]["1"] == 0 and min(prediction["regret"].values()) == 0
    printed = capsys.readouterr().out
    assert ("FLOPs per parameter and sample or token, not 6 as the records say" in printed) == (per_pair > 10)
    assert f"FLOPs {spent / 1e12:.3f}e+12" in " ".join(printed.split())
    assert prediction["config_hash"] == config_hash(config)
    assert config.url == str(tmp_path / "plan" / "run")
    truth = 1.0 + 20 * n**-0.4 + 30 * prediction["d"] ** -0.35
    assert prediction["loss"]["low"] < truth < prediction["loss"]["high"]


def test_a_registered_prediction_is_never_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = fno_config(str(tmp_path / "old"), str(tmp_path / "data"))
    assert run_plan(tmp_path, raw) == 0
    before = (tmp_path / "plan" / "prediction.json").read_bytes()
    assert run_plan(tmp_path, raw, "--seed", "1") == 2
    assert "a registered prediction is not changed" in capsys.readouterr().err
    assert (tmp_path / "plan" / "prediction.json").read_bytes() == before


def finished(tmp_path: Path, factor: float, status: str = "ok") -> None:
    """The planned run, as if it had ended with `factor` times the predicted loss."""
    prediction = json.loads((tmp_path / "plan" / "prediction.json").read_text())
    run = Store(str(tmp_path / "plan" / "run"))
    run.write("config.yaml", (tmp_path / "plan" / "run.yaml").read_bytes())
    record = {
        "run_id": "abc",
        "url": run.url,
        "status": status,
        "parameters": prediction["n"],
        "samples": prediction["d"],
        "loss": prediction["loss"]["value"] * factor,
    }
    run.write("record.jsonl", (json.dumps(record) + "\n").encode())


def score(tmp_path: Path) -> int:
    return cli.main(["score", str(tmp_path / "plan" / "run"), "--log", str(tmp_path / "log")])


def test_scores_and_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan(tmp_path, fno_config(str(tmp_path / "old"), str(tmp_path / "data"))) == 0
    assert "no prediction has been scored yet" in capsys.readouterr().out
    finished(tmp_path, 1.0001)
    assert score(tmp_path) == 0
    printed = capsys.readouterr().out
    assert "inside the 95% interval" in printed and "100% of 1 outcomes" in printed and "warning" not in printed
    assert score(tmp_path) == 0
    assert "scored before" in capsys.readouterr().out
    finished(tmp_path, 1.5)
    assert score(tmp_path) == 1
    assert "outside" in capsys.readouterr().out


def test_what_cannot_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_plan(tmp_path, fno_config(str(tmp_path / "old"), str(tmp_path / "data"))) == 0
    run = Store(str(tmp_path / "plan" / "run"))
    run.write("config.yaml", (tmp_path / "plan" / "run.yaml").read_bytes())
    assert score(tmp_path) == 2 and "no record yet" in capsys.readouterr().err
    finished(tmp_path, 1.0, "preempted")
    assert score(tmp_path) == 2 and "status 'preempted'" in capsys.readouterr().err
    finished(tmp_path, 1.0, "diverged")
    assert score(tmp_path) == 1 and "diverged" in capsys.readouterr().out
    (tmp_path / "plan" / "prediction.json").unlink()
    assert score(tmp_path) == 2 and "name it with --prediction" in capsys.readouterr().err


def test_another_config_or_size_is_noted() -> None:
    prediction = {
        "kind": "keel prediction",
        "n": 1000,
        "d": 1e5,
        "config_hash": "a",
        "loss": {"value": 2.0, "low": 1.9, "high": 2.1},
    }
    record = {"status": "ok", "run_id": "r", "parameters": 2000, "samples": 1e5, "loss": 2.05}
    entry = scores.score(record, prediction, "b")
    assert entry["inside"] and entry["z"] == pytest.approx(np.log(2.05 / 2) / (np.log(2.1 / 1.9) / 3.92), rel=1e-3)
    assert len(entry["notes"]) == 2 and "n=2000" in entry["notes"][1]
    with pytest.raises(DataProblem, match="no prediction written by keel plan"):
        scores.score(record, {"loss": 3})


def test_coverage_of_a_log(tmp_path: Path) -> None:
    log = Store(str(tmp_path))
    for i, z in enumerate((0.5, -1.0, 3.0, 0.1)):
        assert scores.append(log, {"run_id": f"r{i}", "inside": abs(z) < 1.96, "z": z, "log_ratio": z / 100})
    assert not scores.append(log, {"run_id": "r0", "inside": False, "z": 9.0, "log_ratio": 0.0})
    found = scores.coverage(log)
    assert (found.count, found.inside) == (4, 0.75)
    assert found.mean_abs_z == pytest.approx(1.15) and found.bias == pytest.approx(0.0065)


def test_rates_batches_machines_and_serving() -> None:
    made = analyse(ladder(), Options(target=2e12, draws=100))
    chosen = plan(made, Asked(2e12, device="h100", gpus=4, price=2.0))
    growth = chosen.d / 1e6
    assert chosen.batch == pytest.approx(8 * growth**0.47)
    assert chosen.lr == pytest.approx(2e-3 * growth**-0.32 * growth ** (0.47 * 0.5))
    assert chosen.gpu_hours == pytest.approx(2e12 / (989.4e12 * 0.4) / 3600)
    assert chosen.hours == pytest.approx(chosen.gpu_hours / 4) and chosen.cost == pytest.approx(2 * chosen.gpu_hours)
    assert chosen.regret["1"] == pytest.approx(0, abs=1e-9) and chosen.regret["4"] > chosen.regret["2"] > 0
    served = plan(made, Asked(2e12, served=1e9))
    assert served.n < chosen.n and any("costs" in note for note in served.notes)
    with pytest.raises(ValueError, match="no such device"):
        plan(made, Asked(2e12, device="abacus"))
    assert any("long extrapolation" in note for note in plan(made, Asked(2e15)).notes)


def test_what_was_chosen_otherwise_is_told_of_the_choice() -> None:
    """A model for serving is no compute-optimal one: a larger one for the same FLOPs of training would be better."""
    made = analyse(ladder(), Options(target=2e12, draws=100))
    served = plan(made, Asked(2e12, served=1e9))
    assert served.flops == pytest.approx(6 * served.n * served.d) and served.flops > 2e12
    assert served.regret["1"] == 0 and served.regret["2"] < 0 < served.regret["0.5"]
    low, high = served.intervals["n"]
    assert low < served.n < high


def test_an_overridden_length_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = fno_config(str(tmp_path / "old"), str(tmp_path / "data"))
    assert run_plan(tmp_path, raw, "--device", "h100", "train.max_steps=100", "schedule.warmup_steps=2") == 0
    prediction = json.loads((tmp_path / "plan" / "prediction.json").read_text())
    config = load(str(tmp_path / "plan" / "run.yaml"))
    assert prediction["flops"] == flops_per_sample(config) * 100 * config.train.global_batch
    assert prediction["gpu_hours"] == pytest.approx(prediction["flops"] / (989.4e12 * 0.4) / 3600)
    assert prediction["regret"]["0.5"] < 0  # at so few samples a smaller model would do better
    printed = capsys.readouterr().out
    assert "FLOPs, not 2e+12: steps are whole, or overridden" in printed
    assert "lies outside the interval of the best one" in printed and printed.count("time assumes") == 1


def test_axes_that_the_law_does_not_read_are_named() -> None:
    runs = ladder()
    assert not any("does not read" in text for text in analyse(runs, Options(draws=10)).warnings)
    for axis in "uh":
        varied = ladder()
        varied.columns[axis] = np.tile([16.0, 32.0, 64.0], 12)
        made = analyse(varied, Options(forms=("chinchilla",), draws=10))
        for _ in range(2):
            plan(made, Asked(2e12))
        assert sum(f"chinchilla does not read {axis}" in text for text in made.warnings) == 1


def test_no_plan_without_a_law_in_n_and_d() -> None:
    c = np.geomspace(1e12, 1e15, 10)
    made = analyse(of_columns(c=c, loss=1 + (c / 1e12) ** -0.2))
    with pytest.raises(DataProblem, match="a plan needs a fit of chinchilla or tied"):
        plan(made, Asked(1e16))


def test_the_largest_runs_config_is_scaled_when_none_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, raw = ladder(), fno_config(str(tmp_path / "old"), str(tmp_path / "data"))
    for i in range(len(runs)):
        record = {
            "run_id": f"r{i}",
            "status": "ok",
            "parameters": runs["n"][i],
            "samples": runs["d"][i],
            "flops": runs["c"][i],
            "loss": runs["loss"][i],
            "config": raw,
        }
        Store(str(tmp_path / "sweep")).write(f"r{i}/record.jsonl", json.dumps(record).encode())
    words = ["plan", str(tmp_path / "sweep"), "--budget", "2e12", "--out", str(tmp_path / "plan"), "--draws", "50"]
    assert cli.main([*words, "--log", str(tmp_path / "log"), "model.depth=3"]) == 0
    config = load(str(tmp_path / "plan" / "run.yaml"))
    prediction = json.loads((tmp_path / "plan" / "prediction.json").read_text())
    assert config.model.depth == 3 and prediction["n"] == measure(config)[0]
    assert "keel score" in capsys.readouterr().out


def test_a_config_that_moves_its_rate_by_itself_is_not_moved_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = lm_config(str(tmp_path / "old"), str(tmp_path / "data"))
    raw["parametrization"] = {"name": "horizon", "base_data": 1e5, "base_batch": 256.0}
    assert run_plan(tmp_path, raw, "--lr-horizon", "-0.1") == 2
    assert "set parametrization.lr_horizon" in capsys.readouterr().err
    assert run_plan(tmp_path, raw) == 0
    assert load(str(tmp_path / "plan" / "run.yaml")).optim.lr == 2e-3  # as in the records
    made = analyse(ladder(), Options(draws=100))
    moved, kept = plan(made, Asked(2e12)), plan(made, Asked(2e12, law_in_config=True))
    best = int(np.argmin(made.points["loss"]))
    horizon, batch = rate_factor(moved.d / made.points["d"][best], moved.batch / 8.0)
    assert moved.lr == pytest.approx(2e-3 * horizon * batch) and kept.lr == 2e-3

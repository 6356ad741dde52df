"""Population-based training: generations from results alone, and real ones that beat each of their first members."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.sweep.config import load
from cluster.sweep.expand import expand
from cluster.sweep.results import read_results
from cluster.sweep.table import Row, Table, read_table
from datamodules.store import Store
from tests.cluster.sweep.test_adaptive import grown, tell
from trainer.config import ConfigError
from trainer.records import read_attempts, read_metrics


@pytest.fixture
def population(sweep: dict[str, Any]) -> dict[str, Any]:
    sweep["base"]["train"]["max_steps"] = 24
    sweep["base"]["schedule"] = {"name": "constant"}
    sweep["random"] = {
        "samples": 4,
        "axes": {"optim.lr": {"log_uniform": [1e-4, 1.0]}, "optim.weight_decay": {"choice": [0.0, 0.1, 0.2]}},
    }
    sweep["population"] = {"every": 8}
    return sweep


def generation(table: Table, number: int) -> list[Row]:
    return [row for row in table.rows if row.extra == (f"generation {number}" if number else "")]


def test_the_worst_go_on_from_the_best_with_other_values(population: dict[str, Any]) -> None:
    table = expand(load(population))
    assert [row.values["train.max_steps"] for row in table.rows] == [8] * 4
    assert grown(population, table)[1] == []  # not before the generation is done
    first = sorted(table.rows, key=lambda row: row.axes["optim.lr"])
    tell(
        table, lambda row: None if row == first[-1] else row.axes["optim.lr"]
    )  # the lowest rate is the best, the highest diverges
    table, more, notes = grown(population, table)
    parents = {
        row.values["weights.url"].rpartition("/")[2]: row
        for row in more
        if dict(row.axes) in [dict(f.axes) for f in first]
    }
    assert set(parents) == {row.id for row in first[:3]}  # who was not among the worst goes on as it was
    (changed,) = [row for row in more if row not in parents.values()]
    assert changed.values["weights.url"] == table.run_url(first[0]) and changed.axes != first[0].axes
    assert 1e-4 <= changed.axes["optim.lr"] <= 1.0
    assert all(row.values["weights.step"] == 8 and row.values["train.max_steps"] == 16 for row in more)
    assert notes == [f"generation 1: {first[-1].label} gives way to {first[0].label}, as {changed.label}"]
    again = expand(load(population))
    assert [row.id for row in grown(population, again)[1]] == [
        row.id for row in more
    ]  # a driver that knows results only
    tell(table, lambda row: row.axes["optim.lr"])
    table, more, _ = grown(population, table)
    assert len(generation(table, 2)) == 4
    tell(table, lambda row: row.axes["optim.lr"])
    assert grown(population, table)[1] == []  # 24 steps are done
    assert len({row.id for row in table.rows}) == 12


def test_a_population_that_cannot_go_on_says_so(population: dict[str, Any]) -> None:
    table = expand(load(population))
    tell(table, lambda row: None)
    assert "every run of generation 0 diverged or failed" in grown(population, table)[2][0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"random": {"samples": 4, "axes": {"model.width": {"choice": [8, 16]}}}},
            "cannot go on with another model.width",
        ),
        ({"population": {"every": 7}}, "train.max_steps=24 must be several times that"),
        ({"population": {"every": 24}}, "must be several times that"),
        ({"objective": "val/loss"}, "train.val_every=0 must divide it"),
        ({"stop": {"first": 4}}, "decides itself how its runs go on"),
        ({"population": {"every": 8, "quantile": 0.6}}, "quantile=0.6"),
        ({"schedule": "cosine"}, "set schedule.name=constant"),
    ],
)
def test_impossible_populations(population: dict[str, Any], wrong: dict[str, Any], message: str) -> None:
    if "schedule" in wrong:
        population["base"]["schedule"] = {"name": wrong.pop("schedule")}
    with pytest.raises(ConfigError, match=message):
        expand(load(population | wrong))


def test_real_generations_branch_and_improve(
    population: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(population | {"executor": "packed"}))
    assert cli.main(["sweep", "run", str(tmp_path / "sweep.yaml"), "--workers", "1"]) == 0
    assert "gives way to" in capsys.readouterr().out
    store = Store(population["url"])
    table, found = read_table(store), {result["row"]: result for result in read_results(store)}
    assert len(found) == 12 and all(result["status"] == "ok" for result in found.values())
    for row in generation(table, 2):
        run = Store(table.run_url(row))
        assert [attempt["resumed_from"] for attempt in read_attempts(run)] == [16]
        assert min(metric["step"] for metric in read_metrics(run) if "loss" in metric) == 17
    assert min(found[row.id]["loss"] for row in generation(table, 2)) < min(
        found[row.id]["loss"] for row in generation(table, 0)
    )
    assert cli.main(["sweep", "run", str(tmp_path / "sweep.yaml"), "--workers", "1"]) == 0
    assert "of 12 rows" not in capsys.readouterr().out  # nothing was left to do

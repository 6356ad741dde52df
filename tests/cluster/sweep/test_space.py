"""From a sweep's config to its table: axes, ladders, arithmetic, ids, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from cluster.sweep import table as tables
from cluster.sweep.config import load, to_dict
from cluster.sweep.expand import expand
from cluster.sweep.space import points, values
from datamodules.store import Store
from trainer import config as configs
from trainer.build import flops_per_sample
from trainer.config import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def rows(raw: dict[str, Any], *overrides: str) -> list[tables.Row]:
    return expand(load(raw, overrides)).rows


def test_grid_zip_and_draws_combine_in_a_fixed_order(sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"optim.lr": ["1e-3", 1e-2], "seed": [0, 1]}
    sweep["zip"] = [{"model.width": [8, 16, 16], "model.heads": [1, 2, 4]}]
    sweep["random"] = {"samples": 2, "axes": {"optim.weight_decay": {"log_uniform": [1e-3, 1]}}}
    found = points(load(sweep))
    assert len(found) == 2 * 2 * 3 * 2
    assert found[0] | {"optim.weight_decay": 0} == {
        "optim.lr": 1e-3, "seed": 0, "model.width": 8, "model.heads": 1, "optim.weight_decay": 0,
    }  # fmt: skip
    assert [point["model.heads"] for point in found[:6]] == [1, 1, 2, 2, 4, 4]
    assert points(load(sweep)) == found


def test_ladders() -> None:
    assert values("x", {"from": 32, "to": 256, "steps": 4}) == [32, 64, 128, 256]
    assert values("x", {"from": 1e-4, "to": "1e-2", "steps": 3}) == [1e-4, 1e-3, 1e-2]
    assert values("x", {"from": 1e6, "factor": 4, "steps": 3}) == [1e6, 4e6, 1.6e7]
    assert values("x", {"from": 0.0, "to": 1.0, "steps": 3, "scale": "linear"}) == [0.0, 0.5, 1.0]


def test_a_further_sample_or_axis_leaves_the_draws_as_they_were(sweep: dict[str, Any]) -> None:
    axes: dict[str, Any] = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}}
    sweep["random"] = {"samples": 5, "axes": axes}
    first = [point["optim.lr"] for point in points(load(sweep))]
    axes |= {"seed": {"int": [0, 99]}, "train.grad_clip": {"choice": [0.0, 1.0]}, "model.depth": {"log_int": [1, 4]}}
    sweep["random"]["samples"] = 7
    more = points(load(sweep))
    assert [point["optim.lr"] for point in more][:5] == first
    assert all(1e-4 <= p["optim.lr"] <= 1e-1 and 0 <= p["seed"] <= 99 and 1 <= p["model.depth"] <= 4 for p in more)
    assert [p["optim.lr"] for p in points(load(sweep, ["random.seed=1"]))] != [p["optim.lr"] for p in more]


def test_an_id_is_the_hash_of_what_the_run_computes(sweep: dict[str, Any], tmp_path: Path) -> None:
    sweep["grid"] = {"optim.lr": [1e-3, 1e-2], "model.width": [8, 16]}
    table = expand(load(sweep))
    for row in table.rows:
        raw = copy.deepcopy(sweep["base"])
        for key, value in row.axes.items():
            raw[key.partition(".")[0]][key.partition(".")[2]] = value
        assert row.id == configs.config_hash(configs.load(raw))
        assert table.config(row).url == f"{table.url}/runs/{row.id}"
    turned = sweep | {"grid": {"model.width": [16, 8], "optim.lr": [1e-2, 1e-3, 1e-1]}, "url": str(tmp_path / "b")}
    assert {row.id for row in table.rows} < {row.id for row in rows(turned)}


def test_a_table_survives_the_store(sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"optim.lr": [1e-3, 1e-2], "optim.name": ["adamw", "sgd"]}
    config = load(sweep)
    assert load(to_dict(config)) == config
    table = expand(config)
    table.save(Store(table.url))
    again = tables.read_table(Store(table.url))
    assert again.rows == table.rows and again.encode() == table.encode()
    assert [again.config(row).optim.name for row in again.rows] == ["adamw", "sgd"] * 2


def test_varied_gives_what_load_gives(base: dict[str, Any]) -> None:
    start = configs.load(base)
    changes = {"optim.lr": 1, "model.width": 16, "seed": 3, "train.grad_clip": 0.5, "optim.betas": [0.8, 0.9]}
    words = [f"{key}={value}" for key, value in changes.items()]
    assert configs.to_dict(configs.varied(start, changes)) == configs.to_dict(configs.load(base, words))
    for bad, message in [
        ({"optim.rate": 1}, "unknown key 'optim.rate'"),
        ({"sed": 1}, "did you mean 'seed'"),
        ({"optim.lr": "fast"}, "optim.lr='fast': expected float, got str"),
        ({"train.max_steps": 1.5}, "train.max_steps=1.5: expected int, got float"),
        ({"train.max_steps": True}, "expected int, got bool"),
        ({"optim.lr": -1.0}, "optim: lr=-1.0: must be greater than 0"),
        ({"model.width": 9}, "gives heads of 9 features"),
        ({"task.seq_len": 64}, "longer than the network's"),
        ({"optim.name": "sgd"}, "unknown key 'optim.name'"),
        ({"schedule.warmup_steps": 99}, "exceed train.max_steps"),
    ]:
        for _ in range(2):  # the second time from memory
            with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
                configs.varied(start, bad)


def test_ladders_over_parameters_and_budget_or_tokens(sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"n": [4000, 16000], "budget": [1e9, 4e9]}
    table = expand(load(sweep))
    for row in table.rows:
        config = table.config(row)
        assert abs(row.parameters / row.axes["n"] - 1) < 0.35
        assert row.flops == pytest.approx(row.axes["budget"], rel=0.02)
        assert row.flops == flops_per_sample(config) * config.train.max_steps * 4
        assert config.schedule.warmup_steps == pytest.approx(config.train.max_steps / 4, abs=1)
    assert len({row.parameters for row in table.rows}) == 2
    sweep["grid"] = {"model.width": [8, 16], "d": [64 * 16, 660 * 16]}
    assert [row.samples for row in rows(sweep)] == [64, 660] * 2
    sweep["base"]["train"]["val_every"] = 4  # of 8 steps: twice, the second time at the end
    made = expand(load(sweep))
    assert [row.samples for row in made.rows] == [64, 656] * 2
    assert [made.config(row).train.val_every for row in made.rows] == [8, 82] * 2
    made = expand(load(sweep, ["settings.train.val_every=3"]))
    assert {made.config(row).train.val_every for row in made.rows} == {3}


def test_settings_are_computed(sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"model.width": [8, 16], "ratio": [2, 20]}
    sweep["settings"] = {
        "schedule.warmup_steps": "${max(1, train.max_steps // 10)}",
        "train.max_steps": "${ceil(ratio * parameters / tokens / train.global_batch)}",
        "model.depth": "${model.width / 8}",
        "optim.lr": "${0.01 * (8 / model.width) ** 0.5}",
    }
    table = expand(load(sweep))
    for row in table.rows:
        config = table.config(row)
        assert config.model.depth == row.axes["model.width"] / 8
        assert config.train.max_steps == -(-row.axes["ratio"] * row.parameters // (16 * 4))
        assert config.schedule.warmup_steps == config.train.max_steps // 10
        assert config.optim.lr == pytest.approx(0.01 * (8 / config.model.width) ** 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gird": {}}, "unknown key 'gird': did you mean 'grid'"),
        ({"grid": {}}, "the sweep has no axes"),
        ({"grid": {"optim.lr": []}}, "grid.optim.lr is empty"),
        ({"grid": {"optim.lr": 3}}, "grid.optim.lr=3: expected a list"),
        ({"grid": {"optim.lr": [1, 1]}}, "grid.optim.lr has 1 twice"),
        ({"grid": {"optim.lr": {"from": 1, "steps": 2}}}, "either to or factor"),
        ({"grid": {"optim.lr": {"from": 0, "to": 1, "steps": 2}}}, "positive numbers; set scale: linear"),
        ({"grid": {"optim.lr": {"from": 1, "to": 2, "stepz": 2}}}, "unknown key 'grid.optim.lr.stepz'"),
        ({"grid": {"optim.rate": [1]}}, "row optim.rate=1: unknown key 'optim.rate'"),
        ({"grid": {"optim.lr": ["x"]}}, "row optim.lr=x: optim.lr='x': expected float"),
        ({"grid": {"model.width": [8, 9]}}, "row model.width=9: model: heads=1: gives heads of 9 features"),
        ({"grid": {"budgte": [1e9]}}, "axis budgte has no effect: no setting reads it; did you mean 'budget'"),
        ({"grid": {"budget": [1.0]}}, "row budget=1.0: that is .* less than one"),
        ({"grid": {"budget": [1e9], "d": [1e3]}}, "budget and d both set"),
        ({"grid": {"budget": [1e9]}, "settings": {"train.max_steps": 3}}, "so does the sweep; drop one"),
        ({"grid": {"n": [4000], "model.width": [8]}}, "n sets model.width, and so does the sweep"),
        ({"grid": {"checkpoint.every": [1, 2]}}, "are the same run: what tells them apart does not change"),
        ({"grid": {"optim.lr": [1]}, "zip": [{"optim.lr": [2]}]}, "axis optim.lr appears twice"),
        ({"grid": {"seed": [1]}, "settings": {"seed": 2}}, "seed is an axis and a setting"),
        ({"zip": [{"seed": [1, 2], "optim.lr": [1]}]}, "lists of unequal length .seed has 2, optim.lr has 1"),
        ({"random": {"samples": 2}}, "random: samples and axes belong together"),
        ({"random": {"samples": 2, "axes": {"seed": {"int": [3, 1]}}}}, "expected .low, high. with low < high"),
        ({"random": {"samples": 2, "axes": {"seed": {"normal": [3, 1]}}}}, "expected one of uniform, log_uniform"),
        ({"random": {"samples": -1}}, "random: samples=-1"),
        ({"settings": {"optim.lr": "${rate}"}, "grid": {"seed": [1]}}, "nothing is called 'rate'"),
        ({"settings": {"optim.lr": "${__import__('os')}"}, "grid": {"seed": [1]}}, "no function '__import__'"),
        ({"settings": {"optim.lr": "${1 +}"}, "grid": {"seed": [1]}}, "is no arithmetic"),
        ({"settings": {"optim.lr": "${1 / 0}"}, "grid": {"seed": [1]}}, "division by zero"),
        ({"settings": {"seed": "${train.max_steps}", "train.max_steps": "${seed}"}, "grid": {"optim.lr": [1]}}, "need each other"),
        ({"settings": {"lr": 1}, "grid": {"seed": [1]}}, "settings.lr: no key of a run"),
        ({"optimise": ["optim.lr"], "grid": {"seed": [1]}}, "optimise: optim.lr is no axis"),
        ({"executor": "moon"}, "executor=moon: must be one of"),
        ({"objective": "accuracy"}, "objective=accuracy: must be loss"),
        ({"retries": -1}, "retries=-1"),
        ({"cap": {"flops": -1}}, "cap: flops=-1"),
        ({"machine": {"device": "abacus"}}, "device=abacus: unknown"),
        ({"adaptive": {"runs": 1}}, "runs, target and candidates belong together"),
        ({"stop": {"first": 3}, "grid": {"seed": [1]}}, "must be a multiple of train.val_every=0"),
        ({"objective": "val/loss", "grid": {"seed": [1]}}, "needs validation; set train.val_every"),
        ({"objective": "val/loss", "grid": {"seed": [1]}, "settings": {"train.val_every": 9}}, "end before its first validation"),
        ({"stop": {"first": 4}, "packed": {"stacked": True}, "grid": {"seed": [1]}}, "stop.first has no effect with"),
        ({"base": 3}, "base is required"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_refused_in_one_line(sweep: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        expand(load(sweep | change))
    assert "\n" not in str(refused.value)


def test_overrides_go_into_sections_axes_and_the_base(sweep: dict[str, Any]) -> None:
    sweep["grid"] = {"optim.lr": [1e-3]}
    words = [
        "cap.runs=3",
        "grid.optim.lr=[1.0e-2, 2.0e-2]",
        "settings.train.max_steps=5",
        "base.optim.weight_decay=0.5",
    ]
    config = load(sweep, words)
    assert config.cap.runs == 3
    made = expand(config)
    assert [made.config(row).optim.lr for row in made.rows] == [0.01, 0.02]
    assert {made.config(row).train.max_steps for row in made.rows} == {5}
    assert {made.config(row).optim.weight_decay for row in made.rows} == {0.5}
    with pytest.raises(ConfigError, match="not of the form key=value"):
        load(sweep, ["cap.runs"])

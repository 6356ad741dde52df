"""Stacks of networks train what the runs train one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import fno_config, lm_config, tiny_fields, tiny_text
from trainer import stacked
from trainer.build import network_of
from trainer.config import ConfigError, load, varied
from trainer.run import fit

PLAIN: dict[str, Any] = {"strategy": {"name": "ddp"}, "diagnostics": {}, "log": {"progress": False}}
MUP = {"name": "mup+depth", "base": {"width": 8, "heads": 1, "depth": 1}, "decay": "with_rate"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"lm": tiny_text(f"{folder}/text"), "fno": tiny_fields(f"{folder}/fields")}


def config(kind: str, data: dict[str, str], url: object, **changes: Any) -> dict[str, Any]:
    make = lm_config if kind == "lm" else fno_config
    return make(str(url), data[kind], val_every=4) | PLAIN | changes


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("lm", {"parametrization": MUP, "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1}}),
        ("fno", {"optim": {"name": "sgd", "lr": 1e-3, "momentum": 0.9}}),
    ],
)
def test_a_stack_gives_each_run_the_record_of_its_own(
    kind: str, changes: dict[str, Any], data: dict[str, str], tmp_path: Path
) -> None:
    base = load(config(kind, data, tmp_path / "x", **changes))
    runs = [varied(base, {"optim.lr": rate, "url": str(tmp_path / f"{rate}")}) for rate in (1e-3, 1e-2, 1e9)]
    for run, found in zip(runs, stacked.train(runs), strict=True):
        alone = fit(run)
        same = ["run_id", "status", "parameters", "dataset"]
        if alone["status"] == "ok":  # a diverged run ends when it is noticed, here at once and there every few steps
            same += ["steps", "samples", "tokens", "flops", "diverged_step"]
            assert found["loss"] == pytest.approx(alone["loss"], rel=1e-5)
            assert found["metrics"] == pytest.approx(alone["metrics"], rel=1e-4)
        assert {name: found[name] for name in same} == {name: alone[name] for name in same}
    assert [run["status"] for run in stacked.train(runs)] == ["ok", "ok", "diverged"]


def test_scales_of_initial_values_may_differ_and_nothing_else(data: dict[str, str], tmp_path: Path) -> None:
    base = load(config("lm", data, tmp_path / "x"))
    wide = varied(base, {"model.init_std": 0.5})
    found = stacked.train([base, wide])
    assert [run["run_id"] for run in found] == [
        run["run_id"] for run in [*stacked.train([base]), *stacked.train([wide])]
    ]
    assert found[0]["loss"] != found[1]["loss"]
    for change in ({"model.width": 8}, {"seed": 3}, {"train.max_steps": 4}):
        with pytest.raises(ConfigError, match=r"differ in optim\.lr, model\.init_std only"):
            stacked.train([base, varied(base, change)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"name": "muon"}}, "optim.name=muon does not work on each element alone"),
        ({"train.ema_decay": 0.9}, "train.ema_decay=0.9: a stack of networks needs none"),
        ({"train.precision": "bf16-mixed"}, "train.precision=bf16-mixed: a stack of networks needs 32-true"),
        ({"train.micro_batch": 2}, "train.micro_batch=2"),
    ],
)
def test_what_cannot_be_stacked_is_named(
    change: dict[str, Any], message: str, data: dict[str, str], tmp_path: Path
) -> None:
    raw = config("lm", data, tmp_path / "x")
    for key, value in change.items():
        head, _, name = key.partition(".")
        raw[head] = value if not name else {**raw[head], name: value}
    with pytest.raises(ConfigError, match=message):
        stacked.train([load(raw)])


def test_rules_that_depend_on_the_rate_are_no_stack(data: dict[str, str], tmp_path: Path) -> None:
    base = load(config("lm", data, tmp_path / "x", parametrization={**MUP, "decay": "independent"}))
    with pytest.raises(ConfigError, match="rules are not the same at all rates"):
        stacked.train([base, varied(base, {"optim.lr": 1e-2})])


def test_the_network_is_that_of_a_run(data: dict[str, str], tmp_path: Path) -> None:
    from trainer.build import build

    made = load(config("lm", data, tmp_path / "x", parametrization=MUP))
    task, _ = build(made)
    for (name, a), (_, b) in zip(task.network.named_parameters(), network_of(made).named_parameters(), strict=True):
        assert a.equal(b), name

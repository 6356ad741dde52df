"""The average of the weights: its recurrence, sharded, in validation, and across a resume."""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.distributed as dist

from datamodules.store import Store
from tests.conftest import unavailable
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import lm_config, tiny_text
from trainer import assembly
from trainer import config as configs
from trainer.build import build
from trainer.callbacks.ema import EMA
from trainer.checkpoint import CheckpointError, load_module, read_manifest, step_name
from trainer.evaluation import evaluate
from trainer.planning.simulate import trace
from trainer.records import read_metrics
from trainer.run import fit

DECAY = 0.7
STEPS = 6
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"name": "ddp"},
    "fsdp": {"name": "fsdp"},
    "zero2": {"name": "deepspeed", "stage": 2},
    "zero3": {"name": "deepspeed", "stage": 3, "offload_optimizer": True},
}


class Recorder(pl.Callback):
    """The whole weights after each step, and those that validation saw, by name."""

    def __init__(self) -> None:
        self.after: list[dict[str, np.ndarray]] = []
        self.seen: list[dict[str, np.ndarray]] = []

    def _whole(self, trainer: pl.Trainer) -> dict[str, np.ndarray]:
        return {name: p.detach().clone().numpy() for name, p in trainer.lightning_module.named_parameters()}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.after.append(self._whole(trainer))

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.after.append(self._whole(trainer))

    def on_validation_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.seen.append(self._whole(trainer))


def settings(url: str, data: str, strategy: str, world: int, **train: Any) -> configs.RunConfig:
    raw = lm_config(url, data, **{"max_steps": STEPS, "ema_decay": DECAY, "val_every": 3, **train})
    raw["data"] = {**raw["data"], "val_samples": 4}
    raw |= {"strategy": STRATEGIES[strategy], "diagnostics": {"every": 0, "names": []}, "checkpoint": {"every": 3}}
    raw["resources"] = {**raw["resources"], "processes_per_node": world}
    return configs.load(raw)


def run_all(jobs: list[tuple[configs.RunConfig, bool]]) -> list[str]:
    torch.set_num_threads(1)
    return [fit(config, resume=resume)["status"] for config, resume in jobs]


def recorded(
    config: configs.RunConfig, plain: configs.RunConfig
) -> tuple[list[dict[str, np.ndarray]], list[dict[str, np.ndarray]]]:
    """Worker: a run on one process that keeps what it saw; then another."""
    torch.set_num_threads(1)
    recorder, assemble = Recorder(), assembly.assemble

    def with_recorder(parts: Any) -> Any:
        watch = assemble(parts)
        watch.callbacks.append(recorder)
        return watch

    import trainer.run

    trainer.run.assemble = with_recorder  # type: ignore[assignment]
    try:
        fit(config)
    finally:
        trainer.run.assemble = assemble
    fit(plain)
    return recorder.after, recorder.seen


def averages(url: str, step: int = STEPS) -> dict[str, np.ndarray]:
    found = {}
    for prefix in ("model.", "ema."):
        task = fresh(url)
        load_module(Store(url).sub("checkpoints"), step, task, prefix=prefix)
        found[prefix] = {name: p.detach().numpy() for name, p in task.named_parameters()}
    return found


_DATA: dict[str, str] = {}


def fresh(url: str) -> Any:
    return build(settings(url, _DATA["text"], "ddp", 1))[0]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        unavailable("tests over all strategies need deepspeed: pip install 'keel[test]'")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ema")
    _DATA["text"] = tiny_text(str(folder / "text"))
    found: dict[str, Any] = {name: str(folder / name) for name in (*STRATEGIES, "seen", "plain")}
    seen = settings(found["seen"], _DATA["text"], "ddp", 1, ema_validation=True)
    plain = settings(found["plain"], _DATA["text"], "ddp", 1)
    (found["recorder"],) = run_distributed(recorded, 1, seen, plain)
    jobs = [(settings(found[n], _DATA["text"], n, 2, ema_validation=True), False) for n in STRATEGIES]
    assert run_distributed(run_all, 2, jobs) == [["ok"] * len(jobs)] * 2
    return found


def expected(after: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    average = {name: value.astype("f8") for name, value in after[0].items()}
    for weights in after[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * value for name, value in weights.items()}
    return average


def test_the_recurrence(runs):
    (after, _), found = runs["recorder"], averages(runs["seen"])
    assert len(after) == STEPS + 1
    for name, value in expected(after).items():
        np.testing.assert_allclose(found["ema."][name], value, rtol=0, atol=1e-6)
        assert np.array_equal(found["model."][name], after[-1][name])
        assert not np.allclose(found["ema."][name], found["model."][name], rtol=0, atol=1e-5) or not value.any()


def test_validation_sees_the_averages_and_gives_the_weights_back(runs):
    after, seen = runs["recorder"]
    for name, value in expected(after[: STEPS // 2 + 1]).items():
        np.testing.assert_allclose(seen[0][name], value, rtol=0, atol=1e-6)
    rows = [
        {row["step"]: row for row in read_metrics(Store(runs[name])) if "loss" in row} for name in ("seen", "plain")
    ]
    assert [row["loss"] for row in rows[0].values()] == [row["loss"] for row in rows[1].values()]  # bit for bit


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sharded_averages_are_the_same(runs, strategy):
    reference, found = averages(runs["seen"]), averages(runs[strategy])
    for name, value in reference["ema."].items():
        np.testing.assert_allclose(found["ema."][name], value, rtol=0, atol=2e-4)
    validated = [
        [row["val/loss"] for row in read_metrics(Store(runs[name])) if "val/loss" in row] for name in ("seen", strategy)
    ]
    assert len(validated[0]) == 2
    np.testing.assert_allclose(validated[1], validated[0], rtol=0, atol=1e-4)
    kept = read_manifest(Store(runs[strategy]).sub("checkpoints"), STEPS)["tensors"]
    entries = [entry for name, entry in kept.items() if name.startswith("ema.")]
    assert {entry["dtype"] for entry in entries} == {"float32"}
    assert any(len(entry["chunks"]) > 1 for entry in entries) == (strategy != "ddp")  # split as the weights are


def test_an_evaluation_is_of_the_weights_or_of_their_averages(runs):
    url, folder = runs["seen"], Path(runs["seen"])
    config = settings(url, _DATA["text"], "ddp", 1, ema_validation=True)
    Store(url).write("config.yaml", configs.to_yaml(config).encode())
    plain, averaged = (
        evaluate(url, split="validation", limit=config.data.val_samples, ema=ema) for ema in (False, True)
    )
    # Of the samples that validation saw in training, at its end with the averages.
    validated = [row["val/loss"] for row in read_metrics(Store(url)) if "val/loss" in row]
    assert averaged["metrics"]["loss"] == pytest.approx(validated[-1], rel=1e-5) != plain["metrics"]["loss"]
    assert averaged["ema"] is True and "ema" not in plain
    assert len(list(folder.glob("evaluation-*.json"))) == 1 and (folder / "evaluation.json").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_dry_run_knows_how_large_a_checkpoint_is(runs, strategy):
    if dist.is_initialized():
        dist.destroy_process_group()  # of tests before this one: a dry run makes its own
    planned = trace(settings("memory://run", "memory://data", strategy, 2)).checkpoint_bytes
    saved = saved_bytes(runs[strategy])
    assert planned == pytest.approx(saved, rel=0.01), (planned, saved)


def saved_bytes(url: str) -> int:
    tensors = read_manifest(Store(url).sub("checkpoints"), STEPS)["tensors"]
    return sum(chunk["bytes"] for name, e in tensors.items() if not name.startswith("rng.") for chunk in e["chunks"])


def test_a_resume_goes_on_with_the_average(runs, tmp_path):
    """Saved by two processes, continued by one under another strategy."""
    jobs = []
    for saved, loaded in (("fsdp", "ddp"), ("zero3", "fsdp"), ("ddp", "zero2")):
        url = str(tmp_path / saved)
        shutil.copytree(runs[saved], url)
        shutil.rmtree(f"{url}/checkpoints/{step_name(STEPS)}")
        jobs.append((settings(url, _DATA["text"], loaded, 1, ema_validation=True), True))
    run_distributed(run_all, 1, jobs)
    for saved in ("fsdp", "zero3", "ddp"):
        before, after = averages(runs[saved]), averages(str(tmp_path / saved))
        for name, value in before["ema."].items():
            np.testing.assert_allclose(after["ema."][name], value, rtol=0, atol=2e-4)


def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    class Strategy:
        def masters(self) -> list[torch.Tensor]:
            return list(net.parameters())

        def named(self, values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
            return dict(zip(("weight", "bias"), values, strict=True))

    from trainer.checkpoint import Checkpointer

    net = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    Checkpointer(Store(str(tmp_path))).save(1, net, [optimizer], {}, device=torch.device("cpu"))
    checkpointer = Checkpointer(Store(str(tmp_path)))
    EMA(0.9, checkpointer)._strategy = Strategy()
    with pytest.raises(CheckpointError, match=r"lacks ema\."):
        checkpointer.load(1, net, [optimizer], device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("train", "message"),
    [({"ema_decay": 1.0}, "ema_decay=1.0"), ({"ema_decay": 0.0, "ema_validation": True}, "no effect")],
)
def test_a_setting_that_cannot_work_is_refused(tmp_path, train, message):
    with pytest.raises(configs.ConfigError, match=message):
        settings(str(tmp_path), "nowhere", "ddp", 1, **train)

"""Whole runs and their checkpoints: all state comes back, the self-check, saves in the background, by time and to S3."""

import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.position import StreamPosition
from datamodules.store import Store, Unreachable
from modules.tasks.field_rollout import FieldRollout
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import fno_config, lm_config, tiny_fields
from trainer import config as configs
from trainer.callbacks import selfcheck
from trainer.callbacks.checkpoint import Checkpoint
from trainer.checkpoint import CheckpointError, checkpointer, committed_steps, loading, read_manifest, state, verify
from trainer.checkpoint.manifest import writer_name
from trainer.checkpoint.storage import read_full
from trainer.config import ConfigError
from trainer.lifecycle import prepare_new, prepare_resume
from trainer.records import read_metrics, read_record
from trainer.run import fit
from trainer.schema import CheckpointConfig
from trainer.strategies.base import Checkpointed

TENSORS = {"weights": "model.network", "moments": ".exp_avg", "counts": ".step", "average": "ema."}
CALLBACKS = {"judge of steps": "Guard", "remedies": "Recovery", "stored sample": "SelfCheck"}
LOSSES = (
    "nothing", *TENSORS, *CALLBACKS, "scheduler", "scaler", "generators", "stream", "state.pt", "manifest"
)  # fmt: skip
ALONE = ["strategy.name=ddp", "data.threads=1"]
# So that every part of a run has a state: averaged weights, a loss scaler, a judge of the steps.
ALL_PARTS = [
    *ALONE,
    "checkpoint.self_check=true",
    "train.ema_decay=0.5",
    "train.precision=16-mixed",
    "recovery.nonfinite=skip",
    "recovery.spike=skip",
    "recovery.window=8",
    "diagnostics.every=0",
    "diagnostics.names=[]",
]


def noisy(self: FieldRollout, batch: Any, plain: Any = FieldRollout.loss_terms) -> Any:
    """A loss that uses every generator of the process, as dropout and augmentations would; step 2 is not finite."""
    total, count, extras = plain(self, batch)
    if self.training:
        total = total * (1 + 0.01 * (torch.rand(()) + random.random() + np.random.rand()))
        if self.trainer.global_step == 1:
            total = total * float("nan")
    return total, count, extras


def end(url: str) -> dict[str, Any]:
    """What a run ends with: the losses of steps 5 to 8, and the states that lie in its last checkpoint."""
    folder, manifest = (
        Store(url).sub("checkpoints").sub("step-00000008"),
        read_manifest(Store(url).sub("checkpoints"), 8),
    )
    extra, table = loading.unpack(loading.read_state(folder, manifest)), manifest["tensors"]
    averages = read_full(folder, table, [name for name in table if name.startswith("ema.")])
    return {
        "losses": [row["loss"] for row in read_metrics(Store(url)) if "loss" in row and row["step"] > 4],
        "average": {name: tensor.tolist() for name, tensor in averages.items()},
        "scaler": extra["Mixed"],
        **{part: repr(extra["callbacks"][name]) for part, name in CALLBACKS.items()},
    }


def resumed(url: str, lose: str, patch: pytest.MonkeyPatch) -> dict[str, Any] | str:
    """The end of a run of 8 steps that was saved at step 4, continued without one part of what was saved."""
    tensors, collect_state = loading.load_tensors, Checkpointed.load_checkpoint

    def load_tensors(folder: Any, table: Any, wanted: dict[str, torch.Tensor]) -> None:
        hit = [name for name in wanted if TENSORS[lose] in name]
        assert hit
        tensors(folder, table, {name: tensor for name, tensor in wanted.items() if name not in hit})

    def load_checkpoint(self: Checkpointed, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        extra = collect_state(self, *arguments, **keywords)
        if lose == "scheduler":
            fresh = self.lightning_module.trainer.lr_scheduler_configs[0].scheduler  # type: ignore[union-attr]
            extra["lr_schedulers"] = [fresh.state_dict()]
        elif lose == "stream":
            (name,) = [key for key in extra if key.endswith("Data") or "DataModule" in key]
            del extra[name]
        elif lose == "scaler":
            del extra["Mixed"]
        else:
            del extra["callbacks"][CALLBACKS[lose]]
        return extra

    if lose in TENSORS:
        patch.setattr(loading, "load_tensors", load_tensors)
    elif lose in ("scheduler", "stream", "scaler", *CALLBACKS):
        patch.setattr(Checkpointed, "load_checkpoint", load_checkpoint)
    elif lose == "generators":
        patch.setattr(state, "set_rng_state", lambda packed, device: None)
    elif lose in ("state.pt", "manifest"):
        folder = Path(url) / "checkpoints" / "step-00000004"
        name = "state.pt" if lose == "state.pt" else "manifest.json"
        (folder / f"{writer_name(1)}{name}").unlink()
    patch.setattr(selfcheck, "_TOLERANCE_OF_HALF", 1e-6)  # nothing else has changed
    try:
        fit(prepare_resume(url, []), resume=True)
    except CheckpointError as error:
        return str(error)
    return end(url)


def lose_each(folder: str, data: str) -> dict[str, Any]:
    """Worker: one run to step 4, continued once with everything and once without each part."""
    FieldRollout.loss_terms = noisy  # type: ignore[method-assign]
    url = f"{folder}/run"
    prepare_new(configs.load(fno_config(url, data, max_steps=8), ALL_PARTS))
    crash, found = StreamPosition.on_train_batch_end, {}

    def stop(self: StreamPosition, trainer: Any, *arguments: Any) -> None:
        crash(self, trainer, *arguments)
        if trainer.global_step == 5:
            raise RuntimeError("crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamPosition, "on_train_batch_end", stop)
        with pytest.raises(RuntimeError, match="crash"):
            fit(configs.load(f"{url}/config.yaml"))
    for lose in (*LOSSES, "undisturbed"):
        copy = f"{folder}/{lose}"
        if lose == "undisturbed":
            prepare_new(configs.load(fno_config(copy, data, max_steps=8), ALL_PARTS))
            fit(configs.load(f"{copy}/config.yaml"))
            found[lose] = end(copy)
            continue
        shutil.copytree(url, copy)
        config = Path(copy) / "config.yaml"
        config.write_text(config.read_text().replace(url, copy))
        with pytest.MonkeyPatch.context() as patch:
            found[lose] = resumed(copy, lose, patch)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return tiny_fields(str(tmp_path_factory.mktemp("data") / "fields"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, data) -> dict[str, Any]:
    return run_distributed(lose_each, 1, str(tmp_path_factory.mktemp("runs")), data)[0]


def test_with_everything_back_the_run_goes_on_bitwise(outcomes):
    assert len(outcomes["nothing"]["losses"]) == 4 and outcomes["nothing"] == outcomes["undisturbed"]


@pytest.mark.parametrize("lose", ["moments", "counts", "scheduler", "generators", "stream"])
def test_without_one_part_it_goes_another_way(outcomes, lose):
    assert len(outcomes[lose]["losses"]) == 4 and outcomes[lose]["losses"] != outcomes["nothing"]["losses"]


@pytest.mark.parametrize("lose", ["average", "scaler", *CALLBACKS])
def test_a_lost_state_shows_in_that_part(outcomes, lose):
    differs = {part for part, value in outcomes[lose].items() if value != outcomes["nothing"][part]}
    assert lose in differs
    assert not differs & (set(CALLBACKS) - {lose}), "the others came back"


def test_lost_weights_are_found_by_the_self_check(outcomes):
    assert "resume self-check failed: a stored sample had the loss" in outcomes["weights"]
    assert "checkpoint.self_check=false" in outcomes["weights"]


@pytest.mark.parametrize("lose", ["state.pt", "manifest"])
def test_lost_files_are_refused(outcomes, lose):
    assert "no committed checkpoint" in outcomes[lose]


class FakeTrainer:
    """As much of a trainer as the callback asks for."""

    def __init__(self, saver: Any) -> None:
        self.global_step, self.saved, self._saver = 0, [], saver
        self.lightning_module = None

    def save_checkpoint(self, url: str, weights_only: bool) -> None:
        self._saver()
        self.saved.append(self.global_step)


class FakeCheckpointer:
    background = False
    store = Store("/nowhere")

    def poll(self) -> bool:
        return False

    def wait(self, seconds: float | None = None) -> bool:
        return True


class FakeFlights(FakeCheckpointer):
    """What goes wrong with a save comes out at the next look, once."""

    background = True
    error: Exception | None = None

    def wait(self, seconds: float | None = None) -> bool:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return True

    poll = wait


def drive(
    config: CheckpointConfig, steps: int, saver: Any = lambda: None, checkpointer: Any = None, **keywords: Any
) -> FakeTrainer:
    now = [0.0]
    trainer: Any = FakeTrainer(saver)
    callback = Checkpoint(checkpointer or FakeCheckpointer(), config, clock=lambda: now[0], **keywords)
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    callback.on_train_start(trainer, None)  # type: ignore[arg-type]
    for step in range(1, steps + 1):
        now[0] += 25.0
        callback.on_train_batch_end(trainer)  # a micro-batch within the step
        trainer.global_step = step
        callback.on_train_batch_end(trainer)
    callback.on_train_end(trainer, None)  # type: ignore[arg-type]
    return trainer


def test_saves_by_steps_by_time_and_before_validation():
    assert drive(CheckpointConfig(every=4), 10).saved == [4, 8, 10]
    assert drive(CheckpointConfig(every=0, every_minutes=1), 10).saved == [3, 6, 9, 10]
    assert drive(CheckpointConfig(every=5, every_minutes=1), 12).saved == [3, 5, 8, 10, 12]
    assert drive(CheckpointConfig(every=0, keep_every=4), 9).saved == [4, 8, 9]
    assert drive(CheckpointConfig(every=4, best="val/loss"), 12, val_every=6).saved == [4, 6, 8, 12]


def test_so_many_failures_in_a_row_are_survived_and_told():
    calls: list[int] = []
    events: list[tuple[Any, ...]] = []

    def saver(bad: tuple[int, ...]) -> Any:
        def save() -> None:
            calls.append(1)
            if len(calls) in bad:
                raise CheckpointError("the store is down")

        return save

    config = CheckpointConfig(every=2, tolerate=2)
    trainer = drive(config, 10, saver((2, 3, 5)), event=lambda *a, **k: events.append((*a, k["why"])))
    assert trainer.saved == [2, 8, 10], "the last one was tried again at once"
    assert events == [(step, "save_failed", "the store is down") for step in (4, 6, 10)]
    calls.clear()
    with pytest.raises(CheckpointError, match="the store is down"):
        drive(config, 10, saver((2, 3, 4)))
    calls.clear()
    with pytest.raises(CheckpointError, match="the store is down"):
        drive(CheckpointConfig(every=2), 10, saver((1,)))


def test_so_many_failures_in_a_row_are_survived_in_the_background_too():
    flights, calls = FakeFlights(), []

    def saver(bad: tuple[int, ...]) -> Any:
        def save() -> None:
            calls.append(1)
            if len(calls) in bad:
                flights.error = CheckpointError("the store is down")

        return save

    config, told = CheckpointConfig(every=2, tolerate=2), []
    drive(config, 10, saver((1, 2, 4)), flights, event=lambda *a, **k: told.append(k["saved_step"]))
    assert told == [2, 4, 8]
    calls.clear()
    with pytest.raises(CheckpointError, match="the store is down"):
        drive(config, 10, saver((1, 2, 3)), flights)
    assert len(calls) == 3


@pytest.mark.parametrize("background", [False, True])
def test_a_run_whose_last_save_fails_has_failed_whatever_is_tolerated(background):
    flights, calls = FakeFlights(), []

    def save() -> None:
        calls.append(1)
        if len(calls) > 2:
            flights.error = CheckpointError("the store is down")
            if not background:
                flights.wait()

    told: list[int] = []
    checkpointer = flights if background else FakeCheckpointer()
    with pytest.raises(CheckpointError, match="the store is down"):
        drive(
            CheckpointConfig(every=4, tolerate=9), 10, save, checkpointer, event=lambda step, *a, **k: told.append(step)
        )
    assert len(calls) == 4 and told == [10], "it was tried twice"


def timed(url: str, data: str) -> tuple[Any, list[int]]:
    """Worker: only rank 0's clock says that it is time; the other rank's stands still. And the store fails once."""
    rank, write, failed = int(os.environ["RANK"]), Store.write, []
    now = [0.0]

    def clock() -> float:
        now[0] += 20.0 * (rank == 0)
        return now[0]

    Checkpoint.__init__.__kwdefaults__["clock"] = clock

    def fail_once(store: Store, path: str, content: bytes) -> None:
        if rank == 1 and path.endswith(".bin") and not failed:
            failed.append(path)
            raise Unreachable("down for a moment")
        write(store, path, content)

    Store.write = fail_once  # type: ignore[method-assign]
    fit(configs.load(f"{url}/config.yaml"))
    return read_record(Store(url))["status"], committed_steps(Store(url).sub("checkpoints"))


def test_two_ranks_save_by_the_clock_in_the_background_to_s3_and_survive_a_failure(tmp_path, data, s3, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    url = s3.url("run")
    overrides = ["resources.processes_per_node=2", "checkpoint.every=0", "checkpoint.every_minutes=1", "log.flush_seconds=60",
                 "checkpoint.background=true", "checkpoint.tolerate=1", "checkpoint.keep_last=9"]  # fmt: skip
    prepare_new(configs.load(fno_config(url, data, max_steps=12), overrides))
    results = run_distributed(timed, 2, url, data)
    assert results[0] == results[1] and results[0][0] == "ok"
    steps = results[0][1]
    assert (
        len(steps) >= 2 and steps[-1] == 12 and all(verify(Store(url).sub("checkpoints"), step) == [] for step in steps)
    )
    failures = [row for row in read_metrics(Store(url)) if row.get("event") == "save_failed"]
    assert len(failures) == 1 and "down for a moment" in failures[0]["why"]
    assert read_manifest(Store(url).sub("checkpoints"), 12)["world_size"] == 2
    assert not any(Path.cwd().iterdir()), "nothing beside the store: no local folder s3:"


def test_impossible_settings_are_refused(data, tmp_path):
    for wrong, message in (
        ("checkpoint.best=val/loss", "set train.val_every > 0"),
        ("checkpoint.keep_best=2", "no effect without best"),
        ("checkpoint.best=loss", "must be a validation metric"),
        ("checkpoint.best=val/typo train.val_every=4", "best=val/typo: validation gives val/loss, val/relative_l2, "),
        ("weights.strict=false", "no effect without url"),
    ):
        with pytest.raises(ConfigError, match=message):
            configs.load(fno_config(str(tmp_path), data), wrong.split())
    for good in ("val/loss", "val/rollout/relative_l2@4", "val/finite_rollouts"):
        configs.load(fno_config(str(tmp_path), data), [f"checkpoint.best={good}", "train.val_every=4"])
    for good in ("val/loss", "val/bits_per_byte"):
        configs.load(lm_config(str(tmp_path), data), [f"checkpoint.best={good}", "train.val_every=4"])


def tuned(folder: str, data: str) -> dict[str, Any]:
    """Worker: a run that starts from another run's weights, by `weights.url`."""
    first, second = f"{folder}/first", f"{folder}/second"
    for url, more in ((first, []), (second, [f"weights.url={first}", "optim.lr=1e-9"])):
        prepare_new(configs.load(fno_config(url, data, max_steps=4), [*ALONE, *more]))
        fit(configs.load(f"{url}/config.yaml"))
    a, b = (checkpointer.Store(url).sub("checkpoints") for url in (first, second))
    from trainer.checkpoint.weights import difference

    tables = [(s.sub("step-00000004"), read_manifest(s, 4)["tensors"]) for s in (a, b)]
    names = [name for name in tables[0][1] if name.startswith("model.network") and name.endswith("weight")]
    return {
        "apart": max(difference(n, *tables).relative for n in names),
        "report": Store(second).read_json("weights.json"),
    }


def test_a_run_starts_from_another_ones_weights(tmp_path, data):
    (found,) = run_distributed(tuned, 1, str(tmp_path), data)
    assert found["apart"] < 1e-5, "at a rate of nearly nothing they stay what they were"
    report = found["report"]
    assert report["source"] == f"{tmp_path}/first" and report["loaded"] and not report["missing"] + report["unused"]

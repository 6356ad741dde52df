"""What runs below `faults.py`: Keel's launcher, and workers that tell how far they are and are hurt from within.

    python -m scripts.bench.faults_worker launch FOLDER [--resume]
    python -m scripts.bench.faults_worker fit FOLDER/run [--resume]

FOLDER holds `plan.json`. Workers write `pids/rank-R` before anything else, rank 0 a line `TIME STEP PID` into `steps` per
step, all of them `events.jsonl`: what struck from within, and each attempt to reach a store that failed. Times are of the
monotonic clock, which all processes of a machine share. A fault from within strikes once, in the process that first
makes `fired/ID`.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NUMERIC = ("nan_skip", "nan_rollback", "spike_skip", "spike_rollback")
CLOCK_S = 1e7  # so far a clock jumps, forwards or back


class Faults:
    """The part of a plan that this process carries out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, int(os.environ["RANK"])
        self.plan: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())["faults"]
        self.step = 0  # the one that is being computed
        self.in_save: dict[str, Any] | None = None
        self.shift, self.shifted = 0.0, ""
        self.random = random.Random(f"{self.rank}{os.getpid()}")
        self._lines = {name: os.open(folder / name, os.O_WRONLY | os.O_APPEND) for name in ("steps", "events.jsonl")}

    def say(self, **event: Any) -> None:
        line = json.dumps({"time": time.monotonic(), "rank": self.rank, "step": self.step, **event})
        os.write(self._lines["events.jsonl"], f"{line}\n".encode())

    def done(self, step: int) -> None:
        if self.rank == 0:
            os.write(self._lines["steps"], f"{time.monotonic()} {step} {os.getpid()}\n".encode())

    def due(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """The faults that are to strike this rank now, each claimed by it."""
        for fault in self.plan:
            if fault["kind"] not in kinds or fault["rank"] != self.rank or fault["step"] > self.step:
                continue
            try:
                os.close(os.open(self.folder / "fired" / fault["id"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            yield fault

    def before_step(self) -> None:
        for fault in self.due("clock_jump"):
            self.shift, self.shifted = self.random.choice([-CLOCK_S, CLOCK_S]), fault["id"]
        for fault in self.due("sigkill_in_save"):
            self.in_save = fault
        for fault in self.due("crash"):
            self.say(id=fault["id"])
            raise RuntimeError("injected crash")
        for fault in self.due("hang"):
            self.say(id=fault["id"])
            time.sleep(3600)

    def storing(self, path: str) -> None:
        """Before each write to a store: a process that is to die in a save dies at some instant after the save's first."""
        fault, self.in_save = self.in_save, self.in_save if "step-" not in path else None
        if fault is not None and self.in_save is None:
            self.say(id=fault["id"])
            threading.Timer(self.random.uniform(0, 0.03), os.kill, [os.getpid(), signal.SIGKILL]).start()

    def recording(self) -> None:
        """Before the record of a run that is done."""
        for fault in self.due("sigkill_at_end"):
            self.say(id=fault["id"])
            os.kill(os.getpid(), signal.SIGKILL)

    def now(self, clock: Callable[[], float]) -> float:
        if self.shifted:
            self.shifted, fault = "", self.shifted
            self.say(id=fault)
        return clock() + self.shift


def install(faults: Faults) -> None:
    """Puts the faults where training and storage pass by."""
    import torch

    from datamodules.position import StreamPosition
    from datamodules.store import Store
    from datamodules.store import store as stores
    from modules.tasks.base import Task
    from trainer import run

    train, advance, clock = Task.training_step, StreamPosition.on_train_batch_end, time.time
    write, create, failed, record = Store.write, Store.create, stores.is_connect_fault, run.write_record
    translate = stores.translate

    def training_step(self: Any, batch: Any, index: int) -> Any:
        faults.step = self.trainer.global_step + 1
        faults.before_step()
        out = train(self, batch, index)
        for fault in faults.due(*NUMERIC):
            faults.say(id=fault["id"])
            out["loss"] = out["loss"] * (1e4 if fault["kind"].startswith("spike") else math.nan)
        return out

    def on_train_batch_end(self: Any, trainer: Any, *rest: Any) -> None:
        advance(self, trainer, *rest)
        faults.done(trainer.global_step)
        for fault in faults.due("bit_flip"):
            parameter = next(trainer.lightning_module.parameters())
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.data.view(torch.int32).view(-1)[0] ^= 1 << 12
            faults.say(id=fault["id"])

    def kept_write(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        faults.storing(self.join(path))
        return write(self, path, *args, **kwargs)

    def kept_create(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        faults.storing(self.join(path))
        return create(self, path, *args, **kwargs)

    def attempt_failed(error: BaseException) -> bool:
        faults.say(failed=type(error).__name__)
        return failed(error)

    def refused(error: Exception, url: str, is_local: bool) -> Any:
        found = translate(error, url, is_local)
        faults.say(failed=type(found).__name__)
        return found

    def recorded(store: Any, content: Any) -> None:
        if content["status"] == "ok":
            faults.recording()
        record(store, content)

    Task.training_step = training_step  # type: ignore[method-assign, assignment]
    StreamPosition.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    Store.write, Store.create = kept_write, kept_create  # type: ignore[method-assign]
    stores.is_connect_fault, stores.translate = attempt_failed, refused
    run.write_record = recorded  # type: ignore[assignment]
    time.time = lambda: faults.now(clock)


def launch(folder: Path, extra: list[str]) -> int:
    """Keel's launcher, as `keel train` and `keel resume` call it, with the workers of this module."""
    from cluster.launch import Job, requeue_on_signal
    from cluster.launch import launch as run
    from cluster.launch.budget import newest_commit

    requeue_on_signal()
    plan = json.loads((folder / "plan.json").read_text())
    job = Job(
        ("scripts.bench.faults_worker", "fit", plan["url"], *extra),
        processes=plan["world"],
        threads=1,
        env={"KEEL_FAULTS": str(folder)},
        max_restarts=plan["max_restarts"],
        progress=lambda: newest_commit(plan["url"]),
        grace_s=60,
    )
    return run(job)


def fit() -> int:
    """A worker."""
    folder = Path(os.environ["KEEL_FAULTS"])
    mine = folder / "pids" / f"rank-{os.environ['RANK']}"
    part = mine.with_suffix(f".{os.getpid()}")
    part.write_text(str(os.getpid()))
    part.rename(mine)
    from trainer import signals

    signals.leave_at_once()
    install(Faults(folder))
    from trainer.__main__ import main

    return main()


if __name__ == "__main__":
    code = launch(Path(sys.argv[2]), sys.argv[3:]) if sys.argv[1] == "launch" else fit()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

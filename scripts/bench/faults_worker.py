"""A worker that has faults: `python -m scripts.bench.faults_worker fit URL`, with the plan in `URL/../plan.json`.

A fault strikes once, in the process that notes it first under `fired/`. Each attempt notes its first step.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# name -> the process does not survive it
KINDS = {
    "sigkill": True,
    "sigkill_in_save": True,
    "sigstop": True,
    "hang": True,
    "crash": True,
    "sigterm": True,
    "sigusr1": True,
    "bit_flip": True,
    "store_down": False,
    "store_slow": False,
    "disk_full": False,
    "clock_jump": False,
    "nan_rollback": False,
    "nan_skip": False,
    "spike_skip": False,
}
# Those after which the data or the updates are others than in a run without them.
NUMERIC = ("nan_rollback", "nan_skip", "spike_skip")


class Faults:
    """The plan of one run, carried out in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan: list[dict[str, Any]] = json.loads((folder / "plan.json").read_text())
        self.rank = int(os.environ["RANK"])
        self.step = 0  # the step that is being computed
        self.random = random.Random(f"{self.plan}{self.rank}{os.getpid()}")
        self.in_save: dict[str, Any] | None = None
        self.until: tuple[str, float] = ("", 0.0)

    def due(self, *kinds: str) -> Iterator[dict[str, Any]]:
        """The faults that are to strike this rank now, each claimed by it."""
        for fault in self.plan:
            if fault["kind"] not in kinds or fault["step"] > self.step:
                continue
            everywhere = fault["kind"] in ("store_down", "store_slow", "disk_full", "clock_jump", *NUMERIC)
            if fault["rank"] != self.rank and not (everywhere and self.rank == 0):
                continue
            try:
                with open(self.folder / f"fired/{fault['id']}", "x") as file:
                    json.dump({"time": time.time(), "step": self.step}, file)
            except FileExistsError:
                continue
            yield fault

    def strike(self) -> None:
        """At the beginning of a step."""
        for fault in self.due("sigkill", "sigstop", "sigterm", "sigusr1"):
            name = {"sigkill": "SIGKILL", "sigstop": "SIGSTOP", "sigterm": "SIGTERM", "sigusr1": "SIGUSR1"}
            number = getattr(signal, name[fault["kind"]])
            delay = self.random.uniform(0, 0.05)  # at any instant of the step
            threading.Timer(delay, os.kill, [os.getpid(), number]).start()
        for fault in self.due("sigkill_in_save"):
            self.in_save = fault
        for fault in self.due("store_down", "store_slow", "disk_full", "clock_jump"):
            self.until = (fault["kind"], time.monotonic() + self.random.uniform(0.05, 0.2))
            if fault["kind"] == "disk_full":
                limit(1024)
                threading.Timer(self.until[1] - time.monotonic(), limit, [resource.RLIM_INFINITY]).start()
        for _ in self.due("crash"):
            raise RuntimeError("injected crash")
        for _ in self.due("hang"):
            time.sleep(3600)

    def storing(self, path: str, write: Callable[[], Any]) -> Any:
        """Around each write to a store."""
        from datamodules.store import Unreachable

        if self.in_save is not None and "step-" in path:
            write()
            os.kill(os.getpid(), signal.SIGKILL)
        kind, end = self.until
        if time.monotonic() < end:
            if kind == "store_down":
                raise Unreachable(f"{path}: injected outage")
            if kind == "store_slow":
                time.sleep(0.1)
        return write()


def limit(size: int) -> None:
    """No file of this process may grow beyond so many bytes: every write that needs more fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def install(faults: Faults) -> None:
    """Puts the faults where training and storage pass by."""
    import torch

    from datamodules.store import Store
    from modules.tasks.base import Task
    from trainer.callbacks.stream import StreamPosition

    train, advance, write, create, clock = (
        Task.training_step,
        StreamPosition.on_train_batch_end,
        Store.write,
        Store.create,
        time.time,
    )
    first = faults.folder / f"first/{os.environ.get('KEEL_RESTARTS', '0')}-{time.time():.3f}"

    def training_step(self: Any, batch: Any, index: int) -> Any:
        faults.step = self.trainer.global_step + 1
        faults.strike()
        out = train(self, batch, index)
        for fault in faults.due(*NUMERIC):
            out["loss"] = out["loss"] * (1e4 if fault["kind"] == "spike_skip" else math.nan)
        return out

    def on_train_batch_end(self: Any, trainer: Any, *rest: Any) -> None:
        advance(self, trainer, *rest)
        if faults.rank == 0 and not first.exists():
            first.write_text(json.dumps({"time": clock(), "step": trainer.global_step}))
        for _ in faults.due("bit_flip"):
            parameter = next(trainer.lightning_module.parameters())
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.data.view(torch.int32).view(-1)[0] ^= 1 << 12

    def shifted() -> float:
        kind, end = faults.until
        return clock() + (-1e7 if kind == "clock_jump" and time.monotonic() < end else 0.0)

    def kept_write(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        return faults.storing(self.join(path), lambda: write(self, path, *args, **kwargs))

    def kept_create(self: Any, path: str, *args: Any, **kwargs: Any) -> Any:
        return faults.storing(self.join(path), lambda: create(self, path, *args, **kwargs))

    Task.training_step = training_step  # type: ignore[method-assign, assignment]
    StreamPosition.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    Store.write, Store.create = kept_write, kept_create  # type: ignore[method-assign]
    time.time = shifted


if __name__ == "__main__":
    from trainer.__main__ import main

    install(Faults(Path(sys.argv[2]).parent))
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

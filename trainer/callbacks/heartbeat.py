"""What a run tells the store while it goes: where it stands, how fast, and how each of its ranks fares."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from datamodules.store import Store
from trainer.callbacks.metrics import MetricsLog
from trainer.callbacks.watchdog import Watchdog
from trainer.distributed import local_world_size
from trainer.records import Row, strict
from trainer.restarts import NODE
from trainer.status import RUN, WORKERS, period, requested

_WINDOWS = 6  # heartbeats over which times of steps are averaged

# A store that does not answer must not hold up the next heartbeat for long.
_DEADLINE_S = 20.0

log = logging.getLogger("keel.run")


@dataclass
class _Totals:
    """Since training started: steps, and seconds in them."""

    steps: int = 0
    seconds: float = 0.0
    wait: float = 0.0  # for data
    forward: float = 0.0
    batches: int = 0
    timed: int = 0  # of them, those that `forward` counts

    def since(self, other: _Totals) -> _Totals:
        return _Totals(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))


class Heartbeat(pl.Callback):
    """Overwrites a few small objects below `status/` every few seconds, by a thread: a step waits for nothing of it.

    `status/run.json` says where the run stands, by rank 0; `status/workers-K.json` how the ranks of node K fare, by the
    first of them, which gets the others' words through files on the local disk. So a run on N nodes has N + 1 such
    objects, whatever its ranks and steps. No device is asked for anything that it would have to finish work for: memory
    is what torch's allocator knows, times are the host's, or those of CUDA events that are already over.

    In the same rhythm rank 0 looks for a request to end (`status/cancel.json`) and passes it to `obey`.

    Args:
        store: the run's URL.
        metrics: its rows hold losses and throughput.
        watchdog: knows phase and step.
        about: what does not change: name, attempt, steps to do ...
        committed: (step, seconds since the epoch) of the last commit that this process knows.
        obey: called once when the run is asked to end.
        seconds: between two heartbeats; default: what the launcher says, else 10.
    """

    def __init__(
        self,
        store: Store,
        metrics: MetricsLog,
        watchdog: Watchdog,
        *,
        about: Mapping[str, Any],
        committed: Callable[[], tuple[int, float] | None] = lambda: None,
        obey: Callable[[], None] = lambda: None,
        seconds: float | None = None,
    ) -> None:
        self.store = Store(store.url, **store.options | {"deadline": _DEADLINE_S})
        self.seconds = seconds or period()
        self._watchdog, self._about, self._committed, self._obey = watchdog, dict(about), committed, obey
        self._rank, self._world, self._local = dist.get_rank(), dist.get_world_size(), local_world_size()
        self._first = self._rank % self._local == 0
        node = os.environ.get(NODE) or str(self._rank // self._local)
        self._path = WORKERS.format(node)
        self._node = int(node)
        key = hashlib.sha256(store.url.encode()).hexdigest()[:16]
        self._folder = Path(tempfile.gettempdir()) / f"keel-heartbeat-{os.getuid()}-{key}"
        self._started = time.time()
        self._step, self._step_time = 0, self._started
        self._totals, self._window = _Totals(), _Totals()
        self._marks: deque[_Totals] = deque([_Totals()], maxlen=_WINDOWS)
        self._ended = self._began = 0.0  # of a batch, on the host's monotonic clock
        self._events: tuple[Any, Any] | None = None
        self._timing = False  # between the records of the two
        self._row: dict[str, Any] = {}
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._complained = self._obeyed = False
        if self._rank == 0:
            metrics.subscribe(self._listen)

    # ------------------------------------------------------------------------------------------------------------ hooks
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="keel-heartbeat", daemon=True)
            self._thread.start()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._step_time = trainer.global_step, time.time()
        self._ended = time.monotonic()
        if trainer.strategy.root_device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = time.monotonic()
        self._totals.wait += self._began - self._ended
        self._totals.batches += 1
        if self._events is not None and not self._timing:
            first, last = self._events
            if self._totals.batches > 1 and last.query():  # both are over: to ask for the time between is no wait
                self._count_forward(first.elapsed_time(last) / 1e3)
            if self._totals.batches == 1 or last.query():
                first.record()
                self._timing = True

    def on_before_backward(self, *_: Any) -> None:
        if self._events is None:
            self._count_forward(time.monotonic() - self._began)
        elif self._timing:
            self._events[1].record()
            self._timing = False

    def _count_forward(self, seconds: float) -> None:
        self._totals.forward += seconds
        self._totals.timed += 1

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        now = time.monotonic()
        self._totals.seconds += now - self._ended
        self._ended = now
        if trainer.global_step != self._step:
            self._totals.steps += 1
            self._step, self._step_time = trainer.global_step, time.time()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ended = time.monotonic()  # validation is no wait for data

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the thread, after one more heartbeat, and removes what lies on the local disk. `ended` says how it ended."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._first:
                shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------------- the thread
    def _work(self) -> None:
        pause, last = 0.0, False
        while not last:
            last, pause = self._stop.wait(pause), self.seconds
            try:
                self._beat()
                self._complained = False
            except Exception as error:  # no run ends for want of words
                if not self._complained:
                    log.warning("rank %d cannot tell how it fares: %s", self._rank, " ".join(str(error).split()))
                self._complained = True

    def _beat(self) -> None:
        now = time.time()
        mine = self._mine_now(now)
        if self._local > 1 and (self._first or not self._stop.is_set()):
            self._folder.mkdir(mode=0o700, exist_ok=True)
            part = self._mine().with_suffix(".part")
            part.write_text(json.dumps(mine))
            part.rename(self._mine())
        if self._first:
            ranks = [mine, *self._others()]
            self.store.write_json(
                self._path, {"node": self._node, "time": now, "heartbeat_s": self.seconds, "ranks": ranks}
            )
        if self._rank == 0:
            self.store.write_json(RUN, strict(self._run_now(now)))
            if not self._obeyed and requested(self.store):
                self._obeyed = True
                self._obey()

    def _mine(self) -> Path:
        return self._folder / f"rank-{self._rank}.json"

    def _others(self) -> list[dict[str, Any]]:
        """What the other ranks of this node said last."""
        found = []
        for rank in range(self._rank + 1, self._rank + self._local):
            with contextlib.suppress(OSError, ValueError):
                found.append(json.loads((self._folder / f"rank-{rank}.json").read_text()))
        return [each for each in found if each["attempt"] == self._about["attempt"]]  # others were killed

    def _mine_now(self, now: float) -> dict[str, Any]:
        totals = _Totals(**vars(self._totals))
        if totals.steps > self._marks[-1].steps:  # else what the last steps were like
            self._window = totals.since(self._marks[0])
            self._marks.append(totals)
        window = self._window
        steps = max(window.steps, 1)
        phase, step = self._watchdog.now
        found = {
            "rank": self._rank,
            "attempt": self._about["attempt"],
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": now,
            "phase": phase,
            "step": step,
            "step_time": self._step_time,
            "step_s": window.seconds / steps,
            "wait_s": window.wait / steps,
            "forward_s": window.forward / max(window.timed, 1) * window.batches / steps,
        }
        return found | memory()

    def _run_now(self, now: float) -> dict[str, Any]:
        phase, _ = self._watchdog.now
        with self._lock:
            row = dict(self._row)
        window, commit = self._window, self._committed()
        return self._about | {
            "time": now,
            "heartbeat_s": self.seconds,
            "status": None,
            "reason": None,
            "phase": phase,
            "step": self._step,
            "step_time": self._step_time,
            "steps_per_s": window.steps / window.seconds if window.steps and window.seconds else None,
            "host": socket.gethostname(),
            "nodes": self._world // self._local,
            "processes": self._local,
            "started": self._started,
            "commit": None if commit is None else {"step": commit[0], "time": commit[1]},
            "row": row,
        }

    def _listen(self, rows: list[Row]) -> None:
        with self._lock:
            for row in rows:
                self._row |= {name: value for name, value in row.items() if _told(name)}


def _told(name: str) -> bool:
    """Whether a column of the metrics is among the few that status shows."""
    return name in ("loss", "lr") or (name.startswith(("val/", "throughput/")) and name.count("/") == 1)


def memory() -> dict[str, int]:
    """Bytes that this process holds now and held at most, on the host and on its device. Asks no device for anything."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"memory": peak, "memory_peak": peak}
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        found["memory"] = pages * resource.getpagesize()
        found["memory_peak"] = max(peak, found["memory"])
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        device = torch.cuda.current_device()
        found |= {
            "device_memory": torch.cuda.memory_allocated(device),
            "device_memory_peak": torch.cuda.max_memory_allocated(device),
            "device_memory_reserved": torch.cuda.memory_reserved(device),
            "device_memory_total": torch.cuda.get_device_properties(device).total_memory,
        }
    return found

"""Rows as processes of this machine, as many at once as it has cores (or devices) for.

Each row is a node as every backend starts it (`cluster.launch.node`), whose output goes to the run's URL. A row starts
when there is room for all of it; smaller ones may overtake a larger one, and none waits while holding anything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from cluster.launch import PARENT_PID, available_cores
from cluster.launch.code import ROOT
from cluster.sweep.sweep import Sweep
from cluster.sweep.table import Row

_POLL_S = 0.05
# What this driver may have in its own environment, as a worker of a job, and its rows must not.
_OF_A_WORKER = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "KEEL_RESTARTS",
    "KEEL_ARRAY_INDEX",
    "KEEL_NODE",
)


@dataclass
class _Running:
    row: Row
    node: subprocess.Popen[bytes]
    log: IO[bytes]
    devices: list[int] = field(default_factory=list)
    told: bool = False


class Local:
    """See `cluster.sweep.executor.Executor`.

    Args:
        workers: cores to share out; 0 for all that this process may use. Runs on CUDA take a device per process instead.
    """

    def __init__(self, workers: int = 0) -> None:
        self.cores = workers or available_cores()
        self._running: list[_Running] = []
        self._devices: list[int] | None = None

    def check(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.nodes > 1:
                raise ValueError(
                    f"row {row.id} ({row.label}) needs {row.nodes} machines; `keel sweep run --on` starts it on a cluster"
                )
            have, what = self._capacity(sweep, row)
            need = row.processes if what == "devices" else row.cpus
            if need > have:
                raise ValueError(f"row {row.id} ({row.label}) needs {need} {what}, and this machine has {have}")

    def run(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        waiting = list(rows)
        try:
            while self._running or (waiting and not sweep.over):
                if not sweep.over:
                    waiting = self._start(sweep, waiting)
                waiting += self._reap(sweep)
                if self._running:
                    time.sleep(_POLL_S)
        finally:
            for running in self._running:  # after an error of our own
                running.node.kill()
                running.node.wait()
                running.log.close()
            self._running = []

    # ------------------------------------------------------------------------------------------------------- internals
    def _start(self, sweep: Sweep, waiting: Sequence[Row]) -> list[Row]:
        """Starts what there is room for; returns what is left. A row that another driver has is left to it."""
        left: list[Row] = []
        for row in waiting:
            devices = self._room(sweep, row)
            if devices is None or sweep.over:
                left.append(row)
            elif sweep.claim([row]):
                self._running.append(self._node(sweep, row, devices))
        return left

    def _node(self, sweep: Sweep, row: Row, devices: list[int]) -> _Running:
        sweep.begin(row)
        threads = {} if row.threads else {"OMP_NUM_THREADS": "1"}
        seen = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, devices))} if devices else {}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        env = {
            **os.environ,
            **threads,
            **seen,
            **sweep.environment(row),
            "PYTHONPATH": path,
            PARENT_PID: str(os.getpid()),
        }
        for name in _OF_A_WORKER:
            env.pop(name, None)
        log = tempfile.TemporaryFile(prefix="keel-sweep-")  # noqa: SIM115  # open as long as the node runs
        node = subprocess.Popen(
            [sys.executable, *sweep.job(row)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
        )
        return _Running(row, node, log, devices)

    def _reap(self, sweep: Sweep) -> list[Row]:
        """Tells the ends of rows; returns those that were interrupted and are to be done again."""
        again: list[Row] = []
        for running in list(self._running):
            if sweep.over and not running.told:
                running.told = True
                running.node.send_signal(signal.SIGKILL if sweep.claims.lost.is_set() else signal.SIGTERM)
            code = running.node.poll()
            if code is None:
                continue
            self._running.remove(running)
            said = _last_line(running.log) if code else ""
            running.log.close()
            if sweep.over and code not in (0, 2):  # a row that is told to save while it starts cannot say that it did
                sweep.release([running.row])
            elif sweep.end(running.row, 128 - code if code < 0 else code, said) is None:
                again.append(running.row)
        return again

    def _room(self, sweep: Sweep, row: Row) -> list[int] | None:
        """The devices that a row may use (none on the CPU); None while there is no room."""
        have, what = self._capacity(sweep, row)
        if what == "devices":
            used = {device for running in self._running for device in running.devices}
            free = [device for device in range(have) if device not in used]
            return free[: row.processes] if len(free) >= row.processes else None
        busy = sum(running.row.cpus for running in self._running)
        return [] if busy + row.cpus <= have else None

    def _capacity(self, sweep: Sweep, row: Row) -> tuple[int, str]:
        accelerator = row.values.get("resources.accelerator", sweep.table.start.resources.accelerator)
        if accelerator != "cpu":
            import torch

            count = torch.cuda.device_count()
            if count >= row.processes or accelerator == "cuda":
                return count, "devices"
        return self.cores, "cores"


def _last_line(log: Any) -> str:
    log.seek(0)
    lines = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""

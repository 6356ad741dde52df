"""Where a run's processes start: one job, one interface, one file per backend.

    launch(Job(args=("trainer", "fit", url), processes=2)) -> exit code

A backend starts `job.processes` workers `python -m <args>`, forwards SIGTERM and SIGINT to them, and returns one exit
code for the job (`EXIT_*`). Workers that were killed, hung or crashed are started again, `job.max_restarts` times; they
find the number and the cause in their environment (`RESTARTS`, `RESTART_CAUSE`). A worker that finds `PARENT_PID` in its environment ties its life to that process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_HANG = 76  # the watchdog ended the process
EXIT_REQUEUE = 75  # preempted after a save: start the run again and it continues

PARENT_PID = "KEEL_PARENT_PID"
RESTARTS, RESTART_CAUSE = "KEEL_RESTARTS", "KEEL_RESTART_CAUSE"

BACKENDS = {"local": "cluster.launch.local:launch"}


@dataclass(frozen=True)
class Job:
    """What to start on one machine.

    Attributes:
        args: the worker's command line after `python -m`.
        processes: number of workers.
        threads: OMP_NUM_THREADS of each worker; 0 = the variable if it is set, else the machine's cores shared out.
        env: added to the workers' environment.
        timeout_s: after this long the workers get SIGTERM, and `grace_s` later SIGKILL; None = no limit.
        grace_s: how long workers may take to save after a signal.
        max_restarts: how often workers are started again after one of them failed. Bad input, a requeue and an interrupt
            are no failures of that kind, and after a signal to the job nothing is started again.
        restart_wait_s: pause before the first restart; it doubles with each, up to a minute.
    """

    args: tuple[str, ...]
    processes: int = 1
    threads: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    grace_s: float = 300.0
    max_restarts: int = 0
    restart_wait_s: float = 0.5

    def __post_init__(self) -> None:
        if not self.args:
            raise ValueError("args=(): a job needs a command, such as ('trainer', 'fit', url)")
        if self.processes < 1:
            raise ValueError(f"processes={self.processes}: a job needs at least one process")
        if self.threads < 0:
            raise ValueError(f"threads={self.threads}: must be at least 1, or 0 to share the cores out")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts={self.max_restarts}: must be at least 0")

    @property
    def threads_per_process(self) -> int:
        """The resolved OMP_NUM_THREADS of each worker."""
        inherited = os.environ.get("OMP_NUM_THREADS", "")
        if self.threads:
            return self.threads
        if inherited.isdigit() and int(inherited) > 0:
            return int(inherited)
        return max(1, available_cores() // self.processes)


def available_cores() -> int:
    """The cores that this process may use (an affinity mask counts, unlike in `os.cpu_count`)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launch(job: Job, backend: str = "local") -> int:
    """Runs `job` to its end and returns its exit code.

    Raises:
        ValueError: unknown backend.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend}: unknown; one of {', '.join(sorted(BACKENDS))}")
    module, name = BACKENDS[backend].split(":")
    run: Callable[[Job], int] = getattr(importlib.import_module(module), name)
    return run(job)

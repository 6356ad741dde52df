"""Where a run's processes start: one job spec, one interface, one file per backend.

    launch(Job(args=("trainer", "fit", url), processes=2)) -> exit code, on this machine
    open_backend(cluster).submit(JobSpec(...)) -> job id, anywhere (see `cluster.launch.base`)

Every backend starts `python -m cluster.launch.node` once per node; that calls `launch`, which starts `job.processes`
workers `python -m <args>`, forwards SIGTERM and SIGINT to them, and returns one exit code for the job (`EXIT_*`).
Workers that were killed, hung, crashed or lost their store are started again, `job.max_restarts` times without progress in
between; they find the number and the cause in their environment (`RESTARTS`, `RESTART_CAUSE`). A worker that finds
`PARENT_PID` in its environment ties its life to that process.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_UNAVAILABLE = 69  # the store did not answer in time: a later start may succeed
EXIT_HANG = 76  # the watchdog ended the process
EXIT_LOST = 74  # the nodes did not meet, or lost each other
EXIT_REQUEUE = 75  # preempted after a save: start the run again and it continues
EXIT_INTERRUPTED = 130  # interrupted or cancelled after a save: nobody wants it started again

PARENT_PID = "KEEL_PARENT_PID"
WORKER_LOGS = "KEEL_WORKER_LOGS"  # folder of rank-<r>.log: where workers write when the job has an observer
RESTARTS, RESTART_CAUSE = "KEEL_RESTARTS", "KEEL_RESTART_CAUSE"

# Name -> "module:Class" (see `cluster.launch.base.Backend`).
BACKENDS = {
    "local": "cluster.launch.local_backend:Local",
    "kubernetes": "cluster.launch.kubernetes:Kubernetes",
    "ray": "cluster.launch.ray:Ray",
    "slurm": "cluster.launch.slurm:Slurm",
}


@dataclass(frozen=True)
class Group:
    """The nodes of a job, as one of them sees them.

    Attributes:
        endpoint: HOST:PORT where node 0 listens.
        node: number of this node; 0 listens.
        nodes, max_nodes: how many are needed, and how many may join.
        join_timeout_s: how long to wait for the others, at the start and after a failure.
        lost_s: a node that is silent for so long is lost.
    """

    endpoint: str
    node: int
    nodes: int
    max_nodes: int = 0
    join_timeout_s: float = 600.0
    lost_s: float = 30.0


@dataclass(frozen=True)
class Start:
    """One start of the workers: the `count`-th again (0: the first), after `cause`, as attempt `attempt` of the run; this
    node's ranks begin with `rank`, on `nodes` nodes."""

    count: int
    cause: str
    attempt: int
    rank: int
    nodes: int


class Observer:
    """What a node does beside its workers. With `logs`, workers write to files, below the folder `WORKER_LOGS`."""

    logs = True

    def attempt(self) -> int:
        """The number that the next start of the run will have, as this node knows it."""
        return 1

    def facts(self) -> dict[str, Any]:
        """What must be equal on all nodes, such as versions."""
        return {}

    def starting(self, start: Start) -> Mapping[str, str]:
        """Called before each start of the workers; returns variables for their environment: `WORKER_LOGS`, with `logs`."""
        return {}

    def stopped(self, cause: str) -> None:
        """Called when the workers have ended otherwise than well; they may be started again."""


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
        max_restarts: how often workers are started again after one of them failed, without progress in between. Bad input,
            a requeue and an interrupt are no failures of that kind, and after a signal to the job nothing is started again.
        progress: a number that grows with the progress of the job, such as the step of its newest commit; asked after a
            failure. An OSError tells nothing.
        restart_wait_s: pause before the first restart; it doubles with each without progress, up to a minute.
        group: the other nodes of the job; None when there is only this one.
        observer: learns of each start, and may have all workers write to files instead of this terminal.
    """

    args: tuple[str, ...]
    processes: int = 1
    threads: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None
    grace_s: float = 300.0
    max_restarts: int = 0
    progress: Callable[[], int] = lambda: 0
    restart_wait_s: float = 0.5
    group: Group | None = None
    observer: Observer | None = None

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
    def logged(self) -> bool:
        """Whether the workers write to files of the observer."""
        return self.observer is not None and self.observer.logs

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


def requeue_on_signal() -> None:
    """Until workers run, SIGTERM and SIGUSR1 end this process with the requeue code: nothing is lost."""
    if threading.current_thread() is not threading.main_thread():
        return
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, lambda number, frame: sys.exit(EXIT_REQUEUE))


def launch(job: Job) -> int:
    """Runs the workers of `job` on this machine to their end and returns the job's exit code."""
    from cluster.launch.local import launch as run

    return run(job)

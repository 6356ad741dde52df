"""Workers as processes of this machine.

Two or more run under torch elastic's agent, whose rendezvous store binds its own port (no race for a free one) and which
stops all workers when one fails. The agent runs in this process and starts the workers itself, so this process is their
parent: they can watch it, and no worker outlives it. Its log lines and its table of tracebacks are silenced: a worker
reports its own error, and the launcher adds one line where the worker could not.

Rank 0 writes to this terminal; the other ranks write to log files, removed when all goes well and named when not.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.launch import (
    EXIT_HANG,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_OK,
    EXIT_REQUEUE,
    EXIT_UNAVAILABLE,
    EXIT_USER_ERROR,
    PARENT_PID,
    RESTART_CAUSE,
    RESTARTS,
    WORKER_LOGS,
    Job,
    Start,
)
from cluster.launch.budget import Budget

# Without the current folder on the path: a user's own `trainer.py` there is not Keel's.
_MODULE = ("-P", "-m")
# Where a worker of an observed job writes: both streams in one file, appended to, and no process more.
_TO_FILE = ("/bin/sh", "-c", f'exec "$0" "$@" >>"${WORKER_LOGS}/rank-$RANK.log" 2>&1')
_ROOT = str(Path(__file__).resolve().parents[2])

_LONGEST_WAIT_S = 60.0
_NO_LIMIT = 1 << 30  # torch's own count of restarts knows nothing of progress
# A worker dies of these only before it has taken note of them, as the first thing that it does: nothing was lost.
_TOO_EARLY = (-signal.SIGTERM, -signal.SIGUSR1)

# Failures noticed this close together are one event: which of them is the cause is then told by their kind.
SIMULTANEOUS_S = 2


def launch(job: Job) -> int:
    """Runs `job` on this machine and returns its exit code: 0, or that of the worker that failed first (128 + signal
    number for a worker that was killed). Must be called from the main thread: it handles signals.

    Raises:
        meet.Lost: the nodes of the job's group did not meet, or lost each other.
        ValueError: they do not run the same versions.
    """
    return _launch_one(job) if job.processes == 1 and job.group is None else _launch_many(job)


def _launch_one(job: Job) -> int:
    # Port 0: the only rank binds a free port and knows it, so there is no port to agree on.
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    started: list[int] = []
    fixed = {**_worker_environment(job), **ranks, **rendezvous, **_no_restart()}
    with _environment(fixed), _signals(job, lambda: started) as restarts:
        while True:
            _observe(job, restarts, [])
            worker = subprocess.Popen(_command(job), start_new_session=True)
            started[:] = [worker.pid]
            raw = worker.wait()
            started.clear()
            code = _shell_code(raw)
            if code == EXIT_OK or not restarts.again(raw, f"the worker {_how(raw)}"):
                break
    if restarts.between:
        return EXIT_REQUEUE
    if code > 128 and code != EXIT_INTERRUPTED:
        _say(f"the worker was killed by {_signal_name(code - 128)}")
    return code


def _launch_many(job: Job) -> int:
    # elastic is heavy to import (torch) and not needed for one process.
    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError

    from cluster.launch import meet
    from cluster.launch.agent import Agent, failures

    _silence("torch.distributed.elastic")
    logs = tempfile.mkdtemp(prefix="keel-ranks-")
    # The agent's own handling of these signals would lose the workers' exit codes; ours forwards them instead.
    environment = {**_worker_environment(job), **_no_restart(), "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT"}
    agent: Agent | None = None

    def workers() -> list[int]:
        group = agent.get_worker_group().workers if agent else []
        return [worker.id for worker in group if isinstance(worker.id, int)]

    with _environment(environment), _signals(job, workers) as restarts:

        def again(failed: dict[int, tuple[int, float]]) -> bool:
            rank, code = first_failure(failed)
            return restarts.again(code, f"rank {rank} {_how(code)}")

        while True:
            rendezvous, address = meet.rendezvous(job.group)
            command = _command(job)
            spec = WorkerSpec(
                role="keel",
                local_world_size=job.processes,
                entrypoint=command[0],
                args=tuple(command[1:]),
                rdzv_handler=rendezvous,
                max_restarts=_NO_LIMIT,
                monitor_interval=0.1,
                local_addr=address,
            )
            others = dict.fromkeys(range(1, job.processes), Std.ALL) if not job.logged else Std.NONE
            agent = Agent(
                spec=spec,
                logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=others),
                start_method="spawn",
                again=again,
                changed=lambda: restarts.counted(meet.CHANGED),
                note=lambda: {**restarts.note(), **meet.note(job)},
                starting=lambda notes, group: _observe(job, restarts, notes, group),
            )
            failed: dict[int, tuple[int, float]] = {}
            try:
                with meet.errors(job.group):
                    result = agent.run()
                failed = failures(result) if result.is_failed() else {}
            except meet.Closed:  # another node has ended the job; this one knows why if its workers failed, too
                failed = agent.last or {0: (EXIT_LOST, 0.0)}
            except RendezvousConnectionError:
                meet.leave(rendezvous)
                if restarts.again(EXIT_LOST, "the connection to node 0 was lost"):
                    continue
                raise meet.Lost("the connection to node 0 was lost") from None
            rendezvous.shutdown()
            break
    if restarts.between:
        failed = {0: (EXIT_REQUEUE, 0.0)}
    written = os.environ[WORKER_LOGS] if job.logged else logs
    code = _report(failed, Path(written), restarts.count) if failed else EXIT_OK
    if code in (EXIT_OK, EXIT_REQUEUE, EXIT_UNAVAILABLE, EXIT_USER_ERROR, EXIT_INTERRUPTED):
        shutil.rmtree(logs, ignore_errors=True)
    return code


def _command(job: Job) -> list[str]:
    worker = [sys.executable, *_MODULE, *job.args]
    return [*_TO_FILE, *worker] if job.logged else worker


def _observe(job: Job, restarts: _Restarts, notes: list[dict[str, Any]], group: Any = None) -> None:
    """Before each start: what the nodes agree on, and what the observer wants the workers to know."""
    from cluster.launch import meet

    rank = group.workers[0].global_rank if group is not None else 0
    attempt = meet.agree(restarts, notes) if notes else job.observer.attempt() if job.observer else 1
    if job.observer is not None:
        start = Start(restarts.count, restarts.cause, attempt, rank, max(1, len(notes)))
        os.environ.update(job.observer.starting(start))


@dataclass
class _Restarts:
    """How often a job's workers were started again, and whether they may be once more."""

    job: Job
    count: int = 0
    cause: str = ""
    over: bool = False  # the job was told to end
    between: bool = False  # ... while no worker ran, since one had failed before

    def __post_init__(self) -> None:
        self.budget = Budget(self.job.max_restarts, self.job.progress)

    def note(self) -> dict[str, Any]:
        """What the other nodes should know of the restarts so far."""
        return {"count": self.count, "cause": self.cause}

    def counted(self, cause: str, count: int | None = None) -> None:
        """Counts one more restart, or takes over the `count` of other nodes."""
        self.count, self.cause = self.count + 1 if count is None else count, cause
        os.environ.update({RESTARTS: str(self.count), RESTART_CAUSE: cause})

    def again(self, code: int, cause: str) -> bool:
        """Whether to start once more after a failure with `code`; returns when it is time to."""
        if self.job.observer is not None:
            self.job.observer.stopped(cause)
        final = code in (EXIT_USER_ERROR, EXIT_REQUEUE, EXIT_INTERRUPTED, -signal.SIGINT, *_TOO_EARLY)
        if self.over or final or not self.job.max_restarts:
            return False
        used = self.budget.used(self.count)
        if self.over or used >= self.job.max_restarts:
            return False
        start = time.monotonic() + min(self.job.restart_wait_s * 2.0**used, _LONGEST_WAIT_S)
        self.counted(cause)
        count = f"restart {used + 1} of {self.job.max_restarts} without a new commit"
        print(f"keel: warning: {cause}; starting again from the last commit ({count})", file=sys.stderr, flush=True)
        while not self.over and time.monotonic() < start:
            time.sleep(0.05)
        self.between = self.over
        return not self.over


def _no_restart() -> dict[str, str]:
    return {RESTARTS: "0", RESTART_CAUSE: ""}


def first_failure(failures: dict[int, tuple[int, float]]) -> tuple[int, int]:
    """(rank, exit code) of the failure that caused the others. `failures`: rank -> (exit code, time noticed), in the
    order in which they were noticed.

    When a worker dies its peers fail within moments, on a broken connection or on the agent's SIGTERM. So of those
    noticed together a hang comes first (a stopped rank is killed after it), then a death by any other signal, then what a
    rank says itself: bad input, a store that is away, a requeue; then an ordinary failure.
    """

    def kind(code: int) -> int:
        if code < 0:
            return 5 if code == -signal.SIGTERM else 0
        own = {EXIT_HANG: -1, EXIT_USER_ERROR: 1, EXIT_UNAVAILABLE: 2, EXIT_REQUEUE: 3, EXIT_INTERRUPTED: 3}
        return own.get(code, 4)

    start = min(when for _, when in failures.values())
    early = {rank: code for rank, (code, when) in failures.items() if when - start <= SIMULTANEOUS_S}
    rank = min(early, key=lambda r: kind(early[r]))  # of equals the one noticed first
    return rank, early[rank]


def _report(failures: dict[int, tuple[int, float]], logs: Path, attempt: int = 0) -> int:
    """Says in one line what rank 0 could not say on this terminal, and returns the job's exit code."""
    rank, raw = first_failure(failures)
    code = _shell_code(raw)
    found = [*logs.glob(f"rank-{rank}.log"), *logs.glob(f"*/attempt_{attempt}/{rank}/stderr.log")]
    log = found[0] if found else None
    if code in (EXIT_USER_ERROR, EXIT_UNAVAILABLE):
        spoken = failures.get(0, (None, 0.0))[0] == code
        line = _last_line(log, starting="keel: error:")
        if line and not spoken:
            print(line, file=sys.stderr)
    elif code not in (EXIT_REQUEUE, EXIT_INTERRUPTED):
        last = _last_line(log)
        _say(f"rank {rank} {_how(raw)}" + (f": {last}" if last else "") + (f" (log: {log})" if log else ""))
    return code


def _last_line(path: Path | None, starting: str = "") -> str:
    if path is None:
        return ""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.strip() and line.startswith(starting)), "")


def _worker_environment(job: Job) -> dict[str, str]:
    # Set in this process for as long as workers start: the agent copies this process's environment.
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    fixed = {"OMP_NUM_THREADS": str(job.threads_per_process), PARENT_PID: str(os.getpid()), "PYTHONPATH": path}
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        # gloo would else look its host name up, which may not resolve: one machine talks over loopback, several over the
        # interface by which they reach node 0.
        interface = "lo"
        if job.group is not None:
            from cluster.launch.agent import interface_of, local_address

            interface = interface_of(local_address(job.group.endpoint))
        if interface:
            fixed["GLOO_SOCKET_IFNAME"] = interface
    return {**fixed, **job.env}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextmanager
def _signals(job: Job, workers: Callable[[], Iterable[int]]) -> Iterator[_Restarts]:
    """Forwards SIGTERM, SIGUSR1 and SIGINT to the workers; a second SIGINT kills them. Applies the job's time limit."""
    interrupts = 0
    restarts = _Restarts(job)

    def send(signum: int) -> bool:
        restarts.over = True
        pids = list(workers())
        for pid in pids:
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                continue
        return bool(pids)

    def forward(signum: int, _: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += signum == signal.SIGINT
        if not send(signal.SIGKILL if interrupts > 1 else signum):
            # No worker runs that could save: nothing is lost.
            raise SystemExit(EXIT_INTERRUPTED if signum == signal.SIGINT else EXIT_REQUEUE)

    timers: list[threading.Timer] = []
    if job.timeout_s is not None:
        timers.append(threading.Timer(job.timeout_s, send, [signal.SIGTERM]))
        timers.append(threading.Timer(job.timeout_s + job.grace_s, send, [signal.SIGKILL]))
    handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before: dict[signal.Signals, Any] = {signum: signal.signal(signum, forward) for signum in handled}
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield restarts
    finally:
        for timer in timers:
            timer.cancel()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _silence(name: str) -> None:
    logger = logging.getLogger(name)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())


def _shell_code(code: int) -> int:
    if code in _TOO_EARLY:
        return EXIT_REQUEUE
    return 128 - code if code < 0 else code


def _how(raw: int) -> str:
    """How a process ended, by its exit code as `subprocess` gives it."""
    if raw in (EXIT_HANG, EXIT_UNAVAILABLE):
        return "hung" if raw == EXIT_HANG else "could not reach its store"
    return f"was killed by {_signal_name(-raw)}" if raw < 0 else f"failed with exit code {raw}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(message: str) -> None:
    print(f"keel: error: {message}", file=sys.stderr, flush=True)

"""What watches over a job on this machine: it starts the nodes, starts them again after a preemption, and keeps the order
of jobs that wait for others.

    python -m cluster.launch.supervisor FOLDER
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO

from cluster.launch import EXIT_LOST, EXIT_OK, EXIT_REQUEUE, EXIT_UNAVAILABLE, PARENT_PID, cluster_config
from cluster.launch.budget import Budget, newest_commit
from cluster.launch.entry import JOB_ID
from cluster.launch.local_backend import CANCEL, JOB, PID, STARTED, Local, of_task, outcome, started_at
from cluster.launch.spec import INDEX, JobSpec, from_dict, passed

_POLL_S = 0.1
_OTHERS_S = 30.0  # how long the other nodes may take to end by themselves when one has ended otherwise than well


class Task:
    """The nodes of one task."""

    def __init__(self, local: Local, spec: JobSpec, index: int | None, folder: Path, foreground: bool) -> None:
        self.local, self.spec, self.index, self.folder, self.foreground = local, spec, index, folder, foreground
        self.code: int | None = None
        self.place = 0  # among those that run at once
        url = spec.run_url if index is None else spec.run_url.replace(INDEX, str(index))
        self._losses, self._budget = 0, Budget(spec.retries, lambda: newest_commit(url))
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._first_end = 0.0
        self._first_code: int | None = None
        self._stopping = False  # the other nodes were told to end
        self._cancelled = False

    def start(self) -> None:
        """Starts all nodes."""
        port = self.local.cluster.rendezvous.port or _free_port()
        own = {JOB_ID: self.folder.name, PARENT_PID: str(os.getpid())}
        self._nodes, self._first_code, self._stopping = [], None, False
        for node in range(self.spec.nodes):
            env = {**os.environ, **self.local.environment(self.spec, node, port, self.index, self.place), **own}
            with self._output(node) as out:
                self._nodes.append(
                    subprocess.Popen(
                        self._command(),
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=None if out is None else subprocess.STDOUT,
                        start_new_session=True,
                        env=env,
                    )
                )

    def _command(self) -> list[str]:
        words = self.local.command(self.spec)
        if not self.local.cluster.setup:
            return words
        return ["/bin/bash", "-c", "\n".join([*self.local.cluster.setup, 'exec "$0" "$@"']), *words]

    def _output(self, node: int) -> contextlib.AbstractContextManager[IO[bytes] | None]:
        if self.foreground and self.index is None:
            return contextlib.nullcontext(None)
        return open(self.folder / f"task-{self.index or 0:05d}-node-{node}.log", "ab")

    def send(self, signum: int) -> None:
        """A signal to all nodes."""
        for node in self._nodes:
            if node.poll() is None:
                node.send_signal(signum)

    def cancelled(self) -> bool:
        """Whether this task alone was cancelled; its nodes are told once."""
        if not self._cancelled and (self.folder / f"{CANCEL}-{self.index}").exists():
            self._cancelled = True
            self.send(signal.SIGTERM)
        return self._cancelled

    def poll(self, ending: bool) -> bool:
        """Whether the task is over; `code` is then its exit code. `ending`: nothing is to be started again."""
        codes = [node.poll() for node in self._nodes]
        bad = [code for code in codes if code]
        if bad and self._first_code is None:
            self._first_code, self._first_end = bad[0], time.monotonic()
        if None in codes:
            waited = time.monotonic() - self._first_end
            if bad and waited > _OTHERS_S + self.local.cluster.grace_s:
                self.send(signal.SIGKILL)
            elif bad and waited > _OTHERS_S and not self._stopping:
                self._stopping = True
                self.send(signal.SIGTERM)
            return False
        code = self._first_code or EXIT_OK
        lost = code < 0 or code in (EXIT_LOST, EXIT_UNAVAILABLE)
        again = code == EXIT_REQUEUE and self.spec.requeue
        if lost and not ending and self.spec.retries:
            again = self._budget.used(self._losses) < self.spec.retries
        if not ending and again:
            self._losses += lost
            self._say(f"the node ended with {code}; starting it again")
            self.start()
            return False
        self.code = 128 - code if code < 0 else code
        return True

    def _say(self, line: str) -> None:
        task = "" if self.index is None else f"task {self.index}: "
        print(f"keel: warning: {task}{line}", file=sys.stderr, flush=True)


def supervise(folder: Path, *, foreground: bool = False) -> int:
    """Runs the job in `folder` to its end and returns its exit code: 0, or that of the first task that failed.

    Must be called from the main thread: SIGTERM, SIGUSR1 and SIGINT go to the nodes, and then nothing is started again.
    """
    raw = json.loads((folder / JOB).read_text())
    spec, cluster = from_dict(raw["spec"]), cluster_config.load(raw["cluster"])
    local = Local(cluster)
    running: list[Task] = []
    told = 0

    def tell(signum: int, _: FrameType | None) -> None:
        nonlocal told
        told += 1
        for task in running:
            task.send(signal.SIGKILL if told > 1 and signum == signal.SIGINT else signum)

    before = {signum: signal.signal(signum, tell) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    me = os.getpid()
    part = folder / f"{PID}.part"
    part.write_text(json.dumps({"pid": me, "ticks": started_at(me)}))
    part.rename(folder / PID)
    state, code, reason = "failed", 1, "the supervisor failed"
    try:
        passed(spec, os.environ)
        code, reason = _after(local, spec, lambda: bool(told))
        if code == EXIT_OK:
            (folder / STARTED).touch()
            indices: list[int | None] = list(range(spec.array)) if spec.array else [None]
            waiting = [Task(local, spec, index, folder, foreground) for index in indices]
            code, reason = _run(waiting, running, local.options.parallel, lambda: bool(told))
        state = _state(code, bool(told) or (folder / CANCEL).exists())
    except ValueError as error:
        print(f"keel: error: {error}", file=sys.stderr)
        code, reason = 2, str(error)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        outcome(folder, state, code, reason)
    return code


def _state(code: int | None, told: bool) -> str:
    return "done" if code == EXIT_OK else "cancelled" if told else "failed"


def _after(local: Local, spec: JobSpec, told: Callable[[], bool]) -> tuple[int, str]:
    for job in spec.after:
        while (state := local.state(job)) in ("queued", "running"):
            if told():
                return EXIT_REQUEUE, "cancelled before it started"
            time.sleep(_POLL_S)
        if state != "done":
            reason = f"job {job}, which this one comes after, is {state}"
            print(f"keel: error: {reason}", file=sys.stderr, flush=True)
            return 1, reason
    return EXIT_OK, ""


def _run(waiting: list[Task], running: list[Task], parallel: int, told: Callable[[], bool]) -> tuple[int, str]:
    ended: list[Task] = []
    while running or (waiting and not told()):
        while waiting and len(running) < parallel and not told():
            task = waiting.pop(0)
            task.place = min(set(range(parallel)) - {other.place for other in running})
            running.append(task)
            task.start()
            (task.folder / of_task(STARTED, task.index)).touch()
        for task in list(running):
            if task.poll(ending := told() or task.cancelled()):
                running.remove(task)
                ended.append(task)
                if task.index is not None:
                    outcome(task.folder, _state(task.code, ending), task.code or EXIT_OK, "", task.index)
        time.sleep(_POLL_S)
    if waiting:
        return EXIT_REQUEUE, f"cancelled with {len(waiting)} tasks not started"
    bad = [task for task in ended if task.code]
    if not bad:
        return EXIT_OK, "done"
    name = "the job" if bad[0].index is None else f"task {bad[0].index}"
    return bad[0].code or 1, f"{name} ended with exit code {bad[0].code}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(supervise(Path(sys.argv[1])))

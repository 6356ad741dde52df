"""Processes that share one import: what `faults.py` starts many hundred times costs seconds each only for its imports.

A launcher is forked by the bench from a process that has imported everything, and forks, before it has any thread, a
parent for its workers, which forks them when the launcher starts one. Otherwise they are processes like those that
they stand for: with their own session, environment, output and exit code, hit by real signals under their own process id;
and they end with their launcher.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PRELOAD = [
    "scripts.bench.faults_worker",
    "trainer.run",
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "s3fs",
]


class Nursery:
    """The parent of the workers of this process; made while it has one thread.

    Args:
        work: called in each new process with its command line; returns its exit code.
    """

    def __init__(self, work: Callable[[list[str]], int]) -> None:
        self._socket, theirs = socket.socketpair()
        launcher = os.getpid()
        if os.fork() == 0:
            self._socket.close()
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() == launcher:
                _serve(theirs, work)
            os._exit(0)
        theirs.close()

    def start(
        self,
        args: Sequence[str],
        env: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        start_new_session: bool = True,
    ) -> Forked:
        """As `subprocess.Popen`."""
        reading, writing = os.pipe()
        fds = [1 if stdout is None else stdout.fileno(), 2 if stderr is None else stderr.fileno(), writing]
        request = json.dumps([list(args), dict(os.environ if env is None else env)]).encode()
        socket.send_fds(self._socket, [len(request).to_bytes(4, "little")], fds)
        self._socket.sendall(request)
        pid = int.from_bytes(_receive(self._socket, 4), "little")
        os.close(writing)
        return Forked(list(args), pid, reading)


class Forked:
    """A process started by a `Nursery`; the part of `subprocess.Popen` that launchers use."""

    def __init__(self, args: list[str], pid: int, status: int) -> None:
        self.args, self.pid, self._status = args, pid, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            raw = os.read(self._status, 4)
            os.close(self._status)
            self.returncode = int.from_bytes(raw, "little", signed=True) if raw else -signal.SIGKILL
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if end is not None and time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)


def launcher(folder: str, extra: list[str], environment: dict[str, str]) -> None:
    """What a forked launcher does, in place of `python -m scripts.bench.faults_worker launch`."""
    from scripts.bench import faults_worker

    os.setsid()
    _become(environment)
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    nursery = Nursery(_worker)
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    from cluster.launch import local

    local.subprocess.Popen = subprocess_handler.Popen = nursery.start  # type: ignore[assignment, misc]
    try:
        code = faults_worker.launch(Path(folder), extra)
    except SystemExit as ended:
        code = int(str(ended.code))
    os._exit(code)


def _worker(words: list[str]) -> int:
    from scripts.bench import faults_worker

    sys.argv = words[words.index("-m") + 1 :]
    return faults_worker.fit()


def _become(environment: dict[str, str]) -> None:
    from fsspec.config import conf, set_conf_env

    os.environ.clear()
    os.environ.update(environment)
    conf.clear()
    set_conf_env(conf)  # it is read at the import otherwise


def _serve(requests: socket.socket, work: Callable[[list[str]], int]) -> None:
    """Forks a process for each request; tells how each ended. Returns when nobody asks any more."""
    running: dict[int, int] = {}
    while True:
        if select.select([requests], [], [], 0.01)[0]:
            size, fds, _, _ = socket.recv_fds(requests, 4, 3)
            if not size:
                for pid in running:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return
            args, environment = json.loads(_receive(requests, int.from_bytes(size, "little")))
            parent = os.getpid()
            pid = os.fork()
            if pid == 0:
                _child(requests, fds, args, environment, parent, work)
            os.close(fds[0])
            os.close(fds[1])
            running[pid] = fds[2]
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(BrokenPipeError):
                    os.write(running[pid], code.to_bytes(4, "little", signed=True))
                os.close(running.pop(pid))


def _child(
    answers: socket.socket,
    fds: Sequence[int],
    args: list[str],
    environment: dict[str, str],
    parent: int,
    work: Callable[[list[str]], int],
) -> None:
    code = 1
    try:
        os.setsid()
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        for fd in fds:
            os.close(fd)
        answers.sendall(os.getpid().to_bytes(4, "little"))
        answers.close()
        _become(environment | {"KEEL_PARENT_PID": str(parent)})
        code = work(args)
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _receive(source: socket.socket, count: int) -> bytes:
    raw = b""
    while len(raw) < count:
        part = source.recv(count - len(raw))
        if not part:
            raise ConnectionError("the parent of the workers is gone")
        raw += part
    return raw

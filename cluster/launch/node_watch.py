"""What a node tells the store while it runs: `status/node-<k>.json` every few seconds, and the workers' logs."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cluster.launch import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_REQUEUE,
    EXIT_UNAVAILABLE,
    EXIT_USER_ERROR,
    WORKER_LOGS,
    Observer,
    Start,
)
from datamodules.store import Store, StoreError
from trainer.status import requested

# A log is one object, sent again as it grows: while the run goes on its end must do.
_LIVE_BYTES, _FINAL_BYTES = 1 << 20, 64 << 20
_PACKAGES = ("torch", "lightning", "numpy", "fsspec", "s3fs")

_REASONS = {
    EXIT_OK: "done",
    EXIT_REQUEUE: "preempted after a save",
    EXIT_INTERRUPTED: "interrupted after a save",
}

# Phases of a node: it comes up, waits for the other nodes, runs workers, starts them again, has ended.
STARTING, WAITING, RUNNING, RESTARTING, ENDED = "starting", "waiting", "running", "restarting", "ended"


class NodeWatch(Observer):
    """Heartbeats and logs of one node, by a thread of its own. A store that fails for a while does not end the run.

    Args:
        store: the run's URL.
        node: number of the node.
        folder: where workers write their logs, on a local disk; None: to the terminal, and the store gets none.
        heartbeat_s: seconds between two writes of the status and of the logs that have grown.
        together: whether the job has other nodes.
    """

    def __init__(self, store: Store, node: int, folder: str | None, heartbeat_s: float, *, together: bool) -> None:
        self.store, self.node, self.heartbeat_s = store, node, heartbeat_s
        self.folder, self.logs = Path(folder or os.devnull), folder is not None
        self.together = together
        self.cause = ""
        self.cancelled = False  # while no worker ran
        self._state: dict[str, Any] = {
            "node": node,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job_id": os.environ.get("KEEL_JOB"),
            "heartbeat_s": heartbeat_s,
            "phase": STARTING,
            "started": time.time(),
            "start": 0,
            "attempt": None,
            "cause": None,
            "exit_code": None,
            "reason": None,
        }
        self._sent: dict[Path, int] = {}
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._echo: Path | None = None
        self._echoed = 0
        self._complained = False
        self._threads: list[threading.Thread] = []

    # -------------------------------------------------------------------------------------------------------- observer
    def attempt(self) -> int:
        from trainer.records import next_attempt

        with contextlib.suppress(StoreError):
            return next_attempt(self.store)
        return int(self._state["attempt"] or 0) + 1

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = {"python": platform.python_version(), "keel code": code_version()}
        for package in _PACKAGES:
            with contextlib.suppress(PackageNotFoundError):
                found[package] = version(package)
        return found

    def starting(self, start: Start) -> Mapping[str, str]:
        logs = self.folder / f"attempt-{start.attempt}"
        if self.logs:
            logs.mkdir(parents=True, exist_ok=True)
            self.echo(logs / "rank-0.log" if start.rank == 0 else None)
        self.say(phase=RUNNING, start=start.count, attempt=start.attempt, nodes=start.nodes, cause=start.cause or None)
        return {WORKER_LOGS: str(logs)} if self.logs else {}

    def stopped(self, cause: str) -> None:
        self.cause = cause
        self.say(phase=RESTARTING, cause=cause)

    # ------------------------------------------------------------------------------------------------------------ life
    def open(self) -> None:
        """Writes the first status; starts the threads.

        Raises:
            StoreError: this node cannot write to the run's store.
        """
        if self.together:
            self._state["phase"] = WAITING
        self._write()
        for work in (self._beat, self._follow) if self.logs else (self._beat,):
            self._threads.append(threading.Thread(target=work, name=f"keel-node-{work.__name__}", daemon=True))
            self._threads[-1].start()

    def say(self, **changes: Any) -> None:
        """Changes the status and sends it soon."""
        with self._lock:
            self._state |= changes
        self._stir()

    def close(self, exit_code: int, reason: str) -> None:
        """Sends the rest of the logs and the last status."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._tail()
        with self._lock:
            self._state |= {"phase": ENDED, "exit_code": exit_code, "reason": reason}
        self._try(self._send_logs, _FINAL_BYTES)
        self._try(self._write)

    def reason(self, code: int) -> str:
        """How the workers ended, in a few words."""
        told = self.error()
        if code in (EXIT_USER_ERROR, EXIT_UNAVAILABLE) and told:
            return told
        if code == EXIT_INTERRUPTED and requested(self.store):
            return "cancelled" if self.cancelled else "cancelled after a save"
        return _REASONS.get(code) or ": ".join(filter(None, [self.cause or f"exit code {code}", told]))

    def error(self) -> str:
        """The last line that a worker of this node gave as its error, without `keel: error:`; "" if none did."""
        folder = self.folder / f"attempt-{self._state['attempt']}"
        for log in sorted(folder.glob("rank-*.log")):
            for line in reversed(_end(log, 1 << 16).decode(errors="replace").splitlines()):
                if line.startswith("keel: error:"):
                    return line.removeprefix("keel: error:").strip()
        return ""

    # --------------------------------------------------------------------------------------------------------- threads
    def _stir(self) -> None:
        self._try(self._write)

    def _beat(self) -> None:
        while not self._stop.wait(self.heartbeat_s):
            self._try(self._write)
            self._try(self._send_logs, _LIVE_BYTES)
            # Workers that run obey for themselves, once they have saved.
            if not self.cancelled and self._state["phase"] != RUNNING and requested(self.store):
                self.cancelled = True
                os.kill(os.getpid(), signal.SIGTERM)

    def _write(self) -> None:
        with self._lock:
            status = self._state | {"time": time.time()} | _machine()
        self.store.write_json(f"status/node-{self.node}.json", status)

    def _send_logs(self, most: int) -> None:
        # An attempt's last lines before the next one's first: whoever follows goes on to that when it is there.
        for log in sorted(self.folder.glob("attempt-*/rank-*.log"), key=_age):
            length = log.stat().st_size
            if self._sent.get(log) != length or (most == _FINAL_BYTES and length > _LIVE_BYTES):
                self.store.write(f"logs/{log.parent.name}/node-{self.node}/{log.name}", _end(log, most))
                self._sent[log] = length

    def _try(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
            self._complained = False
        except OSError as error:
            if not self._complained:
                line = " ".join(str(error).split())
                print(f"keel: warning: node {self.node} cannot tell how it fares: {line}", file=sys.stderr, flush=True)
            self._complained = True

    # ------------------------------------------------------------------------------------------------------------ echo
    def echo(self, log: Path | None) -> None:
        """From now on, what is appended to `log` goes to this terminal, too."""
        self._tail()
        with self._lock:
            self._echo, self._echoed = log, 0

    def _follow(self) -> None:
        while not self._stop.wait(0.2):
            self._tail()

    def _tail(self) -> None:
        with self._lock:
            if self._echo is None or not self._echo.exists():
                return
            with self._echo.open("rb") as file:
                file.seek(self._echoed)
                new = file.read()
            self._echoed += len(new)
            sys.stdout.write(new.decode(errors="replace"))
            sys.stdout.flush()


def _machine() -> dict[str, Any]:
    """Memory in bytes and the load of this machine."""
    memory: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            memory[name] = int(value.split()[0]) * 1024
    return {
        "memory_bytes": memory.get("MemTotal"),
        "memory_available_bytes": memory.get("MemAvailable"),
        "load": os.getloadavg()[0],
    }


def _age(log: Path) -> tuple[int, str]:
    return int(log.parent.name.rpartition("-")[2]), log.name


def code_version() -> str:
    """What tells two states of the code apart: the digest of the snapshot that it lies in, else its version."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".keel-snapshot.json").is_file():
        return root.name[:12]
    with contextlib.suppress(PackageNotFoundError):
        return version("keel")
    return "unknown"


def _end(log: Path, most: int) -> bytes:
    with log.open("rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - most))
        data = file.read(most)
    left_out = length - len(data)
    return f"[{left_out} bytes before this are left out]\n".encode() + data if left_out > 0 else data

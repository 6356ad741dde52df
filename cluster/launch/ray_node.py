"""One node of a job on Ray: an actor that runs the node entry on its bundle and tells the driver how it fares.

Ray carries this class by value, and a worker of Ray need not have Keel: only the standard library, and Ray.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping

# (exit code or None while it runs, lines printed since it was last asked)
Told = tuple[int | None, list[str]]

_MOST_LINES = 10_000


class NodeHost:
    """Runs one process at a time. All methods return soon."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._lines: collections.deque[str] = collections.deque(maxlen=_MOST_LINES)

    def where(self, port: int) -> tuple[str, int, str]:
        """(address of this node as others reach it, `port` or else a free one, Ray's id of the node)"""
        import ray

        if not port:
            with socket.socket() as probe:
                probe.bind(("", 0))
                port = int(probe.getsockname()[1])
        return str(ray.util.get_node_ip_address()), port, str(ray.get_runtime_context().get_node_id())

    def start(self, words: list[str], setup: list[str], variables: Mapping[str, str]) -> Told:
        """Starts the node entry, with `variables` besides those of this process; its life is tied to that of this actor."""
        environment = {**os.environ, **variables, "KEEL_PARENT_PID": str(os.getpid())}
        # `python` is that of Ray's own workers, unless a set-up says otherwise.
        path = [os.path.dirname(sys.executable), environment.get("PATH", os.defpath)]
        environment["PATH"] = os.pathsep.join(path)
        command = ["/bin/bash", "-c", "\n".join([*setup, 'exec "$0" "$@"']), *words] if setup else words
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=environment,
        )
        self._reader = threading.Thread(target=self._read, args=[self._process], daemon=True)
        self._reader.start()
        return self.poll()

    def poll(self) -> Told:
        """How the node entry fares."""
        code = None if self._process is None else self._process.poll()
        if code is not None and self._reader is not None:
            self._reader.join(5)  # what it has left may hold its output open
        lines = []
        with contextlib.suppress(IndexError):
            while True:
                lines.append(self._lines.popleft())
        return code, lines

    def signal(self, signum: int) -> None:
        """Sends a signal to the node entry, if it runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signum)

    def stop(self, seconds: float) -> Told:
        """Ends the node entry: politely, and after `seconds` by force."""
        self.signal(signal.SIGTERM)
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        return self.poll()

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in process.stdout:
                self._lines.append(line.rstrip("\n"))

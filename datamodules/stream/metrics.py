"""Counters of a stream, also of what worker processes read for it."""

from __future__ import annotations

import os
import struct
import threading
import weakref
from contextlib import suppress
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import DupFd
from typing import Any

SENT = ("batches", "samples", "fetched", "used", "hits", "misses")  # of a worker to its parent
_RECORD = struct.Struct(f"={len(SENT)}q")  # far below PIPE_BUF: each write is whole or not at all


class Metrics:
    """Counters of a stream since it was made; ``snapshot`` copies them. Thread-safe.

    ``fetched``: bytes that came from the store, shard indices included; ``used``: bytes of the samples of the batches made,
    in the type that they are stored in and before compression; ``wait``: seconds that the consumer waited for a batch;
    ``hits`` and ``misses``: cached shards opened and downloaded.

    Worker processes of a ``DataLoader`` send what they count, but for ``wait``, through a pipe: the snapshot of the process
    that made the loader has it all, up to what a worker counted after its last batch. A copy counts from zero.
    """

    def __init__(self) -> None:
        self.batches = self.samples = self.fetched = self.used = self.hits = self.misses = 0
        self.wait = 0.0
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._inbox, self._outbox = os.pipe()  # now: a loader forks its workers without asking
        for end in (self._inbox, self._outbox):
            os.set_blocking(end, False)
            weakref.finalize(self, os.close, end).atexit = False
        self._parent: int | None = None
        self._sent = [0] * len(SENT)

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)
            if self._parent is not None:
                self._send(self._parent)

    def snapshot(self) -> dict[str, float]:
        """All counters, with those of worker processes up to now."""
        with self._lock:
            if os.getpid() == self._process:
                self._receive()
            return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def report_to(self, parent: Metrics) -> None:
        """From now on send to the process that made ``parent``, from which this one was forked."""
        self._follow(os.dup(parent._outbox))

    def _follow(self, outbox: int) -> None:
        self._parent = outbox
        weakref.finalize(self, os.close, outbox).atexit = False

    def _send(self, outbox: int) -> None:
        now = [int(getattr(self, name)) for name in SENT]
        with suppress(OSError):  # full: next time, all together; or the parent is gone
            os.write(outbox, _RECORD.pack(*(a - b for a, b in zip(now, self._sent, strict=True))))
            self._sent = now

    def _receive(self) -> None:
        with suppress(BlockingIOError):
            while data := os.read(self._inbox, 512 * _RECORD.size):
                for amounts in _RECORD.iter_unpack(data):
                    for name, amount in zip(SENT, amounts, strict=True):
                        setattr(self, name, getattr(self, name) + amount)

    def __getstate__(self) -> dict[str, Any]:
        # Without the lock, which a thread of the parent may have held when this process was forked.
        return {} if get_spawning_popen() is None else {"outbox": DupFd(self._outbox)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Metrics.__init__(self)
        if "outbox" in state:
            self._follow(state["outbox"].detach())

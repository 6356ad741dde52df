"""Open files that several threads read by position."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property

OPEN_FILES = 128
OPEN_SECONDS = (
    5.0  # after that a file is opened anew: a cached shard is marked as used, an evicted one lets go of its disk
)


class Scratch(threading.local):
    """A buffer per thread that grows to the largest read: fresh memory for each read costs more than the read."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def view(self, size: int) -> memoryview:
        if len(self.buffer) < size:
            self.buffer = bytearray(size)
        return memoryview(self.buffer)[:size]


class File:
    """A file descriptor that is closed when nobody holds this object any more.

    ``verified``: this process has just written the file from bytes whose checksum was right.
    """

    def __init__(self, descriptor: int, verified: bool = False) -> None:
        self.descriptor, self.verified = descriptor, verified

    @classmethod
    def open(cls, path: str) -> File | None:
        """The file at ``path`` for reading; ``None`` if that fails."""
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return None

    @cached_property
    def identity(self) -> tuple[int, ...]:
        """Device, inode and size: another file under the same name has another one."""
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino, status.st_size

    def read(self, start: int, stop: int, scratch: Scratch) -> memoryview | None:
        """Bytes ``[start, stop)``, valid until the thread's next read; ``None`` if the file ends before or fails."""
        view, done = scratch.view(stop - start), 0
        while done < stop - start:
            try:
                count = os.preadv(self.descriptor, [view[done:]], start + done)
            except OSError:
                return None
            if not count:
                return None
            done += count
        return view

    def __del__(self) -> None:
        os.close(self.descriptor)


class Files:
    """The files last used, kept open for a few seconds. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._open: OrderedDict[str, tuple[File, float]] = OrderedDict()
        self._lock = threading.Lock()
        self._clock = clock

    def get(self, name: str, opener: Callable[[], File | None]) -> File | None:
        """The open file ``name``, or what ``opener`` gives."""
        now = self._clock()
        with self._lock:
            held = self._open.get(name)
            if held and now - held[1] < OPEN_SECONDS:
                self._open.move_to_end(name)
                return held[0]
        file = opener()
        with self._lock:
            self._open.pop(name, None)
            if file is not None:
                self._open[name] = (file, self._clock())
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return file

    def forget(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)

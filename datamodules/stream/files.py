"""Open files that several threads read by position."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from datamodules.format.crc import crc32

OPEN_FILES = 128
BLOCK = 4 << 20  # bytes read at once to sum a whole file
OPEN_SECONDS = (
    5.0  # after that a file is opened anew: a cached shard is marked as used, an evicted one lets go of its disk
)


class Scratch(threading.local):
    """A buffer per thread that grows to the largest read: fresh memory for each read costs more than the read. One of more
    than ``most`` bytes is not kept."""

    def __init__(self, most: int = sys.maxsize) -> None:
        self.buffer, self.most = bytearray(), most

    def view(self, size: int) -> memoryview:
        if size > self.most:
            return memoryview(bytearray(size))
        if len(self.buffer) < size:
            self.buffer = bytearray(size)
        return memoryview(self.buffer)[:size]


class File:
    """A file descriptor that is closed when nobody holds this object any more.

    ``verified``: this process has just written the file from bytes whose checksum was right. ``ours``: a file of the cache,
    whose bytes, once right, stay so, and whose time says when it was last used. ``mark``: tells this copy of some of a shard's
    bytes from one that was there before; empty for a whole one.
    """

    def __init__(self, descriptor: int, verified: bool = False, ours: bool = True, mark: bytes = b"") -> None:
        self.descriptor, self.verified, self.mark = descriptor, verified, mark
        status = os.fstat(descriptor)
        self.size = status.st_size
        # Another file under the same name has another inode; one that was written to has another time.
        told = int.from_bytes(mark) if ours else status.st_mtime_ns
        self.identity = (status.st_dev, status.st_ino, status.st_size, told)

    @classmethod
    def open(cls, path: str) -> File | None:
        """The file of a local data set for reading; ``None`` if that fails."""
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), ours=False)
        except OSError:
            return None

    def crc32(self) -> int | None:
        """Of all its bytes; ``None`` if it cannot be read."""
        found, scratch = 0, Scratch()
        for start in range(0, self.size, BLOCK):
            block = self.read(start, min(start + BLOCK, self.size), scratch)
            if block is None:
                return None
            found = crc32(block, found)
        return found

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

    def empty(self, start: int, stop: int) -> bool:
        """Whether the file system tells that nothing was ever written to [start, stop); most do."""
        try:
            return os.lseek(self.descriptor, start, os.SEEK_DATA) >= stop
        except OSError as error:
            return error.errno == errno.ENXIO  # nor behind it

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
            while self._open:
                oldest = next(iter(self._open))
                if len(self._open) <= OPEN_FILES and self._clock() - self._open[oldest][1] < OPEN_SECONDS:
                    break
                del self._open[oldest]
        return file

    def forget(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)

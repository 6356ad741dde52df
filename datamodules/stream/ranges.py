"""Copies of remote shards of which only the chunks that were read are there.

Where an epoch uses few of a shard's bytes, these alone are kept for the next one. A copy is a sparse file as long as the
shard, with a mark of its own behind it. Which chunks it has is not written down: one that is not there reads as zeros, which
its checksum does not fit, as it does not fit one that was cut short by a crash. So nothing has to be made durable in any
order, ranks and runs may write one file at the same time, and whoever reads a chunk must compare its checksum. Only chunks
whose checksum was right are written: what was right stays so.

A checksum does not tell a chunk of this data set from an intact one of another. A whole shard is compared with the manifest;
of ranges, those of a data set that was found to be replaced are forgotten, and its readers keep no more of it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from datamodules.format.crc import crc32c

from .cache import ShardCache, unlink

MARK = 16  # bytes behind the shard's, which tell a copy from one that was evicted before
LUMP = 64 << 20  # bytes of room that a process takes at a time, at most
PATIENCE_S = 5.0  # that a cache which was full is left alone
_PAGE = 4096  # files grow by whole blocks
_TRIES = 8
_FORGOTTEN = "forgotten"  # file that tells when what was kept of a data set was dropped
_forked = threading.Lock()
log = logging.getLogger(__name__)


def _after_fork() -> None:
    global _forked
    _forked = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class RangeCache(ShardCache):
    """Chunks of shards in the same folder, within the same bound and by the same turn to leave as whole shards.

    A whole copy that is there is read as well; none is made. What goes wrong on the disk costs the copies alone.
    """

    def __init__(self, root: str, capacity: int) -> None:
        super().__init__(root, capacity)
        self._born = time.time()
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return RangeCache.open_at, (self.root, self.capacity)

    @classmethod
    def open_at(cls, root: str, capacity: int) -> RangeCache | None:
        """The cache there; ``None``, with a warning, where there cannot be one: ranges are read without it as well."""
        try:
            return cls(root, capacity)
        except OSError as error:
            log.warning("%s; byte ranges are read in every epoch", error)
            return None

    def _begin(self) -> None:
        self._turn = threading.Lock()
        self._room = self._flying = 0  # bytes that may be written, and those that are being written
        self._later = -float("inf")
        self._process = os.getpid()

    @staticmethod
    def suits(chunk_bytes: int) -> bool:
        """Whether a checksum tells ``chunk_bytes`` bytes of zeros from a chunk (for all but a few sizes it does)."""
        return crc32c(bytes(chunk_bytes)) != 0

    def partial(self, fingerprint: str, path: str, size: int) -> tuple[int, bytes] | None:
        """A file descriptor to read and write (the caller closes it) of what is there of a shard, and the mark of this copy.

        The mark of a whole copy, which is not to be written to, is empty. ``None`` if the folder takes no files.
        """
        descriptor = None
        try:
            descriptor = self.held(fingerprint, path, size)
            if descriptor is not None:
                return descriptor, b""
            target = self._target(fingerprint, path) + self.SOME
            for _ in range(_TRIES):
                descriptor = self._open(target, size + MARK, os.O_RDWR)
                if descriptor is not None and self._forgotten(target):
                    os.close(descriptor)
                    return None
                if descriptor is not None:
                    return descriptor, os.pread(descriptor, MARK, size)
                self._make(target, size)
            return None
        except OSError as error:
            if descriptor is not None:
                os.close(descriptor)
            self.warn(str(error))
            return None

    def _make(self, target: str, size: int) -> None:
        """An empty copy, unless another is there by now. No lock: the one of whole shards is held while they download."""
        os.makedirs(os.path.dirname(target), exist_ok=True)
        part = self._part(target)
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(descriptor, uuid.uuid4().bytes, size)
            finally:
                os.close(descriptor)
            with suppress(FileNotFoundError):
                if os.stat(target).st_size != size + MARK:
                    unlink(target)
            with suppress(FileExistsError, FileNotFoundError):  # made by another, or swept by one
                os.link(part, target)
        finally:
            unlink(part)

    def keep(self, descriptor: int, start: int, data: bytes | memoryview) -> None:
        """Write verified chunks of a shard to its copy, if there is room."""
        cost = len(data) + 2 * _PAGE
        try:
            if self._process != os.getpid():  # forked: what the parent announced is not this process's
                with _forked:
                    if self._process != os.getpid():
                        self._announce()
                        self._begin()
            with self._turn:
                if cost > self._room and not self._more(cost):
                    return
                self._room -= cost
                self._flying += cost
            try:
                if os.fstat(descriptor).st_nlink:  # it was neither evicted nor forgotten
                    os.pwrite(descriptor, data, start)  # what a full disk cuts short fits no checksum
            finally:
                with self._turn:
                    self._flying -= cost
        except OSError as error:
            self._later = time.monotonic() + PATIENCE_S
            self.warn(f"{self.root}: {error}")

    def _more(self, cost: int) -> bool:
        """Take room for ``cost`` bytes and more; makes it by evicting others. Call with ``_turn`` held."""
        self._room = 0
        if cost > self.capacity or time.monotonic() < self._later:
            return False
        with self._lock("evict"):
            os.ftruncate(self._announced.descriptor, 0)
            wanted = max(cost, min(LUMP, self.capacity // (16 * max(4, self._bound().users))))
            room = self._evict(wanted + self._flying) is not None
            self._room = wanted if room else 0
            os.ftruncate(self._announced.descriptor, self._room + self._flying)
        if not room:
            self._later = time.monotonic() + PATIENCE_S
        return room

    def forget(self, fingerprint: str) -> None:
        """Drop all that was kept of a data set; none who reads it now keeps more."""
        folder = os.path.dirname(self._target(fingerprint, "any"))
        with suppress(OSError):
            with open(os.path.join(folder, _FORGOTTEN), "w"):
                os.utime(os.path.join(folder, _FORGOTTEN))
            for entry in os.scandir(folder):
                if entry.name.endswith(self.SOME):
                    unlink(entry.path)

    def _forgotten(self, target: str) -> bool:
        """Whether the data set of a copy was forgotten since this cache was opened."""
        try:
            return os.stat(os.path.join(os.path.dirname(target), _FORGOTTEN)).st_mtime >= self._born
        except FileNotFoundError:
            return False

    def drop(self, fingerprint: str, path: str) -> None:
        """Forget the copies of a shard. Without its lock, which is held while another process downloads it."""
        with suppress(OSError):
            for name in ("", self.SOME):
                unlink(self._target(fingerprint, path) + name)

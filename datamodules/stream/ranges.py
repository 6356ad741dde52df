"""Copies of remote shards of which only the chunks that were read are there.

Where an epoch uses few of a shard's bytes, these alone are kept for the next one. A copy is a sparse file as long as the
shard, with a mark of its own behind it. Which chunks it has is not written down: one that is not there reads as zeros, which
its checksum does not fit, as it does not fit one that was cut short by a crash. So nothing has to be made durable in any
order, ranks and runs may write one file at the same time, and whoever reads a chunk must compare its checksum. Only chunks
whose checksum was right are written: what was right stays so.

A checksum does not tell a chunk of this data set from an intact one of another. A whole shard is compared with the manifest;
of ranges, those of a data set that was found to be replaced are forgotten.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from contextlib import suppress

from datamodules.format.crc import crc32c

from .cache import ShardCache, unlink

MARK = 16  # bytes behind the shard's, which tell a copy from one that was evicted before
LUMP = 64 << 20  # bytes of room that a process takes at a time, at most
PATIENCE_S = 5.0  # that a cache which was full is left alone
_PAGE = 4096  # files grow by whole blocks
log = logging.getLogger(__name__)


class RangeCache(ShardCache):
    """Chunks of shards in the same folder, within the same bound and by the same turn to leave as whole shards.

    A whole copy that is there is read as well; none is made. What goes wrong on the disk costs the copies alone.
    """

    def __init__(self, root: str, capacity: int) -> None:
        super().__init__(root, capacity)
        self._begin()

    @classmethod
    def open_at(cls, root: str, capacity: int) -> RangeCache | None:
        """The cache there; ``None``, with a warning, where there cannot be one: ranges are read without it as well."""
        try:
            return cls(root, capacity)
        except OSError as error:
            log.warning("%s; byte ranges are read in every epoch", error)
            return None

    def _begin(self) -> None:
        self._process, self._turn = os.getpid(), threading.Lock()
        self._room = self._flying = 0  # bytes that may be written, and those that are being written
        self._later = -float("inf")

    @staticmethod
    def suits(chunk_bytes: int) -> bool:
        """Whether a checksum tells ``chunk_bytes`` bytes of zeros from a chunk (for all but a few sizes it does)."""
        return crc32c(bytes(chunk_bytes)) != 0

    def part(self, fingerprint: str, path: str, size: int) -> tuple[int, bytes] | None:
        """A file descriptor to read and write (the caller closes it) of what is there of a shard, and the mark of this copy.

        The mark of a whole copy, which is not to be written to, is empty. ``None`` if the folder takes no files.
        """
        descriptor = None
        try:
            descriptor = self.held(fingerprint, path, size)
            if descriptor is not None:
                return descriptor, b""
            target = self._target(fingerprint, path) + self.SOME
            while (descriptor := self._open(target, size + MARK, os.O_RDWR)) is None:
                self._make(target, size)
            return descriptor, os.pread(descriptor, MARK, size)
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
            with suppress(FileExistsError):
                os.link(part, target)
        finally:
            unlink(part)

    def keep(self, descriptor: int, start: int, data: bytes | memoryview) -> None:
        """Write verified chunks of a shard to its copy, if there is room."""
        if self._process != os.getpid():  # forked: what the parent announced is not this process's
            self._announce()
            self._begin()
        cost = len(data) + 2 * _PAGE
        with self._turn:
            if cost > self._room and not self._more(cost):
                return
            self._room -= cost
            self._flying += cost
        try:
            if os.fstat(descriptor).st_nlink:  # it was not evicted
                os.pwrite(descriptor, data, start)  # what a full disk cuts short fits no checksum
        except OSError as error:
            self.warn(f"{self.root}: {error}")
        finally:
            with self._turn:
                self._flying -= cost

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
        """Drop all that was kept of a data set."""
        folder = os.path.dirname(self._target(fingerprint, "any"))
        with suppress(FileNotFoundError):
            for entry in os.scandir(folder):
                if entry.name.endswith(self.SOME):
                    unlink(entry.path)

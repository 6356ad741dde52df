"""Copies of remote shards of which only the byte ranges that were read are there.

Where an epoch uses few of a shard's bytes, these alone are kept for the next one. A copy is a sparse file as long as the
shard, with a mark of its own behind it. Which bytes it has is not written down: a chunk that is not there reads as zeros,
which its checksum does not fit, as it does not fit one that was cut short by a crash. So nothing has to be made durable in
any order, ranks and runs may write one file at the same time, and whoever reads a chunk must compare its checksum.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import uuid
from contextlib import suppress

from datamodules.format.crc import crc32c

from .cache import ShardCache, unlink

MARK = 16  # bytes behind the shard's, which tell a copy from one that was evicted before
LUMP = 64 << 20  # bytes of room that a process takes at a time, at most
_PAGE = 4096  # files grow by whole blocks
log = logging.getLogger(__name__)


class RangeCache(ShardCache):
    """Byte ranges of shards in the same folder, within the same bound and by the same turn to leave as whole ones.

    A whole copy that is there is read as well; none is made.
    """

    def __init__(self, root: str, capacity: int) -> None:
        super().__init__(root, capacity)
        self._room, self._turn = 0, threading.Lock()

    @staticmethod
    def suits(chunk_bytes: int) -> bool:
        """Whether a checksum tells ``chunk_bytes`` bytes of zeros from a chunk (for all but a few sizes it does)."""
        return crc32c(bytes(chunk_bytes)) != 0

    def part(self, fingerprint: str, path: str, size: int) -> tuple[int, bytes]:
        """A file descriptor to read and write (the caller closes it) of what is there of a shard, and the mark of this copy.

        The mark of a whole copy, which is not to be written to, is empty. ``OSError`` if the folder cannot be written to.
        """
        whole = self.held(fingerprint, path, size)
        if whole is not None:
            return whole, b""
        target = self._target(fingerprint, path) + self.SOME
        while True:
            descriptor = self._open(target, size + MARK, os.O_RDWR)
            if descriptor is not None:
                return descriptor, os.pread(descriptor, MARK, size)
            with self._lock(target):
                descriptor = self._open(target, size + MARK, os.O_RDWR)
                if descriptor is None:
                    self._begin(target, size)
                else:
                    os.close(descriptor)

    def _begin(self, target: str, size: int) -> None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        part = self._part(target)
        try:
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                os.pwrite(descriptor, uuid.uuid4().bytes, size)
            finally:
                os.close(descriptor)
            os.replace(part, target)
        except BaseException:
            unlink(part)
            raise

    def keep(self, descriptor: int, start: int, data: bytes | memoryview) -> None:
        """Write bytes of a shard to its copy, if there is room."""
        cost = len(data) + 2 * _PAGE
        with self._turn:
            if cost > self._room and not self._more(cost):
                return
            self._room -= cost
        try:
            os.pwrite(descriptor, data, start)  # what a full disk cuts short fits no checksum
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self.warn_full(f"{self.root}: no space left; free space, or lower or move the cache")

    def _more(self, cost: int) -> bool:
        """Take room for ``cost`` bytes and more; makes it by evicting others."""
        with self._lock("evict"):
            os.ftruncate(self._announced.descriptor, 0)
            wanted = max(cost, min(LUMP, self.capacity // 64))
            self._room = 0 if self._evict(wanted) is None else wanted
            os.ftruncate(self._announced.descriptor, self._room)
            return self._room > 0

    def drop(self, fingerprint: str, path: str) -> None:
        super().drop(fingerprint, path)
        with suppress(OSError):
            super().drop(fingerprint, path + self.SOME)

"""A local cache of whole shards: shared by all processes of a host, bounded in bytes, least recently used leaves first.

Layout: ``<root>/<fingerprint prefix>/<quoted shard path>``, ``<...>.some`` for a copy that has only some of the shard's bytes
(see ``ranges``), ``statistics-*`` (see ``normalisation``), ``<...>.<pid>-<n>.part`` while a download runs, and
``<root>/locks/*``, among them ``bound-<bytes>.<pid>-<n>``, locked for as long as a cache of that bound is in use. A shard
appears under its name only by an atomic rename after its checksum was verified, so a process killed at any moment leaves
at most a ``.part`` file and never a wrong shard. Locks are ``flock`` locks, which the kernel drops when their owner dies;
a ``.part`` file whose lock is free is therefore left over, and is removed.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Protocol
from urllib.parse import quote

from datamodules.format import DataError
from datamodules.format.crc import combine_crc32, crc32
from datamodules.store import OutOfSpace, Sink

BLOCK = 4 << 20  # bytes of one range request of a download
PARALLEL = 8  # range requests in flight for one download
_STRIPES = 64  # number of lock files; two shards that share one only wait for each other
_BOUND = "bound-"
_serial = itertools.count()
log = logging.getLogger(__name__)


class _Lock:
    """A ``flock`` lock held by this process.

    The lock is that of the open file, which a forked child shares: a child would hold on to it for all its life. So it is
    released by name, not only by closing the file, and a child closes what it inherits at once.
    """

    held: ClassVar[set[_Lock]] = set()

    def __init__(self, path: str, wait: bool) -> None:
        """``BlockingIOError`` if another has it and ``wait`` is false."""
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.held.add(self)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        if self in self.held:  # not in a child, whose parent's lock it is
            self.held.remove(self)
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            os.close(self.descriptor)

    @classmethod
    def forget(cls) -> None:
        """In a forked child: close the files of the parent's locks."""
        for lock in cls.held:
            os.close(lock.descriptor)
        cls.held.clear()


os.register_at_fork(after_in_child=_Lock.forget)


class Stopped(Exception):
    """A download was given up because nobody waits for it any more."""


def never() -> bool:
    return False


class Source(Protocol):
    """What a download needs of ``datamodules.store.Store``."""

    @property
    def url(self) -> str: ...
    def read_ranges(self, requests: list[tuple[str, int, int]], sinks: list[Sink]) -> list[bytes]: ...


def default_root() -> str:
    """``$KEEL_CACHE``, else ``~/.cache/keel``."""
    return os.environ.get("KEEL_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "keel")


@dataclass
class Block:
    """A byte range of a shard on its way into a file."""

    start: int
    size: int
    crc: int = 0

    def sink(self, descriptor: int) -> Sink:
        """Writes and sums what comes, while it is in the processor's cache."""

        def write(offset: int, piece: memoryview) -> None:
            self.crc = crc32(piece, self.crc if offset else 0)
            done = 0
            while done < len(piece):
                done += os.pwrite(descriptor, piece[done:], self.start + offset + done)

        return write


class Bound(NamedTuple):
    """Of all caches of a folder: the largest capacity, the bytes that they are about to write, and how many there are."""

    capacity: int
    promised: int
    users: int


class ShardCache:
    """Whole shards of remote data sets as local files under ``root``, together at most ``capacity`` bytes.

    Safe for several threads, ranks and runs at once. Where those that use a root at the same time have different capacities
    the largest holds for all: a small one does not throw out what a larger one keeps.
    """

    SOME: ClassVar[str] = ".some"  # behind the name of a copy that has only some of the bytes
    _warned = False

    def __init__(self, root: str, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"cache: capacity={capacity} bytes; give a positive size, or use no cache")
        self.root, self.capacity = os.path.abspath(root or default_root()), capacity
        os.makedirs(os.path.join(self.root, "locks"), exist_ok=True)
        self.sweep()
        self._announce()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.root, self.capacity)

    def open(
        self,
        source: Source,
        fingerprint: str,
        path: str,
        size: int,
        checksum: int,
        stop: Callable[[], bool] = never,
    ) -> tuple[int | None, int]:
        """File descriptor (the caller closes it) of the shard's verified copy, and the bytes downloaded for it if it was absent.

        The descriptor is ``None`` if the shard cannot fit at the moment: the shard is larger than the cache, others' downloads
        fill it, or the disk is full (which is logged once).
        ``DataError`` if two downloads both fail the CRC-32 ``checksum``; ``StoreError`` if the store fails; ``Stopped`` if
        ``stop``, asked before each few blocks of a download, is true.
        """
        target = self._target(fingerprint, path)
        descriptor = self._open(target, size)
        if descriptor is not None:
            return descriptor, 0
        with self._lock(target):
            descriptor = self._open(target, size)  # another process may have fetched it while this one waited
            if descriptor is not None:
                return descriptor, 0
            for leftover in self._parts(target):
                unlink(leftover)
            for attempt in (1, 2):
                part = None
                try:
                    part = self._reserve(target, size)
                    if part is None:
                        return None, (attempt - 1) * size
                    if self._download(source, path, size, part, stop) == checksum:
                        with self._lock("evict"):  # whoever counts might see it under neither name
                            os.replace(part, target)
                        return self._open(target, size), attempt * size
                except OutOfSpace as error:
                    self.warn(str(error))
                    return None, (attempt - 1) * size
                finally:
                    if part is not None:
                        unlink(part)
        raise DataError(
            f"{source.url}/{path}: corrupt: the checksum of two downloads differs from the manifest's; "
            f"delete this object and run `keel data make` again"
        )

    def held(self, fingerprint: str, path: str, size: int) -> int | None:
        """File descriptor (the caller closes it) of the shard's verified copy, or ``None`` if it is not there."""
        return self._open(self._target(fingerprint, path), size)

    def drop(self, fingerprint: str, path: str) -> None:
        """Forget a shard whose cached copy turned out bad, so that the next ``open`` downloads it again."""
        target = self._target(fingerprint, path)
        with self._lock(target):
            unlink(target)

    def warn(self, why: str) -> None:
        """Once: why files cannot be kept."""
        if not self._warned:
            self._warned = True
            log.warning("%s; reading byte ranges from the store meanwhile", why)

    def sweep(self) -> None:
        """Remove ``.part`` files whose writers are gone."""
        for entry in self._entries():
            if entry.name.endswith(".part"):
                target = entry.path.rsplit(".", 2)[0]
                with self._lock(target, wait=False) as held:
                    if held:
                        unlink(entry.path)

    def used(self) -> int:
        """Bytes that shards and running downloads occupy."""
        total = 0
        for entry in self._entries():
            with suppress(FileNotFoundError):
                total += _bytes(entry)
        return total

    def _announce(self) -> None:
        """Let others know this cache's capacity while it lives; the size of the file is what it is about to write."""
        while True:
            path = os.path.join(self.root, "locks", f"{_BOUND}{self.capacity}.{os.getpid()}-{next(_serial)}")
            with self._lock("evict"), suppress(BlockingIOError):  # one of equal number in another container has it
                self._announced = _Lock(path, wait=False)
                weakref.finalize(self, _withdraw, self._announced, path).atexit = False
                return

    def _bound(self) -> Bound:
        """What is announced. Call with the lock ``evict`` held."""
        found, promised, users = self.capacity, 0, 0
        for entry in os.scandir(os.path.join(self.root, "locks")):
            if not entry.name.startswith(_BOUND):
                continue
            try:
                lock = _Lock(entry.path, wait=False)
            except BlockingIOError:
                found = max(found, int(entry.name.removeprefix(_BOUND).split(".")[0]))
                with suppress(FileNotFoundError):  # just withdrawn
                    promised += os.stat(entry.path).st_size
                users += 1
            else:  # its owner was killed
                _withdraw(lock, entry.path)
        return Bound(found, promised, users)

    def _target(self, fingerprint: str, path: str) -> str:
        return os.path.join(self.root, fingerprint.rpartition(":")[2][:16], quote(path, safe=""))

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        for space in os.scandir(self.root):
            if space.name != "locks" and space.is_dir():
                yield from os.scandir(space.path)

    @staticmethod
    def _parts(target: str) -> list[str]:
        folder, name = os.path.split(target)
        if not os.path.isdir(folder):
            return []
        return [e.path for e in os.scandir(folder) if e.name.endswith(".part") and e.name.rsplit(".", 2)[0] == name]

    @staticmethod
    def _open(target: str, size: int, mode: int = os.O_RDONLY) -> int | None:
        """Descriptor of a copy of this size, marked as just used; one of another size is ignored (and soon replaced)."""
        try:
            descriptor = os.open(target, mode | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            return None
        with suppress(OSError):
            os.utime(target)  # not atime: most mounts update it once a day at most
        return descriptor

    def _evict(self, size: int) -> list[str] | None:
        """Make room for ``size`` bytes; the shards that stay, the one next to leave first. ``None`` if there cannot be room,
        and then none has left. Call with the lock ``evict`` held."""
        found = []
        for entry in self._entries():
            with suppress(FileNotFoundError):
                found.append((entry.stat().st_mtime_ns, _bytes(entry), entry.path))
        shards = sorted(f for f in found if not f[2].endswith(".part"))
        bound = self._bound()
        excess = sum(f[1] for f in found) + bound.promised + size - bound.capacity
        if excess > sum(f[1] for f in shards):
            return None
        while excess > 0:
            _, length, path = shards.pop(0)
            unlink(path)
            excess -= length
        return [path for _, _, path in shards]

    def _part(self, target: str) -> str:
        """Name of a new file that is to become ``target``."""
        return f"{target}.{os.getpid()}-{next(_serial)}.part"

    def _reserve(self, target: str, size: int) -> str | None:
        """Path of a new ``.part`` file of ``size`` bytes, after evicting as many old shards as that takes."""
        with self._lock("evict"):
            left = self._evict(size)
            if left is None:
                return None
            os.makedirs(os.path.dirname(target), exist_ok=True)
            part = self._part(target)
            own = [path for path in left if os.path.dirname(path) == os.path.dirname(target)]
            while True:
                try:
                    _create(part, size)
                    return part
                except OSError as error:
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    if not own:
                        raise OutOfSpace(
                            f"{self.root}: no space left for a shard of {size} bytes; free space, or lower or move the cache"
                        ) from error
                    unlink(own.pop(0))

    def _download(self, source: Source, path: str, size: int, part: str, stop: Callable[[], bool]) -> int:
        """Fill ``part`` from the store, as the bytes come; returns their CRC-32."""
        checksum = 0
        # Blocks begin where servers cut objects, at multiples of BLOCK: one that does not costs Ceph two reads. Shards are
        # often slightly larger than a power of two, so a last block that would be short joins the one before it.
        cuts = [*range(0, max(size - BLOCK // 2, 1), BLOCK), size]
        blocks = [Block(first, end - first) for first, end in pairwise(cuts)]
        descriptor = os.open(part, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for k in range(0, len(blocks), PARALLEL):
                if stop():
                    raise Stopped(path)
                some = blocks[k : k + PARALLEL]
                source.read_ranges(
                    [(path, b.start, b.start + b.size) for b in some], [b.sink(descriptor) for b in some]
                )
                for block in some:
                    checksum = combine_crc32(checksum, block.crc, block.size)
        finally:
            os.close(descriptor)
        return checksum

    @contextmanager
    def _lock(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of ``name`` (among threads too: each ``open`` has its own); yields whether it is held."""
        stripe = name if name == "evict" else f"{crc32(os.path.relpath(name, self.root).encode()) % _STRIPES:02d}"
        try:
            lock = _Lock(os.path.join(self.root, "locks", stripe), wait)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def _withdraw(lock: _Lock, path: str) -> None:
    if lock in _Lock.held:  # not in a child, whose parent's it is
        unlink(path)
        lock.release()


def _create(part: str, size: int) -> None:
    """A new file of ``size`` bytes, or none at all."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        _allocate(descriptor, size)
    except BaseException:
        unlink(part)
        raise
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    """Reserve the blocks now, so that a full disk shows before the download and not in its middle."""
    try:
        os.posix_fallocate(descriptor, 0, max(size, 1))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    os.ftruncate(descriptor, size)


def _bytes(entry: os.DirEntry[str]) -> int:
    status = entry.stat()
    name = entry.name.rsplit(".", 2)[0] if entry.name.endswith(".part") else entry.name
    return status.st_blocks * 512 if name.endswith(ShardCache.SOME) else status.st_size


def unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)

"""Streams of batches: what one rank reads, as a pure function of a global position."""

from __future__ import annotations

import os
import pickle
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from .ahead import Ahead
from .metrics import Metrics
from .order import Order
from .prefetch import QUICK_S, prefetch
from .shared import anonymous

Batch = dict[str, Tensor]
Indices = NDArray[np.int64]
_BLOCK = 2048  # positions whose order is computed at once
JOINED, JOINED_BYTES = 16, 2 << 20  # micro-batches that are read together at most, and their bytes


class Positions(Protocol):
    """The order of a stream."""

    def at(self, position: ArrayLike) -> Indices: ...


@dataclass(frozen=True)
class Share:
    """One rank's part of each global batch: its ``rank``-th contiguous slice, cut into micro-batches.

    ``micro_batch=0`` takes the whole slice at once. ``ValueError``, with the valid numbers, if the parts are not equal.
    """

    global_batch: int
    micro_batch: int = 0
    world_size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        batch, world, micro = self.global_batch, self.world_size, self.micro_batch
        if batch < 1 or world < 1 or micro < 0 or not 0 <= self.rank < world:
            raise ValueError(
                f"global_batch={batch}, micro_batch={micro}, world_size={world}, rank={self.rank}: not a share"
            )
        if batch % world:
            below, above = batch // world * world, (batch // world + 1) * world
            raise ValueError(
                f"global_batch={batch} does not divide over world_size={world} ranks; nearest valid global batches: "
                f"{f'{below} or ' if below else ''}{above}"
            )
        if micro and self.local % micro:
            valid = ", ".join(str(m) for m in range(1, self.local + 1) if self.local % m == 0)
            raise ValueError(
                f"micro_batch={micro} does not divide the {self.local} samples of a rank "
                f"(global_batch={batch} / world_size={world}); valid: {valid}"
            )

    @property
    def local(self) -> int:
        """Samples of a rank in one global batch."""
        return self.global_batch // self.world_size

    @property
    def micro(self) -> int:
        """Samples of one micro-batch."""
        return self.micro_batch or self.local

    @property
    def accumulation(self) -> int:
        """Micro-batches of one global batch on each rank."""
        return self.local // self.micro

    def positions(self, start: int, steps: int) -> Indices:
        """Global positions [steps * accumulation, micro] of this rank in ``steps`` global batches from ``start``."""
        first = start + self.rank * self.local + self.global_batch * np.arange(steps, dtype=np.int64)
        return (first[:, None] + np.arange(self.local, dtype=np.int64)).reshape(-1, self.micro)


class Source(Protocol):
    """What a stream reads from: ``Reader``, or several of them as one. Picklable, and a copy is independent."""

    metrics: Metrics

    @property
    def sample_bytes(self) -> int: ...
    @property
    def caches(self) -> int:
        """Bytes of the cache of shards that it reads through; 0 for none."""

    @property
    def joins(self) -> bool:
        """Whether the samples of two batches may be asked for as one batch."""

    def batch(self, samples: Indices, wait: bool = True) -> Batch: ...
    def shard_sizes(self, samples: Indices) -> dict[str, int]: ...
    def cached(self, path: str, stop: Callable[[], bool]) -> bool: ...


@dataclass
class Cursor:
    """Global position of a stream's owner; called, it tells it."""

    position: int = 0

    def __call__(self) -> int:
        return self.position


class Stream(IterableDataset[Batch]):
    """This rank's micro-batches for ever: epochs follow each other without a gap and nothing is dropped.

    A plain iterable for PyTorch. It reads ahead with threads of its own; where Python work of the consumer starves them,
    let processes read::

        loader = DataLoader(stream, batch_size=None, num_workers=4)

    The batches and their order are the same for any ``num_workers``: each process makes every fourth. ``start`` is asked
    when iteration begins, so make the loader again (or leave ``persistent_workers`` off) to go on from another position.
    ``metrics`` include what worker processes read.

    Args:
        reader: makes a batch from sample ids.
        order: maps a global position (which runs on over epochs) to a sample.
        share: this rank's part of each global batch.
        start: global position of the first global batch; asked when iteration begins, so that a stream which is iterated
            again goes on where its owner's position is. Picklable if processes are to read.
        read_ahead: reads in the making or ready ahead of the consumer; 0 reads in the consumer's thread. Each makes a
            micro-batch, or, after the first, up to ``JOINED`` of at most ``JOINED_BYTES`` together: most of the time of a small
            one is not spent on its bytes. They share memory, so one that is kept keeps that of the others; and what is wrong
            with one of them is raised before those of its read that come earlier.
        read_ahead_bytes: bound on what they hold together (one is always allowed).
        threads: threads that read.
        horizon: samples to look ahead for shards to download, with a cache.
    """

    def __init__(
        self,
        reader: Source,
        order: Positions,
        share: Share,
        start: Callable[[], int] = int,
        *,
        read_ahead: int = 4,
        read_ahead_bytes: int = 256 << 20,
        threads: int = 2,
        horizon: int = 0,
    ) -> None:
        self.reader, self.order, self.share, self.start = reader, order, share, start
        self.read_ahead, self.read_ahead_bytes, self.threads = read_ahead, read_ahead_bytes, threads
        self.horizon = horizon
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()
        self._process = os.getpid()

    @property
    def metrics(self) -> Metrics:
        return self.reader.metrics

    def indices(self, start: int | None = None) -> Iterator[Indices]:
        """Sample ids of each micro-batch from global position ``start`` on."""
        position = self.start() if start is None else start
        steps = max(1, _BLOCK // self.share.local)
        while True:
            yield from self.order.at(self.share.positions(position, steps))
            position += steps * self.share.global_batch

    def largest(self) -> int:
        """Samples of the largest micro-batch."""
        return self.share.micro

    def _mine(self) -> Iterator[Indices]:
        """The indices; in a worker process of a ``DataLoader`` every ``num_workers``-th, as it deals them out in turn."""
        worker = get_worker_info()
        return self.indices() if worker is None else islice(self.indices(), worker.id, None, worker.num_workers)

    def __iter__(self) -> Generator[Batch, None, None]:
        if os.getpid() != self._process:  # forked: locks and files of the parent are in whatever state they were
            parent = self.metrics
            self.reader = pickle.loads(pickle.dumps(self.reader))
            self.metrics.report_to(parent)
            self._running, self._process = weakref.WeakSet(), os.getpid()
        depth, joined = self.read_ahead, 1
        if depth:
            size = self.largest() * self.reader.sample_bytes
            fit = self.read_ahead_bytes // size
            if self.reader.joins:  # all but one of a read are still ahead of the consumer when it has the first of them
                joined = max(1, min(JOINED, JOINED_BYTES // size, (fit + 1) // 2))
            depth = max(1, min(depth, (fit + 1) // joined - 1))
        batches = self._batches(depth, joined)
        self._running.add(batches)
        return batches

    def _batches(self, depth: int, joined: int) -> Generator[Batch, None, None]:
        reader, metrics = self.reader, self.metrics
        ahead = None
        if reader.caches and depth:
            ahead = Ahead(
                self._mine(),
                reader.shard_sizes,
                reader.cached,
                reader.caches // 2,
                self.horizon // self.largest() + depth * joined,
            )

        def planned() -> Iterator[tuple[list[Indices], bool]]:
            mine, first = self._mine(), True
            while ids := list(islice(mine, 1 if first else joined)):
                if ahead is not None and not first:
                    ahead.advance(len(ids))
                # The first batch has the network to itself and does not wait for whole shards: that is what the time to a
                # first batch would be. What it reads is read twice, so the others do.
                yield ids, ahead is None or not first
                first = False

        def read(item: tuple[list[Indices], bool]) -> list[Batch]:
            ids, wait = item
            whole = reader.batch(ids[0] if len(ids) == 1 else np.concatenate(ids), wait)
            if get_worker_info() is not None:  # bound for another process
                whole = anonymous(whole)
            metrics.add(batches=len(ids))
            if len(ids) == 1:
                return [whole]
            parts = zip(*(value.split([len(own) for own in ids]) for value in whole.values()), strict=True)
            # Without autograd's knowledge of each other: whoever changes one in place changes no other's version.
            return [{name: value.data for name, value in zip(whole, part, strict=True)} for part in parts]

        def counted(seconds: float) -> None:
            metrics.add(wait=seconds)

        reads = prefetch(read, planned(), depth, self.threads, counted, quick=joined * QUICK_S)
        try:
            for ready in reads:
                ready.reverse()
                while ready:
                    yield ready.pop()  # and hold on to none
        finally:
            if ahead is not None:
                ahead.stop()
            reads.close()
            if ahead is not None:
                ahead.close()

    def close(self) -> None:
        """End the threads of all iterations; a later iteration starts afresh.

        Returns within seconds: what waits for a store that is away is left behind, and ends when its request does.
        """
        for batches in list(self._running):
            batches.close()
        self._running.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_running", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._running, self._process = weakref.WeakSet(), os.getpid()


class FiniteStream(Stream):
    """Given batches of sample ids, once: for validation and evaluation. Has a length."""

    def __init__(self, reader: Source, batches: Sequence[Indices], **options: Any) -> None:
        largest = max(map(len, batches), default=1)
        super().__init__(reader, Order(largest, 1, 1, 0, shuffle=False), Share(largest), **options)
        self.batches = list(batches)

    def __len__(self) -> int:
        return len(self.batches)

    def indices(self, start: int | None = None) -> Iterator[Indices]:
        return iter(self.batches)


def spread(samples: int, limit: int) -> Indices:
    """At most ``limit`` (0: all) of ``samples`` ids, evenly spaced."""
    count = min(samples, limit) if limit else samples
    return np.arange(count, dtype=np.int64) * samples // count


def even_batches(ids: Indices, batch: int, world_size: int, rank: int) -> list[Indices]:
    """This rank's batches such that all ranks have the same number of batches and every id occurs exactly once.

    Batches hold ``batch`` ids or slightly fewer, at least one; there is no padding, so that sums over samples do not depend
    on the world size. (With ``batch=1`` some may hold two.)
    ``ValueError`` if there are fewer ids than ranks.
    """
    if len(ids) < world_size:
        raise ValueError(f"{len(ids)} samples are fewer than the {world_size} ranks; use more samples or fewer ranks")
    rounds = min(-(-len(ids) // (batch * world_size)), len(ids) // world_size)
    return np.array_split(ids, rounds * world_size)[rank * rounds : (rank + 1) * rounds]

"""Streams of batches: what one rank reads, as a pure function of a global position."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset

from .fetch import Metrics, Reader
from .order import Order
from .prefetch import prefetch

Batch = dict[str, Tensor]
Indices = NDArray[np.int64]
_BLOCK = 2048  # positions whose order is computed at once


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


class Stream(IterableDataset[Batch]):
    """This rank's micro-batches for ever: epochs follow each other without a gap and nothing is dropped.

    Args:
        reader: makes a batch from sample ids.
        order: maps a global position (which runs on over epochs) to a sample.
        share: this rank's part of each global batch.
        start: global position of the first global batch; asked when iteration begins, so that a stream which is iterated
            again goes on where its owner's position is.
        read_ahead: micro-batches in the making or ready ahead of the consumer; 0 reads in the consumer's thread.
        read_ahead_bytes: bound on what they hold together (one is always allowed).
        threads: threads that read.
    """

    def __init__(
        self,
        reader: Reader,
        order: Order,
        share: Share,
        start: Callable[[], int] = int,
        *,
        read_ahead: int = 4,
        read_ahead_bytes: int = 256 << 20,
        threads: int = 2,
    ) -> None:
        self.reader, self.order, self.share, self.start = reader, order, share, start
        self.read_ahead, self.read_ahead_bytes, self.threads = read_ahead, read_ahead_bytes, threads
        self._running: weakref.WeakSet[Generator[Batch, None, None]] = weakref.WeakSet()

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

    def __iter__(self) -> Generator[Batch, None, None]:
        depth = self.read_ahead
        if depth:
            depth = max(1, min(depth, self.read_ahead_bytes // (self.largest() * self.reader.sample_bytes)))
        metrics = self.metrics
        batches = prefetch(self.reader.batch, self.indices(), depth, self.threads, lambda s: metrics.add(wait=s))
        self._running.add(batches)
        return batches

    def close(self) -> None:
        """End the threads of all iterations; a later iteration starts afresh."""
        for batches in list(self._running):
            batches.close()
        self._running.clear()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a Stream reads with threads of its own; use it without worker processes (num_workers=0)")


class FiniteStream(Stream):
    """Given batches of sample ids, once: for validation and evaluation. Has a length."""

    def __init__(self, reader: Reader, batches: Sequence[Indices], **options: Any) -> None:
        order = Order(reader.windows.samples, reader.windows.group, 1, 0, shuffle=False)
        super().__init__(reader, order, Share(max(map(len, batches), default=1)), **options)
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

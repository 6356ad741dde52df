"""Several streams as one: which source each global position reads, as a pure function of the position.

The units of the global order (samples, or whole global batches) are dealt to the sources in blocks. A block of ``length``
units has exactly ``counts[s]`` units of source ``s``, spread evenly: its j-th unit is due at ``(j + 1/2) / counts[s]`` of
the block (the stride schedule of Bresenham's line, and of Webster's apportionment). So after any number of units each
source is within one or two units of its share, and after each block exactly on it. The n-th unit of a source is the n-th of
its own order, which has its own epochs: everything follows from the position in O(1).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from datamodules.format import DataError

from .cache import never
from .fetch import Reader
from .metrics import Metrics
from .order import Order
from .windows import Windows

Indices = NDArray[np.int64]
LONGEST = 1 << 16  # units of a block


def proportions(weights: Sequence[float]) -> list[int]:
    """Units of each source in a block. ``ValueError`` if a weight is not positive.

    Exactly the weights as written in decimals where a block of ``LONGEST`` units has room for that, else the nearest that
    fit into ``LONGEST`` (largest remainders), at least one each.
    """
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight={weight}: must be positive; leave the source out instead")
    exact = [Fraction(str(weight)) for weight in weights]
    total = sum(exact)
    shares = [weight / total for weight in exact]
    length = math.lcm(*(share.denominator for share in shares))
    if length <= LONGEST:
        return [int(share * length) for share in shares]
    counts = [max(1, math.floor(share * LONGEST)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: (counts[s] - shares[s] * LONGEST, s))
    for i in range(LONGEST - sum(counts)):
        counts[by_remainder[i % len(counts)]] += 1
    return counts


class Mixture:
    """Global positions to sample ids, over several orders.

    Ids of source ``s`` are those of its order plus ``bases[s]``. ``unit`` consecutive positions have the same source.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], unit: int = 1) -> None:
        self.orders, self.unit = list(orders), unit
        self.counts = np.array(proportions(weights), np.int64)
        self.bases = np.cumsum([0, *(order.n for order in orders)])
        self.n = int(self.bases[-1])
        self.seed = self.orders[0].seed
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        owner = np.repeat(np.arange(len(self.counts)), self.counts)
        sequence = np.lexsort((owner, due))
        self._source = owner[sequence]  # of each unit of a block
        nth = np.concatenate([np.arange(count) for count in self.counts])
        self._nth = nth[sequence]  # unit of that source within the block

    def at(self, position: ArrayLike) -> Indices:
        """Sample ids (int64, of the shape of ``position``) at global positions, which run on over epochs."""
        p = np.asarray(position, np.int64)
        unit, offset = np.divmod(p, self.unit)
        block, slot = np.divmod(unit, len(self._source))
        source = self._source[slot]
        own = (block * self.counts[source] + self._nth[slot]) * self.unit + offset
        found = np.empty(p.shape, np.int64)
        for s, order in enumerate(self.orders):
            mine = source == s
            if mine.any():
                found[mine] = self.bases[s] + order.at(own[mine])
        return found

    def identity(self) -> dict[str, Any]:
        """What decides the order, for the state of a stream."""
        parts = [self.unit, self.counts.tolist(), [order.identity() for order in self.orders]]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        return {"seed": self.seed, "samples": self.n, "mixture": digest}


class Entry(NamedTuple):
    """What one sample contributes to an entry of a batch. ``alike``: what even batches of one source must agree in."""

    shape: tuple[int, ...]
    alike: tuple[Any, ...]


def entries(windows: Windows) -> dict[str, Entry]:
    """The entries of a batch of ``windows`` by name."""
    views = windows.views(torch.empty((0, *windows.shape), dtype=windows.dtype))
    labels = windows.labels(np.empty(0, np.int64))
    found = {name: Entry(tuple(v.shape[1:]), (v.dtype, v.shape[1:2], windows.marks)) for name, v in views.items()}
    return found | {name: Entry(tuple(v.shape[1:]), (v.dtype, v.shape[1:])) for name, v in labels.items()}


def _told(found: dict[str, Entry]) -> str:
    said = (f"{name} {str(entry.alike[0]).removeprefix('torch.')} {list(entry.shape)}" for name, entry in found.items())
    marks = next(iter(found.values())).alike[2]
    return ", ".join(said) + (f" separated by {marks}" if marks is not None else "")


class MixedReader:
    """Batches from several readers, with ids as of ``Mixture``; adds ``source``, int64 [B].

    All readers must give batches of the same entries, and of the same shapes unless ``apart`` promises that a batch has one
    source; ``DataError`` if not.
    """

    def __init__(self, readers: Sequence[Reader], metrics: Metrics, apart: bool = False) -> None:
        self.readers, self.metrics, self.apart = list(readers), metrics, apart
        self.bases = np.cumsum([0, *(reader.windows.samples for reader in readers)])
        first = entries(self.readers[0].windows)
        for reader in self.readers[1:]:
            other = entries(reader.windows)
            what = f"{reader.dataset.url}: has samples {_told(other)}, the first source has {_told(first)}"
            if {name: entry.alike for name, entry in other.items()} != {n: e.alike for n, e in first.items()}:
                raise DataError(f"{what}; give all sources the same inputs, pairs, parameters, documents and separator")
            if not apart and other != first:
                raise DataError(f"{what}; set unit=batch, so that each global batch has one source")

    def __reduce__(self) -> tuple[Any, ...]:
        return MixedReader, (self.readers, self.metrics, self.apart)

    @property
    def sample_bytes(self) -> int:
        return max(reader.sample_bytes for reader in self.readers)

    @property
    def caches(self) -> int:
        return min((reader.caches for reader in self.readers if reader.caches), default=0)

    @property
    def joins(self) -> bool:
        return not self.apart  # two batches may then be of unlike shapes

    def _split(self, samples: Indices) -> list[tuple[int, Indices, Indices]]:
        """(source, rows of the batch, its own sample ids) of each source that occurs."""
        source = np.searchsorted(self.bases, samples, side="right") - 1
        parts = [(int(s), np.flatnonzero(source == s)) for s in np.unique(source)]
        return [(s, rows, samples[rows] - self.bases[s]) for s, rows in parts]

    def batch(self, samples: Indices, wait: bool = True) -> dict[str, Tensor]:
        """As ``Reader.batch``."""
        samples = np.asarray(samples, np.int64)
        parts = self._split(samples)
        reader = self.readers[parts[0][0]]
        target = functools.cache(lambda: reader.target(len(samples)))
        labels: dict[str, Tensor] = {"source": torch.empty(len(samples), dtype=torch.int64)}
        for s, rows, ids in parts:
            self.readers[s].fill(ids, target, None if len(parts) == 1 else rows, wait=wait)
            labels["source"][rows] = s
            for name, values in self.readers[s].windows.labels(ids).items():  # the same names from each source
                if name not in labels:
                    labels[name] = torch.empty((len(samples), *values.shape[1:]), dtype=values.dtype)
                labels[name][rows] = values
        batch = {**reader.windows.views(target().data), **labels, "index": torch.from_numpy(np.array(samples))}
        return reader.finish(batch)

    def shard_sizes(self, samples: Indices) -> dict[str, int]:
        found: dict[str, int] = {}
        for s, _, ids in self._split(samples):
            if self.readers[s].caches:
                found |= {f"{s}/{path}": size for path, size in self.readers[s].shard_sizes(ids).items()}
        return found

    def cached(self, path: str, stop: Callable[[], bool] = never) -> bool:
        source, _, own = path.partition("/")
        return self.readers[int(source)].cached(own, stop)

"""Windows of arrays that another writer has cut: shards and chunks on any axes, read chunk by chunk."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from .layout import ArraySpec

Box = tuple[slice, ...]


class Cell(NamedTuple):
    """One chunk that a window touches.

    shard: its place in the grid of shards. number: of the chunk in the shard's index (C order).
    source: the wanted part of the chunk. target: where that goes in the window [stop - start, *frame_shape].
    """

    shard: tuple[int, ...]
    number: int
    source: Box
    target: Box


def cells(spec: ArraySpec, index: tuple[int, ...], start: int, stop: int) -> Iterator[Cell]:
    """All chunks of the window [start, stop) of the window axis at `index` on the axes before it."""
    axis = spec.window_axis
    wanted = [(i, i + 1) for i in index] + [(start, stop)] + [(0, n) for n in spec.frame_shape]
    ranges = [range(a // c, (b - 1) // c + 1) for (a, b), c in zip(wanted, spec.chunk_shape, strict=True)]
    for place in itertools.product(*ranges):
        source, target = [], []
        for (a, b), c, p in zip(wanted, spec.chunk_shape, place, strict=True):
            low, high = max(a, p * c), min(b, (p + 1) * c)
            source.append(slice(low - p * c, high - p * c))
            target.append(slice(low - a, high - a))
        shard = tuple(p // n for p, n in zip(place, spec.chunks, strict=True))
        number = 0
        for p, n in zip(place, spec.chunks, strict=True):
            number = number * n + p % n
        yield Cell(shard, number, tuple(source), tuple(target[axis:]))

"""Per-channel mean, standard deviation, minimum and maximum, merged from shards in shard order.

Each shard contributes float64 (count, mean, M2, min, max); merging uses Chan, Golub and LeVeque's pairwise formula, so the
result does not depend on which process wrote which shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError

if TYPE_CHECKING:
    from .array import Array


def partial(values: np.ndarray, channel_axis: int, finite: bool = True) -> dict[str, Any]:
    """Moments of one block of values; {} for an empty one.

    With `finite` all values are taken to be finite; otherwise those that are not are left out, channel by channel.
    """
    if values.size == 0:
        return {}
    axes = tuple(i for i in range(values.ndim) if i != channel_axis)
    block = values.astype(np.float64)
    count = values.size // values.shape[channel_axis]
    if not finite and not (mask := np.isfinite(block)).all():
        return _masked(block, mask, axes)
    mean = block.mean(axes)
    centred = block - np.expand_dims(mean, axes)
    return {
        "count": count,
        "mean": mean.tolist(),
        "m2": np.square(centred).sum(axes).tolist(),
        "min": block.min(axes).tolist(),
        "max": block.max(axes).tolist(),
    }


def _masked(block: np.ndarray, mask: np.ndarray, axes: tuple[int, ...]) -> dict[str, Any]:
    count = mask.sum(axes)
    mean = np.where(mask, block, 0.0).sum(axes) / np.maximum(count, 1)
    centred = np.where(mask, block - np.expand_dims(mean, axes), 0.0)
    big = float(np.finfo(np.float64).max)  # of a channel without any finite value; plain JSON has no infinity
    return {
        "count": count.tolist(),
        "mean": mean.tolist(),
        "m2": np.square(centred).sum(axes).tolist(),
        "min": np.where(mask, block, big).min(axes).tolist(),
        "max": np.where(mask, block, -big).max(axes).tolist(),
    }


def combine(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Moments of several blocks together, in the form of `partial`; {} if all are empty."""
    count: Any = 0
    mean, m2 = np.zeros(1), np.zeros(1)
    low, high = np.full(1, np.inf), np.full(1, -np.inf)
    for part in parts:
        if not part:
            continue
        n, delta = np.asarray(part["count"]), np.asarray(part["mean"]) - mean
        total = count + n
        weight = n / np.maximum(total, 1)
        mean = mean + delta * weight
        m2 = m2 + np.asarray(part["m2"]) + np.square(delta) * (count * weight)
        low, high = np.minimum(low, part["min"]), np.maximum(high, part["max"])
        count = total
    if not np.any(count):
        return {}
    return {
        "count": np.asarray(count).tolist(),
        "mean": mean.tolist(),
        "m2": m2.tolist(),
        "min": low.tolist(),
        "max": high.tolist(),
    }


def merge(parts: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """`{"mean", "std", "min", "max"}`, each a list over channels (population std), of all parts; {} if all are empty."""
    whole = combine(parts)
    if not whole:
        return {}
    std = np.sqrt(np.asarray(whole["m2"]) / np.maximum(whole["count"], 1))
    return {"mean": whole["mean"], "std": std.tolist(), "min": whole["min"], "max": whole["max"]}


def of_split(array: Array, start: int, stop: int, block_bytes: int = 16 * 2**20) -> dict[str, Any]:
    """Statistics of entries [start, stop) of axis 0, read in blocks, as `merge` gives them, and two counts.

    Adds `"count"` (finite values) and `"bad"` (NaN or infinite ones), lists over channels. Needs a `channel` axis.
    """
    if "channel" not in array.dimensions:
        raise DataError(f"{array.store.join(array.name)}: has no channel axis; there is nothing to take statistics of")
    channel, axis = array.dimensions.index("channel"), array.window_axis
    frame = max(1, int(np.prod(array.frame_shape)) * 8)
    step, length = max(1, block_bytes // frame), array.shape[axis]
    whole: dict[str, Any] = {}
    leading = [(start, stop)] + [(0, n) for n in array.shape[1:axis]]
    rows: Iterable[tuple[int, ...]] = itertools.product(*(range(a, b) for a, b in leading)) if axis else [()]
    entries = 0
    for index in rows:
        low, high = (0, length) if axis else (start, stop)
        for a in range(low, high, step):
            block = array.read(index, a, min(a + step, high))
            entries += block.size // array.shape[channel]
            whole = combine([whole, partial(block, channel - axis, finite=False)])
    counts = np.broadcast_to(np.asarray(whole.get("count", 0)), (array.shape[channel],))
    return {**merge([whole]), "count": counts.tolist(), "bad": (entries - counts).tolist()}

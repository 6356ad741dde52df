"""Per-channel mean, standard deviation, minimum and maximum, merged from shards in shard order.

Each shard contributes float64 (count, mean, M2, min, max); merging uses Chan, Golub and LeVeque's pairwise formula, so the
result does not depend on which process wrote which shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def partial(values: np.ndarray, channel_axis: int) -> dict[str, Any]:
    """Moments of one block of values; {} for an empty one."""
    if values.size == 0:
        return {}
    axes = tuple(i for i in range(values.ndim) if i != channel_axis)
    block = values.astype(np.float64)
    mean = block.mean(axes)
    centred = block - np.expand_dims(mean, axes)
    return {
        "count": values.size // values.shape[channel_axis],
        "mean": mean.tolist(),
        "m2": np.square(centred).sum(axes).tolist(),
        "min": block.min(axes).tolist(),
        "max": block.max(axes).tolist(),
    }


def merge(parts: Iterable[dict[str, Any]]) -> dict[str, list[float]]:
    """`{"mean", "std", "min", "max"}`, each a list over channels (population std), of all parts; {} if all are empty."""
    count, mean, m2 = 0, np.zeros(1), np.zeros(1)
    low, high = np.full(1, np.inf), np.full(1, -np.inf)
    for part in parts:
        if not part:
            continue
        n, delta = int(part["count"]), np.asarray(part["mean"]) - mean
        total = count + n
        mean = mean + delta * (n / total)
        m2 = m2 + np.asarray(part["m2"]) + np.square(delta) * (count * n / total)
        low, high = np.minimum(low, part["min"]), np.maximum(high, part["max"])
        count = total
    if not count:
        return {}
    std = np.sqrt(m2 / count)
    return {"mean": mean.tolist(), "std": std.tolist(), "min": low.tolist(), "max": high.tolist()}

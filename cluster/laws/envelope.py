"""Approach 1: the lower envelope of training curves (Hoffmann et al., arXiv:2203.15556).

Valid only where the learning rate had decayed by then: the end of a run with a decaying schedule, or a constant rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.laws.lines import PowerLine, power_line
from cluster.laws.optimise import Array
from cluster.laws.records import DataProblem


@dataclass
class Curve:
    """Loss of one run as it trained: `flops` and `data` (tokens or samples) seen so far, ascending; `n` parameters."""

    name: str
    n: float
    flops: Array
    data: Array
    loss: Array


@dataclass
class Envelope:
    """The best run at each compute: points (flops, n, d, loss) and the power laws through them."""

    flops: Array
    n: Array
    d: Array
    loss: Array
    line_n: PowerLine
    line_d: PowerLine
    warnings: list[str]


def envelope(curves: Sequence[Curve], *, last: float = 0.25, window: float = 0.05, points: int = 1500) -> Envelope:
    """Fits approach 1.

    Args:
        curves: training curves of several sizes, several horizons of each.
        last: the part of each run's compute, from its end, that counts; 1 for a constant learning rate.
        window: losses are averaged over so large a part of the compute spent.
        points: budgets on the envelope.

    Raises:
        DataProblem: fewer than three sizes, or fewer than two of them that are best anywhere inside.
    """
    if not 0 < last <= 1:
        raise ValueError(f"last={last}: must lie in (0, 1]")
    sizes = np.unique([curve.n for curve in curves])
    if len(sizes) < 3:
        raise DataProblem(f"approach 1 needs curves of at least three sizes, got {len(sizes)}")
    kept = [_smooth(curve, last, window) for curve in curves]
    kept = [curve for curve in kept if len(curve.flops) >= 2]
    if not kept:
        raise DataProblem("no training curve has two finite points in the part that counts")
    low, high = min(c.flops[0] for c in kept), max(c.flops[-1] for c in kept)
    grid = np.geomspace(low, high, points)
    table = np.stack(
        [np.interp(np.log(grid), np.log(c.flops), np.log(c.loss), left=np.inf, right=np.inf) for c in kept]
    )
    covered = np.isfinite(table)
    n_of = np.array([c.n for c in kept])
    winner = np.where(covered, table, np.inf).argmin(axis=0)
    chosen, n_best = [], []
    warnings: list[str] = []
    for index, run in enumerate(winner):
        rivals = n_of[covered[:, index]]
        # The smallest or largest of those tried may be beaten by one that was not.
        if len(rivals) and rivals.min() < n_of[run] < rivals.max():
            chosen.append(index)
            n_best.append(n_of[run])
    if len(np.unique(n_best)) < 2:
        raise DataProblem(
            "approach 1: the best run is the smallest or the largest one at nearly every compute: add sizes on both sides"
        )
    if len(chosen) < points / 2:
        warnings.append(f"at {1 - len(chosen) / points:.0%} of the budgets the best size is the edge of those tried")
    rows = np.array(chosen)
    flops, runs = grid[rows], winner[rows]
    n = n_of[runs]
    d = np.array(
        [
            np.exp(np.interp(np.log(c), np.log(kept[r].flops), np.log(kept[r].data)))
            for c, r in zip(flops, runs, strict=True)
        ]
    )
    loss = np.exp(table[runs, rows])
    return Envelope(flops, n, d, loss, power_line(flops, n), power_line(flops, d), warnings)


def _smooth(curve: Curve, last: float, window: float) -> Curve:
    good = np.isfinite(curve.loss) & (curve.loss > 0) & (curve.flops > 0) & (curve.data > 0)
    flops, data, loss = curve.flops[good], curve.data[good], np.log(curve.loss[good])
    if len(flops) > 2 and window > 0:
        sums = np.concatenate([[0.0], np.cumsum(loss)])
        begin = np.searchsorted(flops, flops * (1 - window))
        end = np.searchsorted(flops, flops * (1 + window), side="right")
        # Shrunk at the ends to stay symmetric: a one-sided mean of a falling curve is biased.
        reach = np.minimum(np.arange(len(flops)) - begin, end - 1 - np.arange(len(flops)))
        at = np.arange(len(flops))
        loss = (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)
    tail = flops >= (1 - last) * flops[-1] if len(flops) else np.zeros(0, dtype=bool)
    return Curve(curve.name, curve.n, flops[tail], data[tail], np.exp(loss[tail]))

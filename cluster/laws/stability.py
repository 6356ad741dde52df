"""Where training stops being stable: the largest rate as a law of its own, and how much a rate that is off costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.laws.lines import PowerLine, power_line
from cluster.laws.optimise import Array
from cluster.laws.rates import Cell
from cluster.laws.records import DataProblem


@dataclass
class Boundary:
    """eta_max = coefficient size^exponent; `open_cells` never diverged, so that they bound it from below only."""

    line: PowerLine
    open_cells: list[str]
    contradicted: list[str]


def boundary(found: Sequence[Cell]) -> Boundary:
    """The stability boundary as a law of its own: each cell brackets it between its last stable and first unstable rate.

    Raises:
        DataProblem: fewer than two cells in which some rate diverged.
    """
    closed = [cell for cell in found if math.isfinite(cell.unstable)]
    if len({cell.size for cell in closed}) < 2:
        raise DataProblem(
            f"a stability boundary needs diverged runs at two sizes or more, found them at {len(closed)}: try higher rates"
        )
    size = np.array([cell.size for cell in closed])
    middle = np.array([math.sqrt(cell.stable * cell.unstable) for cell in closed])
    std = np.array([math.log(cell.unstable / cell.stable) / math.sqrt(12) for cell in closed])
    line = power_line(size, middle, std)
    still = [cell for cell in found if not math.isfinite(cell.unstable)]
    against = [cell.name for cell in still if cell.stable > line.at(cell.size)]
    return Boundary(line, [cell.name for cell in still], against)


def sensitivity(loss: Array, initial: float) -> float:
    """LR sensitivity S: mean over the grid of min(loss, initial) minus the least loss (Wortsman et al., arXiv:2309.14322).

    Depends on the grid: compare only over the same one. Diverged runs (NaN, infinite) count as `initial`, the loss before
    training.
    """
    clipped = np.minimum(np.where(np.isnan(loss), np.inf, loss), initial)
    return float(np.mean(clipped - clipped.min()))


def usable_decades(lr: Array, loss: Array, within: float = 0.01) -> float:
    """Decades of rate around the best one over which the loss stays within a part `within` of the least."""
    best = int(np.nanargmin(np.where(np.isfinite(loss), loss, np.nan)))
    good = loss <= loss[best] * (1 + within)
    low = high = best
    while low > 0 and good[low - 1]:
        low -= 1
    while high + 1 < len(lr) and good[high + 1]:
        high += 1
    return float(math.log10(lr[high] / lr[low]))

"""Straight lines in logarithms, weighted, with the error of their slope: what optima against compute are fitted by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from cluster.laws.optimise import Array


@dataclass
class PowerLine:
    """y = coefficient x^exponent.

    Attributes:
        exponent: slope of ln y on ln x.
        coefficient: y at x = 1.
        se: standard error of the exponent from the scatter about the line; NaN with two points.
        points: how many.
        low, high: 95% interval of the exponent (Student's t; or of draws, where there are any).
    """

    exponent: float
    coefficient: float
    se: float
    points: int
    low: float
    high: float

    def at(self, x: float) -> float:
        """y at x; infinite or zero where that overflows."""
        with np.errstate(over="ignore", under="ignore"):
            return float(np.exp(math.log(self.coefficient) + self.exponent * math.log(x)))


# Two-sided 95% points of Student's t for 1, 2, ... degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def student(freedom: int) -> float:
    """Half-width of a 95% interval in standard errors."""
    if freedom < 1:
        return math.inf
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.5 / freedom


def power_line(x: Array, y: Array, std: Array | None = None) -> PowerLine:
    """Least squares of ln y on ln x with weights 1/std^2, std being that of ln y.

    Raises:
        ValueError: fewer than two different x, or values that are not positive.
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 2 or np.ptp(x) == 0:
        raise ValueError(f"a power law needs at least two different abscissae, got {len(x)}")
    if not ((x > 0).all() and (y > 0).all()):
        raise ValueError("a power law needs positive values")
    slope, level = slopes(np.log(x), np.log(y)[None], std)
    se = math.nan
    freedom = len(x) - 2
    if freedom > 0:
        weights = np.ones(len(x)) if std is None else 1 / np.asarray(std) ** 2
        centred = np.log(x) - np.average(np.log(x), weights=weights)
        rest = np.log(y) - level[0] - slope[0] * np.log(x)
        se = math.sqrt(float(weights @ rest**2) / freedom / float(weights @ centred**2))
    half = student(freedom) * se if freedom > 0 else math.inf
    return PowerLine(
        float(slope[0]), float(np.exp(level[0])), se, len(x), float(slope[0]) - half, float(slope[0]) + half
    )


def slopes(x: Array, y: Array, std: Array | None = None) -> tuple[Array, Array]:
    """Slopes and intercepts of weighted lines through each row of `y` [S, n] over `x` [n]; NaN in y leaves a point out."""
    weights = np.broadcast_to(1.0 if std is None else 1 / np.asarray(std, dtype=float) ** 2, y.shape)
    good = np.isfinite(y)
    w = np.where(good, weights, 0.0)
    filled = np.where(good, y, 0.0)
    total = w.sum(axis=1)
    with np.errstate(all="ignore"):
        mx, my = (w @ x) / total, (w * filled).sum(axis=1) / total
        dx = x[None] - mx[:, None]
        slope = (w * dx * filled).sum(axis=1) / (w * dx * dx).sum(axis=1)
    return slope, my - slope * mx


def excess_scatter(x: Array, y: Array, std: Array) -> float:
    """Scatter about the line that `std` does not explain (moment estimator of DerSimonian and Laird, 1986).

    A few budgets with sharp minima would otherwise outvote all others although no optimum is exactly on a power law.
    """
    if len(x) < 3:
        return 0.0
    w = 1 / std**2
    slope, level = slopes(x, y[None], std)
    rest = float(w @ (y - level[0] - slope[0] * x) ** 2)
    design = np.stack([np.ones_like(x), x], axis=1)
    inner = np.linalg.inv(design.T @ (design * w[:, None]))
    trace = w.sum() - float(np.trace(inner @ (design.T @ (design * (w**2)[:, None]))))
    return math.sqrt(max(0.0, (rest - (len(x) - 2)) / trace))


def parabolas(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """(curvature, vertex, value at the vertex) of least-squares parabolas through each row of `y` [S, n] over `x` [n].

    The vertex is NaN where the curvature is not positive: a concave parabola has a maximum there, no optimum.
    """
    centre = x.mean()
    q2, q1, q0 = np.polynomial.polynomial.polyfit(x - centre, y.T, 2)[::-1]
    with np.errstate(all="ignore"):
        vertex = np.where(q2 > 0, -q1 / (2 * q2), np.nan)
        value = q0 + q1 * vertex + q2 * vertex**2
    return q2, vertex + centre, value

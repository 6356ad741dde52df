"""One optimiser for every law: damped Newton on many starts, or many resamples, at once.

What is minimised is `sum_i weight_i Huber_delta(f(theta; x_i) - y_i)`, in units of y squared. With a small delta this
is nearly an L1 problem, on which quasi-Newton methods with default tolerances stop anywhere. Three things make it quick
and repeatable here: delta is lowered from least squares to its final value (the smooth problem has the wide basin), the
Hessian is exact, and starts that have met are followed as one.

Shapes: S starts or resamples, P parameters, n points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

CONVERGED, MAX_ITER, ABNORMAL = "CONVERGED", "MAX_ITER", "ABNORMAL"
BOUND_HIT, INIT_UNCHANGED = "BOUND_HIT", "INIT_UNCHANGED"
_CHUNK = 128  # starts at once: their arrays then stay near the processor
_GRADIENT = 1e-7  # of the largest gradient that the residuals could make
_BENT, _BENT_EARLY = 0.01, 0.1  # of the curvature of a parabola that touches Huber's loss there and lies above it
_AT_BOUND = 1e-3
_POLISHED = 10
_STALLED = 12  # rejected steps in a row: rounding, not the model, decides from there


class Model(Protocol):
    """A law on given points: see `cluster.laws.forms.base`."""

    @property
    def size(self) -> int: ...

    def evaluate(self, theta: Array) -> tuple[Array, Any]:
        """Predictions [S, n] at `theta` [S, P], and whatever `derivatives` can reuse."""

    def derivatives(
        self, theta: Array, kept: Any, slope: Array, curve: Array, exact: bool = True
    ) -> tuple[Array, Array]:
        """Gradient [S, P] and Hessian [S, P, P] of the objective whose derivatives in f are `slope`, `curve` [S, n].

        `exact=False` leaves out the second derivatives of f (Gauss-Newton).
        """

    def jacobian(self, theta: Array) -> Array:
        """df/dtheta [S, n, P]."""


@dataclass
class Outcome:
    """What `minimise` reached from each start.

    Attributes:
        theta: parameters [S, P].
        objective: summed Huber loss [S].
        gradient: largest gradient component relative to the largest possible one [S].
        status: one of the status names, per start.
        iterations: Newton steps over all stages.
    """

    theta: Array
    objective: Array
    gradient: Array
    status: list[str]
    iterations: int

    @property
    def best(self) -> int:
        """The start with the smallest objective."""
        return int(np.nanargmin(np.where(np.isfinite(self.objective), self.objective, np.inf)))


def huber(residual: Array, delta: float) -> tuple[Array, Array, Array]:
    """Huber's loss, its first and its second derivative; `delta=inf` is half the square."""
    if not np.isfinite(delta):
        return 0.5 * residual * residual, residual, np.ones_like(residual)
    slope = np.clip(residual, -delta, delta)
    return slope * (residual - 0.5 * slope), slope, (np.abs(residual) <= delta).astype(float)


def minimise(
    model: Model,
    target: Array,
    starts: Array,
    *,
    delta: float,
    weights: Array | None = None,
    bounds: tuple[Array, Array] | None = None,
    stages: tuple[float, ...] | None = None,
    iterations: int = 60,
) -> Outcome:
    """Minimises the weighted Huber loss from all `starts` together.

    Args:
        model: the law on its points.
        target: what it should give [n].
        starts: initial parameters [S, P].
        delta: where Huber's loss turns from square to linear, in units of `target`.
        weights: of the points, [n] or one row a start [S, n]; None: all one. Rows make starts independent problems.
        bounds: lowest and highest value of each parameter, [P] each.
        stages: values of delta before the final one, each started where the last ended.
        iterations: most Newton steps of an early stage; the last one may take ten times as many.

    Returns:
        The outcome, start by start, in the order of `starts`.
    """
    starts = np.array(starts, dtype=float, ndmin=2)
    low, high = bounds if bounds is not None else (np.full(model.size, -np.inf), np.full(model.size, np.inf))
    theta = np.clip(starts, low, high)
    shared = weights is None or weights.ndim == 1
    rows = np.ones(len(target)) if weights is None else weights
    ladder = [delta * factor for factor in (1e4, 30, 10, 3)] if stages is None else list(stages)
    steps = 0
    groups = np.arange(len(theta))
    early = [stage for stage in ladder if stage > delta] if np.isfinite(delta) else [delta] if stages is None else []
    for stage in early:
        # Starts meet long before they settle: the early stages pause to merge them.
        merging = shared and len(theta) > 64
        for budget in (6, 6, 12, iterations // 2) if merging else (iterations,):
            theta, taken = _stage(model, target, theta, rows, stage, low, high, budget, 1e-3)
            steps += taken
            if merging:
                kept, joined = _merge(theta)
                theta, groups = theta[kept], joined[groups]
    theta, taken = _stage(model, target, theta, rows, delta, low, high, 2 * iterations, 1e-7)
    steps += taken
    objective, gradient = _measure(model, target, theta, rows, delta, low, high)
    # A long curved valley takes longer: the best starts, or those of problems of their own, get the time.
    late = np.flatnonzero(gradient > _GRADIENT)
    late = late[np.argsort(objective[late])][:_POLISHED] if shared else late
    if len(late):
        part = rows if shared else rows[late]
        theta[late], taken = _stage(model, target, theta[late], part, delta, low, high, 10 * iterations, 1e-7)
        steps += taken
        objective[late], gradient[late] = _measure(model, target, theta[late], part, delta, low, high)
    theta, objective, gradient = theta[groups], objective[groups], gradient[groups]
    status = [
        _status(start, end, f, g, low, high)
        for start, end, f, g in zip(starts, theta, objective, gradient, strict=True)
    ]
    return Outcome(theta, objective, gradient, status, steps)


def _stage(
    model: Model,
    target: Array,
    theta: Array,
    weights: Array,
    delta: float,
    low: Array,
    high: Array,
    iterations: int,
    tolerance: float,
) -> tuple[Array, int]:
    out = theta.copy()
    most = 0
    for begin in range(0, len(theta), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        weight = weights if weights.ndim == 1 else weights[rows]
        out[rows], steps = _newton(model, target, theta[rows], weight, delta, low, high, iterations, tolerance)
        most = max(most, steps)
    return out, most


def _newton(
    model: Model,
    target: Array,
    theta: Array,
    weights: Array,
    delta: float,
    low: Array,
    high: Array,
    iterations: int,
    tolerance: float,
) -> tuple[Array, int]:
    """Damped Newton steps on one chunk; finished starts leave the batch."""
    result = theta.copy()
    active = np.arange(len(theta))
    exact = tolerance < 1e-5  # far from an optimum, Gauss-Newton is the better guide
    x, w = theta.copy(), weights
    f, kept, residual = _value(model, target, x, w, delta)
    damping = np.full(len(x), 1e-2)
    rejected = np.zeros(len(x), dtype=int)
    gradient, hessian = _derivatives(model, x, kept, residual, w, delta, exact)
    steps = 0
    for _ in range(iterations):
        steps += 1
        move, expected = _step(gradient, hessian, damping, x, low, high)
        trial = np.clip(x + move, low, high)
        f_new, kept, residual = _value(model, target, trial, w, delta)
        better = f_new < f
        gain = np.where(better, f - f_new, 0.0)
        good = better & (gain > 0.25 * expected)
        damping = np.where(good, damping * 0.2, np.where(better, damping, np.maximum(damping, 1e-8) * 6))
        damping = np.clip(damping, 1e-14, 1e14)
        rejected = np.where(better, 0, rejected + 1)
        size = np.abs(move).max(axis=1) / (1 + np.abs(x).max(axis=1))
        done = (rejected >= _STALLED) | ((expected <= tolerance * 1e-6 * f) & (size < tolerance)) | (size < 1e-15)
        if better.any():
            x[better], f[better] = trial[better], f_new[better]
            part = w if w.ndim == 1 else w[better]
            kept = _select(kept, better)
            gradient[better], hessian[better] = _derivatives(
                model, x[better], kept, residual[better], part, delta, exact
            )
        if done.any():
            result[active[done]] = x[done]
            rest = ~done
            active, x, f, damping, rejected = active[rest], x[rest], f[rest], damping[rest], rejected[rest]
            gradient, hessian = gradient[rest], hessian[rest]
            w = w if w.ndim == 1 else w[rest]
        if not len(active):
            break
    result[active] = x
    return result, steps


def _value(model: Model, target: Array, theta: Array, w: Array, delta: float) -> tuple[Array, Any, Array]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        prediction, kept = model.evaluate(theta)
        residual = prediction - target
        loss, _, _ = huber(residual, delta)
        total = loss @ w if w.ndim == 1 else np.einsum("sn,sn->s", loss, w)
    return np.where(np.isfinite(total), total, np.inf), kept, residual


def _derivatives(
    model: Model, theta: Array, kept: Any, residual: Array, w: Array, delta: float, exact: bool = True
) -> tuple[Array, Array]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore", under="ignore"):
        _, slope, curve = huber(residual, delta)
        if np.isfinite(delta):
            # Beyond delta the loss is straight: with no curvature at all there, a start far away would have no scale.
            share = _BENT if exact else _BENT_EARLY
            curve = np.maximum(curve, share * delta / np.maximum(np.abs(residual), delta))
        gradient, hessian = model.derivatives(theta, kept, slope * w, curve * w, exact)
    return np.nan_to_num(gradient), np.nan_to_num(hessian)


def _step(gradient: Array, hessian: Array, damping: Array, x: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Newton step with the absolute values of the (scaled) Hessian's eigenvalues, and the decrease that it promises."""
    held = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
    gradient = np.where(held, 0.0, gradient)
    diagonal = np.abs(np.einsum("spp->sp", hessian))
    largest = diagonal.max(axis=1, keepdims=True)
    scale = 1 / np.sqrt(np.maximum(diagonal, 1e-10 * largest + 1e-300))
    scale = np.where(held, 0.0, scale)
    scaled = np.clip(hessian * scale[:, :, None] * scale[:, None, :], -1e6, 1e6)
    values, vectors = np.linalg.eigh(scaled)
    along = np.einsum("spq,sp->sq", vectors, gradient * scale)
    size = np.maximum(np.abs(values), 1e-13) + damping[:, None]
    move = -np.einsum("spq,sq->sp", vectors, along / size) * scale
    longest = np.abs(move).max(axis=1, keepdims=True)
    move = move * np.minimum(1.0, 5.0 / np.maximum(longest, 1e-300))  # parameters are logs and exponents: 5 is far
    expected = 0.5 * np.einsum("sq,sq->s", along, along / size)
    return move, expected


def _merge(theta: Array) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Which starts to follow on, and for each start which of those stands for it."""
    rounded = np.round(np.clip(theta, -1e6, 1e6) * 1e3)
    _, kept, joined = np.unique(rounded, axis=0, return_index=True, return_inverse=True)
    return kept, joined.reshape(-1)


def _measure(
    model: Model, target: Array, theta: Array, weights: Array, delta: float, low: Array, high: Array
) -> tuple[Array, Array]:
    objective, relative = np.empty(len(theta)), np.empty(len(theta))
    for begin in range(0, len(theta), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        x, w = theta[rows], weights if weights.ndim == 1 else weights[rows]
        objective[rows], kept, residual = _value(model, target, x, w, delta)
        gradient, _ = _derivatives(model, x, kept, residual, w, delta)
        jacobian = model.jacobian(x)
        held = ((x <= low) & (gradient > 0)) | ((x >= high) & (gradient < 0))
        _, slope, _ = huber(residual, delta)
        most = np.einsum("sn,snp->sp", np.abs(slope * w), np.abs(jacobian)).max(axis=1)
        relative[rows] = np.where(held, 0.0, np.abs(gradient)).max(axis=1) / np.maximum(most, 1e-300)
        relative[rows] = np.where(most < 1e-13, 0.0, relative[rows])  # an exact fit leaves only rounding
    return objective, relative


def _status(start: Array, end: Array, objective: float, gradient: float, low: Array, high: Array) -> str:
    if not np.isfinite(objective) or not np.isfinite(end).all():
        return ABNORMAL
    settled = gradient <= _GRADIENT
    if not settled and np.array_equal(start, end):
        return INIT_UNCHANGED
    if ((end <= low + _AT_BOUND) | (end >= high - _AT_BOUND)).any():
        return BOUND_HIT
    return CONVERGED if settled else MAX_ITER


def _select(kept: Any, rows: NDArray[np.bool_]) -> Any:
    return tuple(item[rows] for item in kept)

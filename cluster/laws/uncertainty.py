"""How far a fitted number can be trusted: resampling, seed noise, other forms, single runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.laws.allocation import allocate, interval
from cluster.laws.fit import Fit, FitError, fit, vpnls
from cluster.laws.optimise import Array
from cluster.laws.records import DataProblem, Runs


@dataclass
class Influence:
    """What leaving out one run does: `shift` of ln N* at the target budget, run by run."""

    names: list[str]
    shift: Array

    @property
    def most(self) -> tuple[str, float]:
        """The run that moves the answer most, and by how much."""
        index = int(np.argmax(np.abs(self.shift)))
        return self.names[index], float(self.shift[index])


@dataclass
class Spread:
    """One quantity by several methods.

    Attributes:
        estimates: method -> (value, interval or None).
        union: smallest interval that covers all of them.
        alarm: says which methods disagree beyond their intervals; empty: none does.
    """

    estimates: dict[str, tuple[float, tuple[float, float] | None]]
    union: tuple[float, float]
    alarm: str = ""
    failed: dict[str, str] = field(default_factory=dict)


def pairs(found: Fit, draws: int = 1000, seed: int = 0) -> Array:
    """Parameters [draws, P] refitted to runs drawn with replacement, each from the optimum."""
    rng = np.random.default_rng(seed)
    count = len(found.loss)
    picks = rng.integers(0, count, (draws, count))
    return found.refit(_counts(picks, count))


def blocks(found: Fit, labels: Array, draws: int = 1000, seed: int = 0) -> Array:
    """As `pairs`, but whole groups (budgets, ladders) are drawn: runs that share tuning are no independent evidence.

    Raises:
        DataProblem: fewer than three groups.
    """
    kinds, group = np.unique(labels, return_inverse=True)
    if len(kinds) < 3:
        raise DataProblem(f"{len(kinds)} budgets: a bootstrap over budgets needs at least three")
    rng = np.random.default_rng(seed)
    weights = _counts(rng.integers(0, len(kinds), (draws, len(kinds))), len(kinds))[:, group.reshape(-1)]
    distinct = (weights > 0) @ np.eye(len(kinds))[group.reshape(-1)] > 0
    return found.refit(weights[distinct.sum(axis=1) >= 2])


def noise(found: Fit, sigma: float, draws: int = 1000, seed: int = 0) -> Array:
    """Parameters refitted to the fitted losses with seed noise of `sigma` (of log loss): what one more set of seeds
    would give."""
    from cluster.laws.optimise import minimise

    rng = np.random.default_rng(seed)
    fitted = found.law.evaluate(found.theta[None])[0][0]
    out = []
    for _ in range(draws):
        target = fitted + sigma * rng.standard_normal(len(fitted))
        out.append(
            minimise(
                found.law, target, found.theta[None], delta=found.delta, bounds=found.law.bounds(), stages=()
            ).theta[0]
        )
    return np.array(out)


def seed_noise(runs: Runs, axes: Sequence[str]) -> float | None:
    """Standard deviation of log loss over seeds, pooled over cells with at least three; None when no cell has."""
    if "seed" not in runs:
        return None
    keys = np.stack([runs[name] for name in axes], axis=1)
    _, cell = np.unique(keys, axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    logs = np.log(runs["loss"])
    groups = [logs[cell == c] for c in np.unique(cell) if (cell == c).sum() >= 3]
    if not groups:
        return None
    freedom = sum(len(g) - 1 for g in groups)
    return math.sqrt(sum(float(((g - g.mean()) ** 2).sum()) for g in groups) / freedom)


def influence(found: Fit, flops: float, per_pair: float = 6.0) -> Influence:
    """Refits without each run in turn; shifts are of ln N* at `flops` (exponents for laws without an optimum)."""
    count = len(found.loss)
    thetas = found.refit(1.0 - np.eye(count))
    if found.plannable:
        base = math.log(allocate(found.values, flops, per_pair).n)
        shift = np.log(allocate(found.law.natural(thetas), flops, per_pair).n) - base
    else:
        index = next((i for i, name in enumerate(found.law.names) if not name.startswith("log_")), 0)
        shift = thetas[:, index] - found.theta[index]
    return Influence(found.names, shift)


def bands(found: Fit, thetas: Array, level: float = 0.95) -> dict[str, dict[str, Any]]:
    """Each natural parameter with its standard error and interval over resamples [S, P]."""
    samples, values = found.law.natural(thetas), dict(found.values)
    if found.plannable and "beta" in samples:
        samples["a"] = samples["beta"] / (samples["alpha"] + samples["beta"])
        values["a"] = values["beta"] / (values["alpha"] + values["beta"])
    return {
        name: {"value": values[name], "se": float(np.std(sample, ddof=1)), "interval": interval(sample, level)}
        for name, sample in samples.items()
    }


def model_spread(
    found: Fit,
    runs: Runs,
    flops: float,
    thetas: Array,
    *,
    per_pair: float = 6.0,
    extra: dict[str, tuple[float, tuple[float, float] | None]] | None = None,
) -> Spread:
    """N* at `flops` by approach 3, VPNLS, tied exponents, and approach 3 without the largest budget.

    Args:
        found: the fit of approach 3.
        runs: what it was fitted to.
        flops: the target budget.
        thetas: resampled parameters of `found`, for its interval.
        per_pair: k of C = k N D.
        extra: further estimates of N* (approach 2).
    """
    own = allocate(found.law.natural(thetas), flops, per_pair).n
    estimates: dict[str, tuple[float, tuple[float, float] | None]] = {
        "approach 3": (allocate(found.values, flops, per_pair).n, interval(np.asarray(own)))
    }
    failed: dict[str, str] = {}
    budget = runs["n"] * runs["d"]
    smaller = runs.keep(budget < budget.max() / 1.2)
    others: dict[str, Callable[[], Fit]] = {
        "VPNLS": lambda: vpnls(runs),
        "tied exponents": lambda: fit("tied", runs),
        "without the largest budget": lambda: fit("chinchilla", smaller, delta=found.delta),
    }
    for name, make in others.items():
        try:
            other = make()
            sample = pairs(other, 300)
            estimates[name] = (
                allocate(other.values, flops, per_pair).n,
                interval(np.asarray(allocate(other.law.natural(sample), flops, per_pair).n)),
            )
        except (DataProblem, FitError, ValueError) as error:
            failed[name] = str(error)
    estimates |= extra or {}
    return Spread(estimates, union(estimates), disagreement(estimates), failed)


def union(estimates: dict[str, tuple[float, tuple[float, float] | None]]) -> tuple[float, float]:
    """The smallest interval that holds every method's value and interval."""
    ends = [end for value, band in estimates.values() for end in (value, *(band or ())) if math.isfinite(end)]
    return (min(ends), max(ends)) if ends else (math.nan, math.nan)


def disagreement(estimates: dict[str, tuple[float, tuple[float, float] | None]]) -> str:
    """One line naming two methods whose intervals do not meet; empty when all do."""
    with_bands = {name: item for name, item in estimates.items() if item[1] and all(map(math.isfinite, item[1]))}
    names = list(with_bands)
    worst, text = 0.0, ""
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            (x, xb), (y, yb) = with_bands[one], with_bands[other]
            assert xb is not None and yb is not None
            # Half-widths add in quadrature: both are estimates from the same runs.
            half = math.hypot(math.log(xb[1] / xb[0]) / 2, math.log(yb[1] / yb[0]) / 2)
            distance = abs(math.log(x / y))
            if distance > half and distance - half > worst:
                worst, text = distance - half, f"{one} and {other} disagree: {x:.4g} against {y:.4g}"
    return text


def _counts(picks: NDArray[Any], count: int) -> Array:
    offset = picks + count * np.arange(len(picks))[:, None]
    return np.bincount(offset.ravel(), minlength=count * len(picks)).reshape(len(picks), count).astype(float)

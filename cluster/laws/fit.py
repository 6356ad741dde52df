"""Point fits: one law on one set of runs, with everything that says whether to believe the number."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.laws.forms import Law, LogSum, lookup
from cluster.laws.optimise import (
    ABNORMAL,
    BOUND_HIT,
    CONVERGED,
    INIT_UNCHANGED,
    MAX_ITER,
    Array,
    Outcome,
    huber,
    minimise,
)
from cluster.laws.records import DataProblem, Runs, usable

DELTA = 1e-3  # of log loss: arXiv:2203.15556, appendix D.3
_MOST_CONDITION = 1e10
_LEAST_VALUES = 3  # of an axis: its coefficient, its exponent and the floor
_SAME = 1e-4  # relative, of two objectives that count as one optimum


class FitError(ValueError):
    """A fit that did not end at an optimum: there is no number to report."""


@dataclass
class Fit:
    """A fitted law.

    Attributes:
        form: its name in `cluster.laws.forms.FORMS`.
        law: bound to the points.
        theta: parameters as fitted [P]; `values` as people write them.
        loss: observed losses [n]; `names` of their runs.
        objective: summed Huber loss of log residuals (VPNLS: half the summed squares of residuals).
        delta: Huber's threshold, in log loss; infinite for least squares.
        raw: whether residuals are of the loss itself (VPNLS), not of its logarithm.
        gradient: largest component, relative to the largest possible.
        condition: condition number of the Jacobian in the fitted (centred, logarithmic) parameters.
        reached: fraction of the starts that end within 1e-4 of the best objective.
        status: CONVERGED or BOUND_HIT; anything else raises before a Fit is made, unless `strict=False`.
    """

    form: str
    law: Law
    theta: Array
    loss: Array
    names: list[str]
    objective: float
    delta: float
    raw: bool
    gradient: float
    condition: float
    reached: float
    starts: int
    status: str
    warnings: list[str] = field(default_factory=list)

    @property
    def values(self) -> dict[str, float]:
        return {name: float(value[0]) for name, value in self.law.natural(self.theta[None]).items()}

    @property
    def plannable(self) -> bool:
        """Whether the law has a compute-optimal N and D."""
        return self.form in ("chinchilla", "tied") and all(self.values[name] > 0 for name in ("alpha", "A", "B"))

    @property
    def residuals(self) -> Array:
        """log of predicted over observed loss [n]."""
        return self.law.evaluate(self.theta[None])[0][0] - np.log(self.loss)

    def predict(self, theta: Array | None = None, **axes: Any) -> Array:
        """Losses at `axes` (n, d, ...): [n], or [S, n] for resampled parameters `theta` [S, P]."""
        arrays = {name: np.atleast_1d(np.asarray(values, dtype=float)) for name, values in axes.items()}
        found = self.law.predict(self.theta[None] if theta is None else theta, arrays)
        return found[0] if theta is None else found

    def refit(self, weights: Array) -> Array:
        """Parameters [S, P] with the points weighted by each row of `weights` [S, n], from this optimum."""
        starts = np.repeat(self.theta[None], len(weights), axis=0)
        return _run(self.law, self.loss, starts, self.delta, self.raw, weights, ()).theta

    def summary(self) -> dict[str, Any]:
        """What the JSON report says of this fit."""
        return {
            "form": self.form,
            "law": self.law.title,
            "source": self.law.source,
            "parameters": self.values,
            "objective": self.objective,
            "delta": self.delta if math.isfinite(self.delta) else "least squares",
            "residuals_of": "loss" if self.raw else "log loss",
            "rms_log_residual": float(np.sqrt(np.mean(self.residuals**2))),
            "points": len(self.loss),
            "status": self.status,
            "gradient": self.gradient,
            "condition": self.condition,
            "starts": self.starts,
            "starts_at_optimum": self.reached,
            "warnings": self.warnings,
        }


class _Raw:
    """A law whose residuals are taken of the loss, not of its logarithm."""

    def __init__(self, law: Law) -> None:
        self._law = law

    @property
    def size(self) -> int:
        return self._law.size

    def evaluate(self, theta: Array) -> tuple[Array, Any]:
        log, kept = self._law.evaluate(theta)
        loss = np.exp(log)
        return loss, (loss, *kept)

    def jacobian(self, theta: Array) -> Array:
        return self.evaluate(theta)[0][:, :, None] * self._law.jacobian(theta)

    def derivatives(
        self, theta: Array, kept: Any, slope: Array, curve: Array, exact: bool = True
    ) -> tuple[Array, Array]:
        loss, *rest = kept
        bent = curve * loss * loss + (slope * loss if exact else 0.0)
        return self._law.derivatives(theta, tuple(rest), slope * loss, bent, exact)


def fit(
    form: str,
    runs: Runs,
    *,
    delta: float = DELTA,
    starts: Array | str | None = None,
    raw: bool = False,
    strict: bool = True,
    weights: Array | None = None,
) -> Fit:
    """Fits the law `form` to `runs`, from many starts.

    Args:
        form: a name in `cluster.laws.forms.FORMS`.
        runs: with the columns of the law's axes and `loss`.
        delta: Huber's threshold in log loss; `math.inf` for least squares.
        starts: parameters [S, P] in the law's own (centred) coordinates; "grid" for the 4,500 of arXiv:2203.15556
            (chinchilla only); None for the law's own.
        raw: residuals of the loss itself.
        strict: raise when the optimum was not reached.
        weights: of the points [n].

    Raises:
        DataProblem: too few points, or an axis with one value only.
        FitError: no start ended at an optimum.
    """
    kind = lookup(form)
    runs = usable(runs, kind.axes_needed)
    _enough(form, kind, runs)
    loss = runs["loss"]
    law = kind(runs.axes(kind.axes_needed), loss)
    initial = _starts(law, starts)
    outcome = _run(law, loss, initial, delta, raw, weights, None)
    outcome = _without_lost_terms(law, loss, outcome, delta, raw, weights)
    best = outcome.best
    theta, objective, status = outcome.theta[best], float(outcome.objective[best]), outcome.status[best]
    if status == MAX_ITER and _descends_no_more(law, loss, theta, delta, raw):
        status = CONVERGED
    reached = float(
        np.mean(outcome.objective <= objective * (1 + _SAME) + 1e-18 * len(loss))
    )  # rounding counts as none
    found = Fit(
        form=form,
        law=law,
        theta=theta,
        loss=loss,
        names=runs.names,
        objective=objective,
        delta=delta,
        raw=raw,
        gradient=float(outcome.gradient[best]),
        condition=_condition(law, theta),
        reached=reached,
        starts=len(initial),
        status=status,
        warnings=[*runs.warnings, *design_warnings(kind, runs)],
    )
    _judge(found, strict)
    return found


def vpnls(runs: Runs, form: str = "chinchilla") -> Fit:
    """Least squares on the loss itself: exponents on a grid with the coefficients solved for, the best cells polished.

    Raises:
        DataProblem: as `fit`.
        FitError: as `fit`.
    """
    kind = lookup(form)
    if not issubclass(kind, LogSum):
        raise ValueError(f"{form} is no sum of powers: fit it with raw=True")
    kept = usable(runs, kind.axes_needed)
    _enough(form, kind, kept)
    law = kind(kept.axes(kind.axes_needed), kept["loss"])
    return fit(form, runs, delta=math.inf, raw=True, starts=_projected_starts(law, kept["loss"]))


def _projected_starts(law: LogSum, loss: Array, best: int = 12) -> Array:
    exponents = [name for name in law.names if not name.startswith("log_")]
    ladder = np.arange(0.05, 1.01, 0.05 if len(exponents) < 3 else 0.2)
    found: list[tuple[float, Array]] = []
    grid = np.stack(np.meshgrid(*[ladder] * len(exponents), indexing="ij"), -1).reshape(-1, len(exponents))
    for exponent in grid:
        values = dict(zip(exponents, exponent, strict=True))
        columns = [
            np.exp(sum((sign * values[name] * law.logs[axis] for name, axis, sign in powers), np.zeros(len(loss))))
            for _, powers in law.terms
        ]
        matrix = np.stack(columns, axis=1)
        coefficients, rest = nonnegative(matrix, loss)
        logs = np.log(np.maximum(coefficients, 1e-6 * loss.mean()))
        theta = {**values, **{name: log for (name, _), log in zip(law.terms, logs, strict=True)}}
        found.append((rest, np.array([theta[name] for name in law.names])))
    found.sort(key=lambda item: item[0])
    return np.array([theta for _, theta in found[:best]])


def nonnegative(matrix: Array, target: Array) -> tuple[Array, float]:
    """Non-negative least squares for the few columns of a law, over every set of columns; (coefficients, residual)."""
    count = matrix.shape[1]
    gram, moment, total = matrix.T @ matrix, matrix.T @ target, float(target @ target)
    best, least = np.zeros(count), total
    for mask in range(1, 2**count):
        chosen = [i for i in range(count) if mask >> i & 1]
        try:
            part = np.linalg.solve(gram[np.ix_(chosen, chosen)], moment[chosen])
        except np.linalg.LinAlgError:
            continue
        if (part < 0).any():
            continue
        rest = total - float(part @ moment[chosen])
        if rest < least:
            best, least = np.zeros(count), rest
            best[chosen] = part
    return best, least


def _run(
    law: Law,
    loss: Array,
    starts: Array,
    delta: float,
    raw: bool,
    weights: Array | None,
    stages: tuple[float, ...] | None,
) -> Outcome:
    model, target = (_Raw(law), loss) if raw else (law, np.log(loss))
    return minimise(model, target, starts, delta=delta, weights=weights, bounds=law.bounds(), stages=stages)


def _without_lost_terms(
    law: Law, loss: Array, outcome: Outcome, delta: float, raw: bool, weights: Array | None
) -> Outcome:
    """A term that the runs do not ask for fades without end; its coefficient is put on its bound, and the rest refitted.

    The result is taken where it is as good, so that the fit ends with BOUND_HIT rather than in mid-descent.
    """
    best = outcome.best
    if not isinstance(law, LogSum) or outcome.status[best] != MAX_ITER:
        return outcome
    low, _ = law.bounds()
    theta = outcome.theta[best]
    shares = law.evaluate(theta[None])[1][0][0].max(axis=1)
    starts = []
    for (name, _), share in zip(law.terms, shares, strict=True):
        if share < 0.5:
            start = theta.copy()
            start[law.names.index(name)] = low[law.names.index(name)]
            starts.append(start)
    if not starts:
        return outcome
    other = _run(law, loss, np.array(starts), delta, raw, weights, ())
    nearly = outcome.objective[best] * (1 + 1e-6) + 1e-15 * len(loss)
    return other if other.objective[other.best] <= nearly else outcome


def _starts(law: Law, starts: Array | str | None) -> Array:
    if isinstance(starts, str):
        grid = getattr(law, "grid", None)
        if starts != "grid" or grid is None:
            raise ValueError(f"starts='{starts}': only 'grid' has a name, and only the law chinchilla has one")
        return np.asarray(grid())
    return law.starts() if starts is None else np.atleast_2d(starts)


def _enough(form: str, kind: type[Law], runs: Runs) -> None:
    if len(runs) < len(kind.names) + 1:
        named = f" ({'; '.join(runs.warnings)})" if runs.warnings else ""
        raise DataProblem(
            f"{form} has {len(kind.names)} parameters and needs at least {len(kind.names) + 1} runs, but only {len(runs)} "
            f"can be used{named}"
        )
    for axis in kind.axes_needed:
        values = runs[axis]
        if np.ptp(np.log(values)) < 1e-9:
            raise DataProblem(
                f"all runs have {axis}={values[0]:g}: its exponent cannot be fitted; vary it, or choose a law without it"
            )


def design_warnings(kind: type[Law], runs: Runs) -> list[str]:
    """What about the runs themselves leaves a law undetermined, however well it fits."""
    found = []
    values = {axis: len(np.unique(np.log(runs[axis]).round(9))) for axis in kind.axes_needed}
    for exponent, axes in _exponents(kind).items():
        if all(values[axis] < _LEAST_VALUES for axis in axes):
            told = " and ".join(f"{axis} has {values[axis]} values" for axis in axes)
            found.append(
                f"{exponent} is not identified: {told}, and a coefficient, an exponent and the floor take three; vary "
                f"{' or '.join(axes)}"
            )
    if {"n", "d"} <= set(kind.axes_needed):
        n, d = np.log(runs["n"]), np.log(runs["d"])
        if np.ptp(d - n) < math.log(1.5) < np.ptp(n):
            found.append(
                "D/N is nearly the same in all runs: A and B cannot be told apart (a line, not a plane, of points); vary it"
            )
        budget = n + d
        if np.ptp(budget) < math.log(1.5):
            found.append("all runs have one budget N*D: the law cannot be extrapolated to another")
    return found


def _exponents(kind: type[Law]) -> dict[str, tuple[str, ...]]:
    """Exponent -> the axes that it is a power of, in a law with a floor."""
    if "log_E" not in kind.names:
        return {}
    if not issubclass(kind, LogSum):
        return {f"the exponent of {axis}": (axis,) for axis in kind.axes_needed}
    found: dict[str, tuple[str, ...]] = {}
    for _, powers in kind.terms:
        for exponent, axis, _ in powers:
            found[exponent] = tuple(dict.fromkeys((*found.get(exponent, ()), axis)))
    return found


def _descends_no_more(law: Law, loss: Array, theta: Array, delta: float, raw: bool) -> bool:
    """At the end of a nearly flat valley the gradient stays above its threshold while no step helps: the Newton step
    then is short in units of what the data determine."""
    model, target = (_Raw(law), loss) if raw else (law, np.log(loss))
    prediction, kept = model.evaluate(theta[None])
    value, slope, curve = huber(prediction - target, delta)
    gradient, hessian = model.derivatives(theta[None], kept, slope, curve)
    move = np.linalg.lstsq(hessian[0], -gradient[0], rcond=1e-12)[0]
    return bool(abs(gradient[0] @ move) <= 1e-9 * value.sum())


def _condition(law: Law, theta: Array) -> float:
    values = np.linalg.svd(law.jacobian(theta[None])[0], compute_uv=False)
    return float(values[0] / values[-1]) if values[-1] > 0 else math.inf


def _judge(found: Fit, strict: bool) -> None:
    explained = {
        INIT_UNCHANGED: "the fit is still at its starting point",
        MAX_ITER: f"the gradient was not reduced (relative {found.gradient:.1e})",
        ABNORMAL: "the objective is not finite",
    }
    if found.status in explained:
        text = f"{found.form}: {found.status}: {explained[found.status]}; {len(found.loss)} runs may not determine it"
        if strict:
            raise FitError(f"{text}; use fewer parameters or more runs")
        found.warnings.append(text)
    if found.status == BOUND_HIT:
        low, high = found.law.bounds()
        held = [
            name
            for name, value, least, most in zip(found.law.names, found.theta, low, high, strict=True)
            if value <= least + 1e-3 or value >= most - 1e-3
        ]
        found.warnings.append(f"{found.form}: BOUND_HIT: the runs do not determine {', '.join(held)}")
    if found.condition > _MOST_CONDITION:
        found.warnings.append(
            f"{found.form}: condition number {found.condition:.1e}: parameters are not determined one by one"
        )

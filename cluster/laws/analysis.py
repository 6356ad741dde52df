"""Everything that the runs at hand can say, in one pass: fits, intervals, optima, learning rates, and what to doubt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cluster.laws import rates, stability, uncertainty
from cluster.laws.allocation import Allocation, allocate, interval
from cluster.laws.fit import DELTA, Fit, FitError, fit, vpnls
from cluster.laws.forms import lookup
from cluster.laws.isoflop import IsoFlop, groups, isoflop
from cluster.laws.one_axis import broken, profile_floor
from cluster.laws.optimise import Array
from cluster.laws.records import DataProblem, Runs, listing, usable

RATE_AXES = ("width", "depth", "horizon", "batch", "n")
_LEVEL = 0.95
_ALARM = "methods disagree"


@dataclass
class Options:
    """What to fit.

    Attributes:
        forms: laws by name; empty: what the columns allow. The first one that converges is the primary one.
        target: FLOPs to extrapolate to; None: ten times the largest run.
        per_pair: k of C = k N D; None: from the records, else 6.
        draws: bootstrap refits.
        seed: of the draws.
        delta: Huber's threshold.
        initial_loss: loss before training, by which a run counts as diverged and S is clipped.
    """

    forms: tuple[str, ...] = ()
    target: float | None = None
    per_pair: float | None = None
    draws: int = 1000
    seed: int = 0
    delta: float = DELTA
    initial_loss: float | None = None


@dataclass
class Analysis:
    """The result; parts that the runs cannot give are None or empty, and `warnings` says why.

    Attributes:
        runs: all that were read; `points`: those that the fits used.
        fits: by name, the primary one first.
        thetas: pairs-bootstrap parameters of the primary fit [S, P]; `block_thetas` over budgets; `noise_thetas` under the
            noise of the seeds, where cells have three or more.
        target, per_pair: FLOPs to extrapolate to, and k of C = k N D; `counted`: k of the records' own FLOPs.
        transfers: axis -> verdict; `boundaries`: axis -> stability boundaries, by the values of the other axes in words.
    """

    runs: Runs
    points: Runs
    target: float
    per_pair: float
    counted: float
    fits: dict[str, Fit] = field(default_factory=dict)
    thetas: Array | None = None
    block_thetas: Array | None = None
    noise_thetas: Array | None = None
    spread: uncertainty.Spread | None = None
    influence: uncertainty.Influence | None = None
    iso: IsoFlop | None = None
    floor: dict[str, float | bool] | None = None
    tails: dict[str, float] = field(default_factory=dict)
    transfers: dict[str, rates.Verdict] = field(default_factory=dict)
    boundaries: dict[str, dict[str, stability.Boundary]] = field(default_factory=dict)
    sensitivity: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed_noise: float | None = None
    failed: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def primary(self) -> Fit | None:
        return next(iter(self.fits.values()), None)

    @property
    def best(self) -> Allocation | None:
        """The compute-optimal choice at the target by the primary fit."""
        found = self.primary
        return None if found is None or not found.plannable else allocate(found.values, self.target, self.per_pair)


def analyse(runs: Runs, options: Options | None = None) -> Analysis:
    """Fits what there is to fit.

    Raises:
        DataProblem: nothing can be fitted (the message says why for each attempt), or not a form that was asked for.
        FitError: a form that was asked for did not converge.
    """
    options = options or Options()
    warnings = list(runs.warnings)
    runs.warnings = []
    points = best_rates(runs, warnings)
    counted = _per_pair(points, warnings)
    per_pair = options.per_pair or counted
    target = options.target or 10 * _largest(points, per_pair)
    made = Analysis(runs, points, target, per_pair, counted, warnings=warnings)
    if "n" in points and "d" in points:
        made.seed_noise = uncertainty.seed_noise(
            _trained(points), [a for a in ("n", "d", "lr", "u", "h") if a in points]
        )
    _fit_all(made, options)
    _resample(made, options)
    _optima(made, options)
    _spread(made)
    _rates(made, options)
    if not (made.fits or made.iso or made.transfers):
        reasons = "; ".join(f"{name}: {why}" for name, why in made.failed.items())
        raise DataProblem(f"nothing can be fitted: {reasons or 'the records have none of the columns n and d, c, lr'}")
    made.warnings += [w for found in made.fits.values() for w in found.warnings]
    made.warnings = list(dict.fromkeys(made.warnings))
    return made


def best_rates(runs: Runs, warnings: list[str]) -> Runs:
    """Of each cell (equal n, d, u, h, c, width, depth) the runs with the best learning rate, all their seeds."""
    if "lr" not in runs or "n" not in runs or not np.isfinite(runs["lr"]).all():
        return runs
    keys = np.stack([runs[a] for a in ("n", "d", "u", "h", "c", "width", "depth") if a in runs], axis=1)
    _, cell = np.unique(keys, axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    kept = np.zeros(len(runs), dtype=bool)
    edge = np.zeros(len(runs), dtype=bool)
    good = np.isfinite(runs["loss"]) & (runs["loss"] > 0) & np.array([s in ("ok", "") for s in runs.status])
    for c in np.unique(cell):
        rows = np.flatnonzero((cell == c) & good)
        tried = np.unique(runs["lr"][cell == c])
        if len(tried) < 2 or not len(rows):
            kept |= cell == c
            continue
        found = np.unique(runs["lr"][rows])
        means = [np.log(runs["loss"][rows[runs["lr"][rows] == lr]]).mean() for lr in found]
        best = found[int(np.argmin(means))]
        chosen = rows[runs["lr"][rows] == best]
        kept[chosen] = True
        if len(tried) > 2 and best in (tried[0], tried[-1]):
            edge[chosen] = True
    if edge.any():
        warnings.append(
            f"the best learning rate is at the edge of its grid, so that the loss is too high: {listing(runs, edge)}"
        )
    return runs.keep(kept)


def _trained(runs: Runs) -> Runs:
    good = np.isfinite(runs["loss"]) & (runs["loss"] > 0) & np.array([s in ("ok", "") for s in runs.status])
    return runs.keep(good)


def _per_pair(runs: Runs, warnings: list[str]) -> float:
    if not {"n", "d", "c"} <= set(runs.columns):
        return 6.0
    with np.errstate(all="ignore"):
        ratio = runs["c"] / (runs["n"] * runs["d"])
    ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
    if not len(ratio):
        return 6.0
    middle = float(np.median(ratio))
    if ratio.max() > 1.5 * ratio.min():
        warnings.append(
            f"FLOPs are not proportional to N D ({ratio.min():.3g} to {ratio.max():.3g} per pair); the allocation uses {middle:.3g}"
        )
    return 6.0 if abs(middle / 6 - 1) < 0.05 else middle


def _largest(runs: Runs, per_pair: float) -> float:
    if "c" in runs and np.isfinite(runs["c"]).any():
        return float(np.nanmax(runs["c"]))
    if "n" in runs and "d" in runs:
        return float(per_pair * np.nanmax(runs["n"] * runs["d"]))
    return 1e21


def default_forms(runs: Runs) -> tuple[str, ...]:
    """The laws whose axes the runs have, varied."""
    varied = {a for a in runs.columns if len(np.unique(runs[a][np.isfinite(runs[a])])) > 1}
    forms: list[str] = []
    if {"n", "u", "d", "h"} <= varied:
        forms.append("operator")
    elif {"n", "u", "d"} <= varied:
        forms += ["operator_fixed_grid", "data_constrained"]
    if {"n", "d"} <= varied:
        forms += ["chinchilla", "tied", "kaplan"]
    if "c" in varied and not {"n", "d"} <= varied:
        forms += ["saturating", "power"]
    return tuple(forms)


def _fit_all(made: Analysis, options: Options) -> None:
    for form in options.forms or default_forms(made.points):
        try:
            if form == "vpnls":
                made.fits[form] = vpnls(made.points)
            elif form == "broken":
                made.fits[form], tails = broken(made.points)
                made.tails = dict(tails)
            else:
                lookup(form)
                made.fits[form] = fit(form, made.points, delta=options.delta)
        except (DataProblem, FitError) as error:
            if options.forms:
                raise
            made.failed[form] = str(error)
    if any(form in made.fits for form in ("saturating", "power")):
        made.floor = profile_floor(made.points)
        if not made.floor["identified"]:
            made.warnings.append(
                "the floor E of loss against compute is not identified: too few decades or no curvature"
            )
    made.warnings += [f"no fit of {form}: {why}" for form, why in made.failed.items()]


def _resample(made: Analysis, options: Options) -> None:
    found = made.primary
    if found is None:
        return
    made.thetas = uncertainty.pairs(found, options.draws, options.seed)
    points = usable(made.points, found.law.axes_needed)
    budget = next((points[axis] for axis in ("budget", "c") if axis in points), None)
    if budget is not None:
        rows = groups(budget)
        labels = np.empty(len(budget))
        for number, own in enumerate(rows):
            labels[own] = number
        if len(rows) >= 4 and np.median([len(own) for own in rows]) >= 3:
            made.block_thetas = uncertainty.blocks(found, labels, options.draws, options.seed)
    if made.seed_noise is not None and not found.raw:
        made.noise_thetas = uncertainty.noise(found, made.seed_noise, min(options.draws, 300), options.seed)
    made.influence = uncertainty.influence(found, made.target, made.per_pair)


def _optima(made: Analysis, options: Options) -> None:
    if "n" not in made.points or not {"budget", "c"} & set(made.points.columns):
        return
    try:
        made.iso = isoflop(made.points, seed=options.seed)
        made.warnings += made.iso.warnings
    except DataProblem as error:
        made.failed["approach 2"] = str(error)
        made.warnings.append(f"no approach 2: {error}")


def _spread(made: Analysis) -> None:
    found = made.fits.get("chinchilla")
    if found is None or not found.plannable:
        return
    thetas = made.thetas if found is made.primary and made.thetas is not None else uncertainty.pairs(found, 500)
    extra = {} if made.iso is None else {"approach 2": made.iso.optimum(made.target * made.counted / made.per_pair)}
    kept = usable(made.points, ("n", "d"))
    made.spread = uncertainty.model_spread(found, kept, made.target, thetas, per_pair=made.per_pair, extra=dict(extra))
    if made.spread.alarm:
        made.warnings.append(f"{_ALARM} on N* at C={made.target:.3g}: {made.spread.alarm}")


def recounted(made: Analysis, per_pair: float) -> Analysis:
    """The analysis for another k of C = k N D: the laws stay, and what they say of a budget is made anew."""
    kept = [text for text in made.warnings if not text.startswith(_ALARM)]
    again = replace(made, per_pair=per_pair, spread=None, warnings=kept)
    _spread(again)
    return again


def _rates(made: Analysis, options: Options) -> None:
    if "lr" not in made.runs or len(np.unique(made.runs["lr"])) < 3:
        return
    runs = rates.evidence(made.runs)
    made.warnings += runs.warnings
    varied = [a for a in RATE_AXES if a in runs and len(np.unique(runs[a])) > 1]
    for axis in varied:
        skipped: list[str] = []
        try:
            others = parting(runs, axis, varied)
            found = rates.cells(runs, axis, others, initial_loss=options.initial_loss, skipped=skipped)
            made.transfers[axis] = rates.verdict(found)
        except DataProblem as error:
            made.failed[f"rates over {axis}"] = str(error)
            told = "".join(f"; left out, {text}" for text in skipped)
            made.warnings.append(f"no verdict on learning rates over {axis}: {error}{told}")
            continue
        if skipped:
            made.warnings.append(f"learning rates over {axis}: left out, {'; '.join(skipped)}")
        if alone := made.transfers[axis].alone:
            made.warnings.append(f"learning rates over {axis}: no verdict where there is one size: {'; '.join(alone)}")
        _boundaries(made, axis, found)
        _sensitivity(made, found)


def parting(runs: Runs, axis: str, varied: Sequence[str]) -> list[str]:
    """The axes in which cells of `axis` must be alike to be compared. One that goes with `axis`, as depth goes with width in
    a ladder of models, is a part of it."""
    length = "horizon" if "horizon" in runs else "d"
    sizes = [a for a in ("width", "depth") if a in varied] or ["n"]
    known = [length, "batch"] if axis == "n" else [*sizes, length, "batch"]
    return [other for other in known if other != axis and other in runs and not _goes_with(runs[axis], runs[other])]


def _goes_with(axis: Array, other: Array) -> bool:
    """Whether `other` has one value at each of `axis`, and rises or falls with it or has another one at each."""
    places = [np.unique(other[axis == value]) for value in np.unique(axis[np.isfinite(axis)])]
    if any(len(values) > 1 for values in places):
        return False
    steps = np.diff([values[0] for values in places])
    return bool((steps >= 0).all() or (steps <= 0).all()) or len(np.unique(other)) == len(places)


def _boundaries(made: Analysis, axis: str, found: Sequence[rates.Cell]) -> None:
    for group, part in rates.grouped(found).items():
        try:
            made.boundaries.setdefault(axis, {})[group] = stability.boundary(part)
        except DataProblem as error:
            at = f"{axis} at {group}" if group else axis
            made.failed[f"stability boundary over {at}"] = str(error)
            made.warnings.append(f"no stability boundary over {at}: {error}")


def _sensitivity(made: Analysis, found: Sequence[rates.Cell]) -> None:
    guessed = []
    for cell in found:
        initial = cell.initial
        if math.isnan(initial):
            initial = float(np.max(cell.loss[np.isfinite(cell.loss)]))
            guessed += [cell.name] if cell.diverged.any() else []
        made.sensitivity[cell.name] = {
            "S": stability.sensitivity(cell.loss, initial),
            "clipped_at": initial,
            "grid": cell.lr.tolist(),
            "usable_decades": stability.usable_decades(cell.lr, cell.loss),
        }
    if guessed:
        made.warnings.append(
            "sensitivity S counts diverged runs at the worst loss of their cell, as the loss before training is not known (give "
            f"--initial-loss, or a column initial_loss): {'; '.join(guessed)}"
        )


def loss_interval(made: Analysis, n: float, d: float, level: float = _LEVEL) -> tuple[float, float, float]:
    """(prediction, low, high) of the loss of one new run at n, d: the primary law's parameters and the runs' own scatter,
    joined with the point predictions of the other laws in n and d.

    Raises:
        DataProblem: no law in n and d alone was fitted.
    """
    laws = {name: found for name, found in made.fits.items() if set(found.law.axes_needed) == {"n", "d"}}
    if not laws:
        raise DataProblem("a prediction needs a law in n and d: fit chinchilla")
    first = next(iter(laws.values()))
    value = float(first.predict(n=n, d=d)[0])
    thetas = made.thetas if first is made.primary else None
    thetas = uncertainty.pairs(first, 500) if thetas is None else thetas
    samples = first.predict(thetas, n=n, d=d)[:, 0]
    rng = np.random.default_rng(0)
    scatter = samples * np.exp(rng.choice(-first.residuals, size=len(samples)))
    low, high = interval(scatter, level)
    rms = min(float(np.sqrt(np.mean(found.residuals**2))) for found in laws.values())
    for found in laws.values():
        # A law that fits clearly worse than the best is no rival opinion.
        if float(np.sqrt(np.mean(found.residuals**2))) <= 1.5 * rms + 1e-9:
            other = float(found.predict(n=n, d=d)[0])
            low, high = min(low, other), max(high, other)
    return value, low, high

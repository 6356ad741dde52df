"""Learning-rate laws: the best rate of each cell, and whether it transfers (`stability`: where training stops being stable).

A diverged run is an observation: its loss is at least the worst that its neighbours reached. A cell is a set of runs that
differ in rate and seed only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from cluster.laws.lines import PowerLine, excess_scatter, power_line
from cluster.laws.optimise import Array
from cluster.laws.records import DataProblem, Runs, listing

STUCK = 1.5  # times the cell's least loss: such a run learned nothing worth a quadratic


@dataclass
class Cell:
    """One size (or horizon, or batch) with its learning rates.

    Attributes:
        size: value of the axis that is studied.
        others: axis -> value, of the further axes that part cells.
        name: all that tells the cell from others.
        lr, loss: rates tried, ascending, and the loss there (geometric mean over seeds; infinite where all diverged).
        diverged: rates at which a run diverged or never left the start.
        optimum: best rate; `interval` 95%; `best`: loss there.
        edge: "low" or "high" when the best rate is the first or last one tried with nothing diverged beyond it.
        stable: the largest rate that trained; `unstable`: the smallest beyond it that did not (infinite: none tried).
        initial: loss before training; NaN: unknown.
    """

    size: float
    others: dict[str, float]
    name: str
    lr: Array
    loss: Array
    diverged: Array
    optimum: float
    interval: tuple[float, float]
    best: float
    edge: str
    stable: float
    unstable: float
    initial: float = math.nan

    @property
    def group(self) -> str:
        """The values of the further axes, in words."""
        return _words(self.others)

    def loss_at(self, rate: float) -> float:
        """Loss at a rate, interpolated in logarithms; infinite beyond a diverged rate, NaN beyond the grid."""
        if not self.lr[0] * 0.999 <= rate <= self.lr[-1] * 1.001:
            return math.nan
        right = int(np.clip(np.searchsorted(self.lr, rate * 0.999), 0, len(self.lr) - 1))
        left = right if abs(math.log(self.lr[right] / rate)) < 1e-2 else right - 1
        if not np.isfinite(self.loss[[left, right]]).all():
            return math.inf
        return float(np.exp(np.interp(math.log(rate), np.log(self.lr), np.log(self.loss))))


@dataclass
class Transfer:
    """Whether one rate serves all sizes.

    Attributes:
        ok: the verdict; `reasons`: what speaks against it.
        line: ln rate on ln size, None with fewer than two usable cells.
        shift_steps: how many steps of the rate grid the best tried rate moves between the extreme sizes.
        regret: relative loss at the largest size for keeping the smallest one's rate.
        wider_is_better: at every shared rate up to the smallest cell's best, larger cells are not worse.
        curvature: coefficient of the quadratic term of ln rate in ln size; NaN with fewer than three cells.
        held_out: |ln| error at the largest cell of a line and of a parabola through the others (NaN: too few).
    """

    ok: bool
    reasons: list[str]
    line: PowerLine | None
    shift_steps: int
    regret: float
    wider_is_better: bool
    curvature: float
    held_out: tuple[float, float]
    cells: list[Cell] = field(default_factory=list)


@dataclass
class Verdict:
    """Whether the rate transfers over one axis: judged among cells that are alike in all others.

    Attributes:
        groups: values of the other axes, in words (empty: there are none) -> verdict there.
        alone: those for which there is one size only, so that they say nothing.
    """

    groups: dict[str, Transfer]
    alone: list[str]

    @property
    def ok(self) -> bool:
        return all(found.ok for found in self.groups.values())

    @property
    def reasons(self) -> list[str]:
        return [f"{at}: {text}" if at else text for at, found in self.groups.items() for text in found.reasons]


def evidence(runs: Runs) -> Runs:
    """The runs that tell something of rates: those that trained or diverged. The others are named in a warning: a run that
    was pruned or that failed ended for another reason, at a loss that says nothing of its rate."""
    known = np.isfinite(runs["lr"]) & (runs["lr"] > 0)
    told = np.array([status in ("ok", "", "diverged") for status in runs.status], dtype=bool)
    warnings = list(runs.warnings)
    if not told.all():
        kinds = ", ".join(sorted({runs.status[i] for i in np.flatnonzero(~told)}))
        warnings.append(f"learning rates: left out, status {kinds}: {listing(runs, ~told)}")
    if not known.all():
        warnings.append(f"learning rates: left out, no positive lr: {listing(runs, ~known)}")
    kept = runs.keep(known & told)
    kept.warnings = warnings
    return kept


def cells(
    runs: Runs,
    axis: str,
    others: Sequence[str] = (),
    *,
    initial_loss: float | None = None,
    skipped: list[str] | None = None,
) -> list[Cell]:
    """Cells of equal `axis` and `others`, by size.

    Args:
        runs: columns lr, loss, `axis`; diverged runs included, by status, by a loss that is not finite, or stuck; others that
            did not end well are left out (see `evidence`).
        axis: width, depth, horizon, batch, n ...
        others: further columns that part cells.
        initial_loss: loss before training: a run that ends above it diverged. None: the column of that name, where there is
            one.
        skipped: gets what is wrong with a cell, which is then left out.

    Raises:
        DataProblem: a cell with fewer than three rates, or none that trained, unless there is `skipped`.
    """
    runs = evidence(runs)
    keys = np.stack([runs[name] for name in (axis, *others)], axis=1)
    if not np.isfinite(keys).all():
        raise DataProblem(f"some runs have no {' or '.join((axis, *others))}")
    found = []
    for key in np.unique(keys, axis=0):
        part = runs.keep((keys == key).all(axis=1))
        try:
            found.append(_cell(part, axis, dict(zip((axis, *others), map(float, key), strict=True)), initial_loss))
        except DataProblem as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    return found


def _words(values: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in values.items())


def _cell(part: Runs, axis: str, place: dict[str, float], given: float | None) -> Cell:
    name = _words(place)
    initial = math.nan if given is None else given
    if given is None and "initial_loss" in part and np.isfinite(part["initial_loss"]).any():
        initial = float(np.nanmax(part["initial_loss"]))
    bad = np.array([status == "diverged" for status in part.status]) | ~np.isfinite(part["loss"])
    if bad.all():
        raise DataProblem(f"{name}: every run diverged; try lower rates")
    least = float(part["loss"][~bad].min())
    with np.errstate(invalid="ignore"):
        bad |= part["loss"] > min(STUCK * least, math.inf if math.isnan(initial) else initial)
    rates = np.unique(part["lr"])
    if len(rates) < 3:
        raise DataProblem(f"{name}: {len(rates)} learning rates; an optimum needs at least three")
    loss, out = np.full(len(rates), np.inf), np.zeros(len(rates), dtype=bool)
    for i, rate in enumerate(rates):
        here = part["lr"] == rate
        out[i] = bad[here].any()
        if not out[i]:
            loss[i] = np.exp(np.log(part["loss"][here]).mean())
    if not np.isfinite(loss).any():
        raise DataProblem(f"{name}: no rate trained with all its seeds")
    best = int(loss.argmin())
    edge = "high" if best == len(rates) - 1 else "low" if best == 0 else ""
    optimum, interval, floor = _quadratic(np.log(rates), loss, best) if not edge else _at_edge(rates, loss, best)
    trained = np.flatnonzero(~out)
    beyond = [i for i in range(len(rates)) if out[i] and i > trained[-1]]
    stable, unstable = float(rates[trained[-1]]), float(rates[beyond[0]]) if beyond else math.inf
    size, others = place[axis], {key: value for key, value in place.items() if key != axis}
    return Cell(size, others, name, rates, loss, out, optimum, interval, floor, edge, stable, unstable, initial)


def _at_edge(rates: Array, loss: Array, best: int) -> tuple[float, tuple[float, float], float]:
    rate = float(rates[best])
    if best == 0:
        return rate, (0.0, float(rates[1])), float(loss[best])
    return rate, (float(rates[best - 1]), math.inf), float(loss[best])


def _quadratic(x: Array, loss: Array, best: int) -> tuple[float, tuple[float, float], float]:
    """Optimum of a parabola through the best rate and two on each side, diverged ones bounding it from below.

    A diverged neighbour is asked to lie no lower than the worst of the others; it pulls on the fit only where the
    parabola would pass below that (a one-sided square, solved by adding such points one by one).
    """
    chosen = np.arange(max(best - 2, 0), min(best + 3, len(x)))
    finite = chosen[np.isfinite(loss[chosen])]
    y = np.log(loss[finite])
    censored = [i for i in chosen if not np.isfinite(loss[i]) and i in (finite[0] - 1, finite[-1] + 1)]
    bound = float(y.max())
    xs, ys = list(x[finite]), list(y)
    for _ in range(len(censored) + 1):
        if len(xs) >= 3:
            coefficients = np.polyfit(np.array(xs) - x[best], ys, 2)
            low = [i for i in censored if x[i] not in xs and np.polyval(coefficients, x[i] - x[best]) < bound]
        else:
            low = [i for i in censored if x[i] not in xs]
        if not low:
            break
        xs.append(float(x[low[0]]))
        ys.append(bound)
    left, right = float(x[max(best - 1, 0)]), float(x[min(best + 1, len(x) - 1)])
    grid = (math.exp(left), math.exp(right))
    if len(xs) < 3 or coefficients[0] <= 0:
        return math.exp(x[best]), grid, float(loss[best])
    shift = float(np.clip(-coefficients[1] / (2 * coefficients[0]), left - x[best], right - x[best]))
    # Three points on an uneven grid leave the vertex's height to chance.
    value = (
        min(float(np.exp(np.polyval(coefficients, shift))), float(loss[best])) if len(finite) > 3 else float(loss[best])
    )
    half = 0.5 * max(x[best] - left, right - x[best])
    if len(xs) > 3:
        rest = np.array(ys) - np.polyval(coefficients, np.array(xs) - x[best])
        design = np.vander(np.array(xs) - x[best], 3)
        cov = np.linalg.inv(design.T @ design) * float(rest @ rest) / (len(xs) - 3)
        grad = np.array([-shift / coefficients[0], -1 / (2 * coefficients[0]), 0.0])
        half = min(half, 1.96 * math.sqrt(float(grad @ cov @ grad)))
    centre = x[best] + shift
    return math.exp(centre), (math.exp(centre - half), math.exp(centre + half)), value


def transfer(found: Sequence[Cell], *, slope: float = 0.1, regret: float = 0.005) -> Transfer:
    """Judges whether the best rate stays put as the size grows.

    Args:
        found: cells of one axis, one a size.
        slope: largest |d ln rate / d ln size| that counts as none.
        regret: largest relative loss that keeping the smallest size's rate may cost at the largest.

    Raises:
        DataProblem: fewer than two sizes, or two cells of one size.
    """
    ordered = sorted(found, key=lambda cell: cell.size)
    sizes = {cell.size for cell in ordered}
    if len(sizes) < 2:
        raise DataProblem("a transfer verdict needs at least two sizes")
    if len(sizes) < len(ordered):
        raise DataProblem("cells of one size that differ otherwise have a verdict each: see `verdict`")
    base, last = ordered[0], ordered[-1]
    reasons = [
        f"{cell.name}: the best rate {cell.optimum:.3g} is at the {cell.edge} edge of its grid"
        for cell in ordered
        if cell.edge
    ]
    inner = [cell for cell in ordered if not cell.edge]
    line = None
    curvature, held_out = math.nan, (math.nan, math.nan)
    if len({cell.size for cell in inner}) >= 2:
        size, rate = np.array([c.size for c in inner]), np.array([c.optimum for c in inner])
        std = np.array([max(math.log(c.interval[1] / c.interval[0]) / 3.92, 0.02) for c in inner])
        line = power_line(size, rate, np.hypot(std, excess_scatter(np.log(size), np.log(rate), std)))
        flat = line.low <= 0 <= line.high and math.isfinite(line.low) and abs(line.exponent) <= 3 * slope
        if abs(line.exponent) > slope and not flat:
            reasons.append(f"the best rate goes as size^{line.exponent:.2f}")
        curvature, held_out = _curvature(np.log(size), np.log(rate))
    else:
        reasons.append("fewer than two sizes have their best rate inside the grid")
    steps = _steps(ordered)
    if steps >= 2:
        reasons.append(f"the best rate tried moves by {steps} grid steps from {base.name} to {last.name}")
    tried = float(base.lr[base.loss.argmin()])
    lost = last.loss_at(tried) / float(last.loss[np.isfinite(last.loss)].min()) - 1
    if not lost <= regret:
        cost = "diverges" if math.isinf(lost) else "was not tried" if math.isnan(lost) else f"costs {lost:.1%} of loss"
        reasons.append(f"the rate {tried:.3g} of {base.name} {cost} at {last.name}")
    wider = _wider(ordered)
    if not wider:
        reasons.append("at a shared rate that suits the smallest cell, a larger one has a higher loss")
    return Transfer(not reasons, reasons, line, steps, lost, wider, curvature, held_out, ordered)


def verdict(found: Sequence[Cell], **limits: float) -> Verdict:
    """Judges the cells of one axis, those that are alike in all others among themselves; `limits`: of `transfer`.

    Raises:
        DataProblem: nowhere two sizes.
    """
    parts = grouped(found)
    judged = {name: transfer(part, **limits) for name, part in parts.items() if len(part) > 1}
    if not judged:
        told = f" with the same {', '.join(found[0].others)}" if found and found[0].others else ""
        raise DataProblem(f"a transfer verdict needs at least two sizes{told}")
    return Verdict(judged, [name for name, part in parts.items() if len(part) == 1])


def grouped(found: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells by the values of their further axes, in words."""
    parts: dict[str, list[Cell]] = {}
    for cell in found:
        parts.setdefault(cell.group, []).append(cell)
    return parts


def _steps(ordered: Sequence[Cell]) -> int:
    """Grid steps between the best tried rates of the smallest and the largest size."""
    grid = np.unique(np.concatenate([cell.lr for cell in ordered]))
    ends = [float(cell.lr[cell.loss.argmin()]) for cell in (ordered[0], ordered[-1])]
    return abs(int(np.argmin(np.abs(np.log(grid / ends[0]))) - np.argmin(np.abs(np.log(grid / ends[1])))))


def _wider(ordered: Sequence[Cell]) -> bool:
    """Up to the smallest cell's best rate: beyond it, the least drift of the optimum would count as a loss."""
    highest = float(ordered[0].lr[ordered[0].loss.argmin()]) * 1.001
    for small, large in pairwise(ordered):
        shared = np.intersect1d(small.lr, large.lr)
        for rate in shared[shared <= highest]:
            before, after = small.loss_at(rate), large.loss_at(rate)
            if math.isfinite(before) and not after <= before * 1.002:
                return False
    return True


def _curvature(x: Array, y: Array) -> tuple[float, tuple[float, float]]:
    if len(np.unique(x)) < 3:
        return math.nan, (math.nan, math.nan)
    bend = float(np.polyfit(x - x.mean(), y, 2)[0])
    errors = []
    for degree in (1, 2):
        if len(np.unique(x[:-1])) <= degree:
            errors.append(math.nan)
            continue
        guess = np.polyval(np.polyfit(x[:-1] - x[0], y[:-1], degree), x[-1] - x[0])
        errors.append(abs(float(guess - y[-1])))
    return bend, (errors[0], errors[1])

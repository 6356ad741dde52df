"""Approach 2: the best N of each compute budget from a parabola, then a power law through the optima.

Sources: Hoffmann et al., arXiv:2203.15556 (approach 2); Porian et al., arXiv:2406.19146 (weights from seed noise). The
exponent is unbiased for symmetric grids, but the coefficient is not: the wider the grid and the less alike the two
exponents, the more, so that wide grids are warned of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from cluster.laws.lines import PowerLine, excess_scatter, parabolas, power_line, slopes
from cluster.laws.optimise import Array
from cluster.laws.records import DataProblem, Runs, usable

_SAME_BUDGET = 0.05  # of ln C
_LISTED = 4  # budgets that a message explains
_WIDE = 4.0  # times either side of the optimum; arXiv:2203.15556 grids biased more than this move N* by over 1%


@dataclass
class Budget:
    """One IsoFLOP curve.

    Attributes:
        flops: C.
        n, loss: the best loss at each N, by N.
        used: which of them the parabola went through.
        optimum, best: N* and the loss there; NaN when `excluded` says why there is none.
        std: of ln N*, from noise in the losses.
        draws: N* under that noise [B], NaN without a minimum inside.
    """

    flops: float
    n: Array
    loss: Array
    used: Array
    optimum: float = math.nan
    best: float = math.nan
    std: float = math.nan
    excluded: str = ""
    draws: Array = field(default_factory=lambda: np.empty(0))


@dataclass
class IsoFlop:
    """Optima against compute: `line` is N* = coefficient C^a, with the interval of a from the noise draws; in `plain`
    every budget weighs the same."""

    budgets: list[Budget]
    line: PowerLine
    plain: PowerLine
    sigma: float
    warnings: list[str]
    samples: Array  # (slope, intercept) of ln N* on ln C under noise [B, 2]

    def optimum(self, flops: float) -> tuple[float, tuple[float, float]]:
        """N* at a budget, and its 95% interval under noise."""
        values = np.exp(self.samples[:, 1] + self.samples[:, 0] * math.log(flops))
        low, high = np.quantile(values[np.isfinite(values)], [0.025, 0.975])
        return self.line.at(flops), (float(low), float(high))

    @property
    def good(self) -> list[Budget]:
        return [budget for budget in self.budgets if not budget.excluded]


def isoflop(
    runs: Runs,
    *,
    neighbours: int | None = 2,
    sigma: float | None = None,
    draws: int = 1000,
    seed: int = 0,
    log_loss: bool = True,
) -> IsoFlop:
    """Fits approach 2.

    Args:
        runs: columns n, loss, and budget or c; lr and seed where they vary.
        neighbours: the parabola goes through the best N and so many on each side; None: through all.
        sigma: noise of log loss; None: the records' loss_std, else the spread of seeds, else the parabolas' residuals.
        draws: noise draws for the errors.
        seed: of the draws.
        log_loss: parabolas of log loss (as Porian et al.); False: of the loss itself (as Hoffmann et al.).

    Raises:
        DataProblem: fewer than two budgets with an optimum inside their grid; the message says why for each.
    """
    axis = "budget" if "budget" in runs else "c"
    runs = usable(runs, (axis, "n"))
    warnings = list(runs.warnings)
    budgets = [_budget(runs, rows, axis, neighbours, warnings, log_loss) for rows in groups(runs[axis])]
    if len(budgets) < 2:
        flops = f"C={budgets[0].flops:.3g}" if budgets else "none"
        raise DataProblem(f"approach 2 needs at least two budgets, the records have one ({flops})")
    level = sigma if sigma is not None else _noise(runs, budgets)
    for budget in budgets:
        if not budget.excluded:
            _spread(
                budget, level, neighbours, draws, log_loss, np.random.default_rng([seed, round(budget.flops) % 2**32])
            )
    good = [budget for budget in budgets if not budget.excluded]
    bad = [budget for budget in budgets if budget.excluded]
    if bad:
        shown = "; ".join(f"C={budget.flops:.3g}: {budget.excluded}" for budget in bad[:_LISTED])
        rest = f"; and {len(bad) - _LISTED} more, see fit.json" if len(bad) > _LISTED else ""
        warnings.append(f"approach 2 leaves out {len(bad)} of {len(budgets)} budgets: {shown}{rest}")
    if len(good) < 2:
        raise DataProblem(
            f"approach 2: {len(good)} of {len(budgets)} budgets have an optimum inside their grid; "
            + "; ".join(f"C={budget.flops:.3g}: {budget.excluded}" for budget in bad[:_LISTED])
        )
    wide = [b for b in good if _width(b) > _WIDE * 1.1]
    if wide:
        shown = ", ".join(f"C={b.flops:.3g} (x{_width(b):.3g})" for b in wide[:4])
        warnings.append(
            f"grids wider than x{_WIDE:g} on a side bias the coefficient of N*: {shown}; prefer approach 3 or VPNLS"
        )
    x, y = np.log([b.flops for b in good]), np.log([b.optimum for b in good])
    std = np.array([b.std for b in good])
    std = np.hypot(std, excess_scatter(x, y, std))
    line = power_line(np.exp(x), np.exp(y), std)
    table = np.log(np.stack([b.draws for b in good], axis=1))
    slope, level_ = slopes(x, table, std)
    samples = np.stack([slope, level_], axis=1)
    finite = slope[np.isfinite(slope)]
    if len(finite) > 1:
        line.low, line.high = (float(q) for q in np.quantile(finite, [0.025, 0.975]))
    return IsoFlop(budgets, line, power_line(np.exp(x), np.exp(y)), level, warnings, samples)


def groups(flops: Array) -> list[Array]:
    """Rows of each budget: sorted budgets part where they differ by more than a rounding."""
    order = np.argsort(np.log(flops), kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(flops)[order]) > _SAME_BUDGET) + 1
    return np.split(order, cuts)


def _budget(runs: Runs, rows: Array, axis: str, neighbours: int | None, warnings: list[str], log_loss: bool) -> Budget:
    part = runs.keep(rows)
    flops = float(np.exp(np.log(part[axis]).mean()))
    n, loss = [], []
    for value in np.unique(part["n"]):
        cell = part.keep(part["n"] == value)
        losses, edge = _best_rate(cell)
        if edge:
            warnings.append(f"C={flops:.3g}, N={value:.3g}: the best learning rate {edge} is at the edge of its grid")
        n.append(value)
        loss.append(losses)
    made = Budget(flops, np.array(n), np.array(loss), np.zeros(len(n), dtype=bool))
    if np.ptp(np.log(part[axis])) > 2 * _SAME_BUDGET:
        made.excluded = f"its runs do not share a budget ({part[axis].min():.3g} to {part[axis].max():.3g})"
        return made
    if len(n) < 3:
        made.excluded = f"{len(n)} sizes, a parabola needs three"
        return made
    least = int(made.loss.argmin())
    if least in (0, len(n) - 1):
        side, ask = ("smallest", "smaller") if least == 0 else ("largest", "larger")
        made.excluded = f"the best run has the {side} N={n[least]:.3g}: add {ask} models"
        return made
    chosen = _window(least, len(n), neighbours)
    made.used[chosen] = True
    x = np.log(made.n[chosen])
    curvature, vertex, value = parabolas(x, _scaled(made.loss[chosen], log_loss)[None])
    if curvature[0] <= 0:
        made.excluded = "the parabola is concave: it has no minimum"
    elif not x[0] < vertex[0] < x[-1]:
        made.excluded = f"the parabola's minimum N={math.exp(vertex[0]):.3g} lies outside its points"
    else:
        made.optimum, made.best = float(np.exp(vertex[0])), float(np.exp(value[0]) if log_loss else value[0])
    return made


def _best_rate(cell: Runs) -> tuple[float, str]:
    """Least loss over learning rates (geometric mean over seeds), and that rate when it is the first or last tried."""
    if "lr" not in cell or not np.isfinite(cell["lr"]).all() or len(np.unique(cell["lr"])) < 2:
        return float(np.exp(np.log(cell["loss"]).mean())), ""
    rates = np.unique(cell["lr"])
    means = np.array([np.log(cell["loss"][cell["lr"] == rate]).mean() for rate in rates])
    least = int(means.argmin())
    edge = f"{rates[least]:.3g}" if least in (0, len(rates) - 1) and len(rates) > 2 else ""
    return float(np.exp(means[least])), edge


def _scaled(loss: Array, log_loss: bool) -> Array:
    return np.log(loss) if log_loss else loss


def _window(least: int, count: int, neighbours: int | None) -> slice:
    if neighbours is None:
        return slice(0, count)
    return slice(max(least - neighbours, 0), least + neighbours + 1)


def _noise(runs: Runs, budgets: list[Budget]) -> float:
    if "loss_std" in runs and np.isfinite(runs["loss_std"]).any():
        return float(np.nanmedian(runs["loss_std"] / runs["loss"]))
    from cluster.laws.uncertainty import seed_noise

    seeds = seed_noise(runs, [name for name in ("n", "c", "lr") if name in runs])
    if seeds:
        return seeds
    squares, freedom = 0.0, 0
    for budget in budgets:
        if budget.excluded or budget.used.sum() < 4:
            continue
        x, y = np.log(budget.n[budget.used]), np.log(budget.loss[budget.used])
        rest = y - np.polyval(np.polyfit(x - x.mean(), y, 2), x - x.mean())
        squares, freedom = squares + float(rest @ rest), freedom + len(x) - 3
    return max(math.sqrt(squares / freedom), 1e-5) if freedom else 1e-3


def _spread(
    budget: Budget, sigma: float, neighbours: int | None, draws: int, log_loss: bool, rng: np.random.Generator
) -> None:
    """Optima of noisy copies of the curve; their spread is the error of ln N*."""
    x, y = np.log(budget.n), np.log(budget.loss)
    noisy = y + sigma * rng.standard_normal((draws, len(y)))
    least = noisy.argmin(axis=1)
    found = np.full(draws, np.nan)
    for index in np.unique(least):
        if index in (0, len(x) - 1):
            continue
        rows = np.flatnonzero(least == index)
        chosen = _window(int(index), len(x), neighbours)
        _, vertex, _ = parabolas(x[chosen], noisy[rows][:, chosen] if log_loss else np.exp(noisy[rows][:, chosen]))
        inside = (vertex > x[chosen][0]) & (vertex < x[chosen][-1])
        found[rows] = np.where(inside, vertex, np.nan)
    valid = np.isfinite(found)
    if valid.mean() < 0.5:
        budget.excluded = (
            f"only {valid.mean():.0%} of noise draws (log loss +-{sigma:.1e}) have a minimum inside the grid"
        )
        return
    step = float(np.diff(x).mean())
    budget.std = max(float(np.std(found[valid])), step / 75) / float(valid.mean())
    budget.draws = np.exp(found)


def _width(budget: Budget) -> float:
    """The widest side of the points used, as a factor of N*."""
    n = budget.n[budget.used]
    return float(max(budget.optimum / n[0], n[-1] / budget.optimum))

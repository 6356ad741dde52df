"""The figures of a page about fits."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from cluster.laws.allocation import allocate
from cluster.laws.analysis import Analysis
from cluster.laws.fit import Fit
from cluster.laws.optimise import Array
from cluster.laws.rates import Cell, Transfer
from cluster.report.plots import GREY, PALETTE, drawing

_MOST_LINES = 12


def fit_with_bands(made: Analysis) -> str:
    """Observed losses and the primary law: one line per size over data, or the law over its one axis, with its 95% band."""
    found = made.primary
    if found is None:
        return ""
    axes = found.law.axes
    over = "d" if "d" in axes else "c" if "c" in axes else next(iter(axes))
    group = "n" if "n" in axes and over != "n" else None
    kinds = np.unique(axes[group]) if group else np.array([math.nan])
    shown = kinds[np.unique(np.linspace(0, len(kinds) - 1, min(_MOST_LINES, len(kinds))).round().astype(int))]
    with drawing("laws-fit", 8.6, 4.2, whole=False) as (figure, svg):
        ax = figure.subplots()
        for kind, colour in zip(shown, _colours(len(shown)), strict=True):
            rows = axes[group] == kind if group else np.ones(len(found.loss), dtype=bool)
            label = f"{group}={kind:.3g}" if group else found.form
            ax.scatter(axes[over][rows], found.loss[rows], s=14, color=colour, label=label)
            _law_line(ax, made, found, rows, over, colour)
        ax.set_xscale("log")
        _log_loss(ax, found.loss)
        ax.set_xlabel(_TITLES.get(over, over))
        ax.set_ylabel("loss")
        ax.legend(fontsize=7, ncols=2)
    return svg[0]


def _law_line(ax: Axes, made: Analysis, found: Fit, rows: Array, over: str, colour: str) -> None:
    axes = found.law.axes
    if any(np.ptp(np.log(values[rows])) > 1e-6 for name, values in axes.items() if name != over):
        return  # a line through points that differ in more than one axis would be no prediction of any of them
    values = axes[over][rows]
    grid = np.geomspace(values.min(), values.max() * 3, 60)
    point = {name: np.full(60, column[rows][0]) for name, column in axes.items()} | {over: grid}
    ax.plot(grid, found.predict(**point), color=colour, linewidth=1.2)
    if made.thetas is not None:
        low, high = np.nanquantile(found.predict(made.thetas[:300], **point), [0.025, 0.975], axis=0)
        ax.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)


def isoflop_curves(made: Analysis) -> str:
    """Loss against size, one parabola per budget, with the optima."""
    if made.iso is None:
        return ""
    good = made.iso.good
    with drawing("laws-isoflop", 8.6, 4.0, whole=False) as (figure, svg):
        ax = figure.subplots()
        for budget, colour in zip(made.iso.budgets, _colours(len(made.iso.budgets)), strict=True):
            ax.plot(budget.n, budget.loss, "o", markersize=3, color=colour, alpha=1.0 if budget in good else 0.35)
            if budget in good:
                x = np.log(budget.n[budget.used])
                grid = np.linspace(x[0], x[-1], 50)
                parabola = np.polyfit(x - x.mean(), np.log(budget.loss[budget.used]), 2)
                label = f"C={budget.flops:.2g}"
                ax.plot(np.exp(grid), np.exp(np.polyval(parabola, grid - x.mean())), color=colour, label=label)
                ax.plot(budget.optimum, budget.best, "*", markersize=9, color=colour)
        ax.set_xscale("log")
        _log_loss(ax, np.concatenate([budget.loss for budget in made.iso.budgets]))
        ax.set_xlabel("parameters")
        ax.set_ylabel("loss")
        ax.legend(fontsize=7, ncols=2)
    return svg[0]


def optima(made: Analysis) -> str:
    """Best size against compute: optima of budgets with their errors, approach 2's line and approach 3's band."""
    found = made.primary
    law = found if found is not None and found.plannable else None
    if made.iso is None and law is None:
        return ""
    flops = [budget.flops for budget in made.iso.good] if made.iso else []
    if law is not None:
        flops += list(made.per_pair * law.law.axes["n"] * law.law.axes["d"])
    grid = np.geomspace(min(flops), made.target, 50)
    with drawing("laws-optima", 8.6, 3.6, whole=False) as (figure, svg):
        ax = figure.subplots()
        if made.iso is not None:
            good = made.iso.good
            ax.errorbar(
                [b.flops for b in good],
                [b.optimum for b in good],
                yerr=[
                    [b.optimum * (1 - math.exp(-b.std)) for b in good],
                    [b.optimum * (math.exp(b.std) - 1) for b in good],
                ],
                fmt="o",
                markersize=4,
                color=PALETTE[0],
                label="budgets",
            )
            ax.plot(grid, [made.iso.line.at(c) for c in grid], "--", color=PALETTE[0], label="approach 2")
        if law is not None:
            ax.plot(
                grid, [allocate(law.values, c, made.per_pair).n for c in grid], color=PALETTE[1], label="approach 3"
            )
            if made.thetas is not None:
                samples = law.law.natural(made.thetas)
                table = np.stack([np.asarray(allocate(samples, c, made.per_pair).n) for c in grid])
                low, high = np.nanquantile(table, [0.025, 0.975], axis=1)
                ax.fill_between(grid, low, high, color=PALETTE[1], alpha=0.15, linewidth=0)
        ax.axvline(made.target, color=GREY, linestyle=":", linewidth=1)
        ax.set(xscale="log", yscale="log", xlabel="compute (FLOPs)", ylabel="best number of parameters")
        ax.legend()
    return svg[0]


def residuals(made: Analysis) -> str:
    """log(predicted/observed) of every law that was fitted."""
    if not made.fits:
        return ""
    with drawing("laws-residuals", 8.6, 2.8, whole=False) as (figure, svg):
        ax = figure.subplots()
        for (name, found), colour in zip(made.fits.items(), PALETTE, strict=False):
            ax.plot(found.loss, found.residuals, "o", markersize=3, alpha=0.7, color=colour, label=name)
        ax.axhline(0, color=GREY, linewidth=0.8)
        ax.set(xlabel="observed loss", ylabel="log(predicted/observed)")
        ax.legend()
    return svg[0]


def influence(made: Analysis, most: int = 15) -> str:
    """The runs that move the answer most when left out."""
    if made.influence is None:
        return ""
    order = np.argsort(-np.abs(made.influence.shift))[:most][::-1]
    with drawing("laws-influence", 8.6, 0.6 + 0.2 * len(order), whole=False) as (figure, svg):
        ax = figure.subplots()
        ax.barh(range(len(order)), made.influence.shift[order], color=PALETTE[0])
        ax.set_yticks(range(len(order)), [made.influence.names[i] for i in order], fontsize=7)
        what = "ln N*" if made.best is not None else "the first exponent"
        ax.set_xlabel(f"change of {what} when the run is left out")
    return svg[0]


def transfer_curves(axis: str, found: Transfer, name: str) -> str:
    """Loss against learning rate, one curve a cell; crosses: diverged; stars: optima; and the optima against size. `name`
    tells the figure from others of its page."""
    with drawing(f"laws-transfer-{name}", 8.6, 3.6, whole=False) as (figure, svg):
        left, right = figure.subplots(1, 2, width_ratios=[2, 1])
        highest = max(float(cell.loss[np.isfinite(cell.loss)].max()) for cell in found.cells)
        for cell, colour in zip(found.cells, _colours(len(found.cells)), strict=True):
            _cell(left, cell, colour, highest)
            low, high = (max(cell.interval[0], cell.lr[0]), min(cell.interval[1], cell.lr[-1]))
            reach = [[max(cell.optimum - low, 0)], [max(high - cell.optimum, 0)]]
            marker = "o" if not cell.edge else "^" if cell.edge == "high" else "v"
            right.errorbar([cell.size], [cell.optimum], yerr=reach, fmt=marker, markersize=4, color=colour)
        if found.line is not None:
            sizes = np.array([found.cells[0].size, found.cells[-1].size])
            right.plot(sizes, [found.line.at(s) for s in sizes], "--", color=GREY, linewidth=1)
        left.set(xscale="log", xlabel="learning rate", ylabel="loss")
        _log_loss(left, np.concatenate([c.loss[np.isfinite(c.loss)] for c in found.cells]))
        left.legend(fontsize=7)
        right.set(xscale="log", yscale="log", xlabel=axis, ylabel="best learning rate")
        shown = sorted({cell.size for cell in found.cells})
        right.set_xticks(shown, [f"{size:g}" for size in shown], fontsize=7, rotation=45)
        right.minorticks_off()
    return svg[0]


def _cell(ax: Axes, cell: Cell, colour: str, highest: float) -> None:
    good = np.isfinite(cell.loss)
    ax.plot(cell.lr[good], cell.loss[good], "o-", markersize=3, linewidth=1, color=colour, label=cell.name)
    ax.plot(cell.lr[~good], np.full((~good).sum(), highest), "x", markersize=5, color=colour)
    ax.plot(cell.optimum, cell.best, "*", markersize=9, color=colour)


_TITLES = {"d": "tokens or samples seen", "c": "compute (FLOPs)", "n": "parameters", "u": "unique samples"}


def _colours(count: int) -> list[str]:
    return [to_hex(c) for c in matplotlib.colormaps["viridis"](np.linspace(0.05, 0.85, max(count, 1)))][:count]


def _log_loss(ax: Axes, values: Array) -> None:
    ax.set_yscale("log")
    if values.max() < 20 * values.min():  # under two decades the minor ticks carry the labels
        narrow = values.max() < 2 * values.min()
        ax.yaxis.set_minor_locator(LogLocator(subs=tuple(np.arange(1, 10, 0.5)) if narrow else (1, 2, 3, 5)))
        ax.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        ax.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        ax.yaxis.set_minor_formatter(NullFormatter())

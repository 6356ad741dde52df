"""The figures of a report, as SVG or PNG in strings. Text and axes take the page's colour, so both themes are legible."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.ticker
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullFormatter

from cluster.report.view import RunView, Series, finite, numbers, smooth, thin

INK = "#123457"  # replaced by currentColor in the SVG: a value that no palette uses
GREY = "#7c8aa0"  # of text in a PNG, which cannot follow the page's colour: legible on both themes
PALETTE = ["#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#64748b"]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "axes.prop_cycle": cycler(color=PALETTE),
}


def loss_curve(view: RunView) -> str:
    """Training loss (raw and smoothed) and the validation metric against steps, on a log axis, with every resume."""
    steps, losses = finite(view.series("loss"))
    validation = validation_key(view)
    val = finite(view.series(validation)) if validation else ([], [])
    if not steps and not val[0]:
        return ""
    with drawing("loss", 8.6, 3.4) as (figure, svg):
        ax = figure.subplots()
        if steps:
            ax.plot(*thin((steps, losses)), color=PALETTE[0], alpha=0.3, linewidth=0.8)
            ax.plot(*thin((steps, smooth(losses, max(1, len(losses) // 40)))), color=PALETTE[0], label="train")
        if val[0]:
            ax.plot(*val, color=PALETTE[1], marker="o", markersize=3.5, linewidth=1.2, label=validation)
        _log_if_positive(ax, losses + val[1])
        _mark_resumes(ax, view)
        ax.set_xlabel("optimiser step")
        ax.set_ylabel("loss")
        ax.legend(loc="upper right")
    return svg[0]


def small_multiples(view: RunView, families: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """(title, SVG) per family of series; members of a family (blocks) share a plot, first light to last dark."""
    panels = []
    for family, keys in families.items():
        drawn = {key: finite(view.series(key)) for key in keys}
        drawn = {key: series for key, series in drawn.items() if any(series[1])}
        if not drawn:  # nothing logged, or nothing but zeros
            continue
        with drawing(family, 3.5, 2.1) as (figure, svg):
            ax = figure.subplots()
            _draw_family(ax, drawn)
            _mark_resumes(ax, view, text=False)
        panels.append((family, svg[0]))
    return panels


def rollout_error(curves: Mapping[str, Series]) -> str:
    """Errors against lead time, one line per curve; persistence is dashed."""
    drawn = {name: finite(series) for name, series in curves.items()}
    drawn = {name: series for name, series in drawn.items() if series[0]}
    if not drawn:
        return ""
    with drawing("rollout", 8.6, 3.0) as (figure, svg):
        ax = figure.subplots()
        for name, (lead, values) in drawn.items():
            reference = "persistence" in name
            style: dict[str, Any] = {"linestyle": "--", "color": GREY} if reference else {"marker": "o"}
            ax.plot(lead, values, label=name, markersize=3, **style)
        _log_if_positive(ax, [v for _, values in drawn.values() for v in values])
        ax.set_xlabel("lead time (steps)")
        ax.set_ylabel("error")
        ax.legend(loc="center right")
    return svg[0]


def fields(arrays: Mapping[str, np.ndarray], channel: int = 0, times: int = 4) -> str:
    """Truth, prediction and error [T, C, *S] at several lead times, as a PNG (2-D and 3-D) or SVG (1-D)."""
    if "truth" not in arrays or "prediction" not in arrays:
        return ""
    truth, prediction = arrays["truth"][:, channel], arrays["prediction"][:, channel]
    error = arrays["error"][:, channel] if "error" in arrays else prediction - truth
    if truth.shape[0] == 0 or truth.ndim < 2:
        return ""
    leads = sorted({round(i) for i in np.linspace(0, len(truth) - 1, times)})
    if truth.ndim == 2:
        return _lines(truth, prediction, leads)
    while truth.ndim > 3:  # a slice through the middle of the first axis
        middle = truth.shape[1] // 2
        truth, prediction, error = truth[:, middle], prediction[:, middle], error[:, middle]
    return _images({"truth": truth, "prediction": prediction, "error": error}, leads)


def validation_key(view: RunView) -> str | None:
    """The validation metric to show beside the training loss."""
    keys = [key for key in view.keys if key.startswith("val/")]
    loss = str((view.config.get("task") or {}).get("loss", "loss"))
    return next((key for key in (f"val/{loss}", "val/loss") if key in keys), keys[0] if keys else None)


def _images(named: Mapping[str, np.ndarray], leads: Sequence[int]) -> str:
    with _style("fields"):
        figure = Figure(figsize=(2.2 * len(leads) + 0.8, 6.4), layout="constrained", dpi=110)
        axes = figure.subplots(len(named), len(leads), squeeze=False)
        shared = float(np.nanmax(np.abs(named["truth"][leads]))) or 1.0
        worst = float(np.nanmax(np.abs(named["error"][leads]))) or 1.0
        for row, (name, field) in zip(axes, named.items(), strict=True):
            limit = worst if name == "error" else shared
            for ax, lead in zip(row, leads, strict=True):
                cmap = "PuOr" if name == "error" else "RdBu_r"
                image = ax.imshow(field[lead].T, origin="lower", cmap=cmap, vmin=-limit, vmax=limit)
                ax.set(xticks=[], yticks=[])
                ax.grid(False)
                ax.spines[:].set_visible(False)
                if name == "truth":
                    ax.set_title(f"lead {lead + 1}")
            row[0].set_ylabel(name)
            bar = figure.colorbar(image, ax=list(row), shrink=0.8, aspect=18, pad=0.01)
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=7)
        for text in figure.findobj(Text):
            text.set_color(GREY)
        for ax in figure.axes:
            ax.tick_params(colors=GREY)
        return _png(figure)


def _lines(truth: np.ndarray, prediction: np.ndarray, leads: Sequence[int]) -> str:
    with drawing("lines", 8.6, 2.4) as (figure, svg):
        for ax, lead in zip(figure.subplots(1, len(leads), sharey=True, squeeze=False)[0], leads, strict=True):
            ax.plot(truth[lead], color=GREY, linestyle="--", label="truth")
            ax.plot(prediction[lead], color=PALETTE[0], label="prediction")
            ax.set_title(f"lead {lead + 1}")
        figure.axes[0].legend()
    return svg[0]


def _draw_family(ax: Axes, drawn: Mapping[str, Series]) -> None:
    several = len(drawn) > 1
    colours = matplotlib.colormaps["viridis"](np.linspace(0.1, 0.85, len(drawn))) if several else [PALETTE[0]]
    for (key, series), colour in zip(drawn.items(), colours, strict=True):
        steps, values = thin(series, 400)
        ax.plot(steps, values, color=colour, linewidth=1.1, marker="." if len(steps) < 3 else "", label=_member(key))
    values = [v for _, ys in drawn.values() for v in ys]
    if min(values) > 0 and max(values) > 20 * min(values):
        _log_if_positive(ax, values)
    if several:
        handles, labels = ax.get_legend_handles_labels()
        ends = [0, len(handles) - 1] if len(handles) > 5 else list(range(len(handles)))
        ax.legend([handles[i] for i in ends], [labels[i] for i in ends], loc="best", fontsize=7)


def _member(key: str) -> str:
    return " ".join(str(number) for number in numbers(key)) or key


def _mark_resumes(ax: Axes, view: RunView, text: bool = True) -> None:
    for attempt, step in view.resumes:
        ax.axvline(step, color=INK, linewidth=0.8, linestyle=":", alpha=0.7)
        if text:
            ax.annotate(
                f"resumed (attempt {attempt})",
                (step, 0.02),
                xycoords=("data", "axes fraction"),
                xytext=(3, 0),
                textcoords="offset points",
                fontsize=7,
            )


def _log_if_positive(ax: Axes, values: Sequence[float]) -> None:
    if not values or min(values) <= 0:
        return
    ax.set_yscale("log")
    if max(values) < 20 * min(values):  # under two decades: minor ticks carry the labels
        ax.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    else:
        ax.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def _style(name: str) -> Iterator[None]:
    # The salt makes the ids inside an SVG a function of its name: unique on the page, the same in every rendering.
    salt = hashlib.sha256(name.encode()).hexdigest()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        yield


@contextmanager
def drawing(name: str, width: float, height: float, whole: bool = True) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw on; its SVG is in the list once the block is left. `whole`: linear x axes count steps."""
    svg: list[str] = []
    with _style(name):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, svg
        for ax in figure.axes:
            if whole and ax.get_xscale() == "linear":
                ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    svg.append(re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL))


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True)
    return f'<img alt="fields" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'

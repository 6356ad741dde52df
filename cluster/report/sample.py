"""A picture of a data set. Of one trajectory: series, an x-t image or frames, after the number of its axes of space. Of text:
how often tokens occur, and the first of them."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from datamodules.format import Dataset

ROWS = 6  # channels drawn
FRAMES = 6  # frames of a field
TIMES = 512  # times of a series or of an x-t image
TOKENS = 1 << 20  # tokens that are counted
ROW, TEXT_ROWS = 128, 48  # tokens drawn
STYLE: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8, "axes.linewidth": 0.6, "image.origin": "lower"}


def draw_sample(dataset: Dataset, trajectory: int = 0, title: str | None = None, dpi: int = 120) -> bytes:
    """PNG of one trajectory of the main array (its first channels, the middle plane of a volume), or of the first tokens.

    The title is by default URL and trajectory.

    Raises ValueError for a data set of neither kind, or a trajectory that is not there.
    """
    array = dataset.main
    if array.dimensions == ("token",):
        tokens = array.read((), 0, min(array.shape[0], TOKENS))
        with matplotlib.rc_context(STYLE):
            return _png(_tokens(tokens), f"{dataset.url}: {len(tokens):,} tokens" if title is None else title, dpi)
    if array.dimensions[:3] != ("trajectory", "time", "channel"):
        raise ValueError(
            f"{dataset.url}: has axes ({', '.join(array.dimensions)}); only trajectories and text can be drawn"
        )
    if not 0 <= trajectory < array.shape[0]:
        raise ValueError(f"trajectory={trajectory}: {dataset.url} has 0 to {array.shape[0] - 1}")
    space = len(array.dimensions) - 3
    frames = array.shape[1]
    wanted = np.unique(np.linspace(0, frames - 1, min(frames, FRAMES if space > 1 else TIMES)).round().astype(int))
    values = np.stack([_frame(dataset, trajectory, int(t)) for t in wanted]).astype(np.float64)
    values[~np.isfinite(values)] = np.nan
    dt = dataset.attributes.get("dt")
    times = wanted * (dt or 1)
    label = _label("time" if dt else "frame", dataset.attributes.get("units", {}).get("time", "") if dt else "")
    names = [str(name) for name in dataset.attributes.get("channels", range(array.shape[2]))][:ROWS]
    with matplotlib.rc_context(STYLE):
        if space == 0:
            figure = _series(values, times, names, label)
        elif space == 1:
            figure = _image(values, times, names, label, array.dimensions[3])
        else:
            figure = _frames(values, times, names, array.dimensions[-2:])
        return _png(figure, f"{dataset.url}: trajectory {trajectory}" if title is None else title, dpi)


def _png(figure: Figure, title: str, dpi: int) -> bytes:
    figure.suptitle(title, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def _tokens(tokens: np.ndarray) -> Figure:
    """Ids [N]: counts by rank, and the first ids as rows of an image."""
    counts = np.sort(np.unique(tokens, return_counts=True)[1])[::-1]
    figure = _figure(8, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    left.loglog(np.arange(1, len(counts) + 1), counts, linewidth=0.8)
    left.set_xlabel("rank of a token")
    left.set_ylabel("occurrences")
    first = np.full(ROW * TEXT_ROWS, np.nan)
    shown = tokens[: first.size]
    first[: len(shown)] = shown
    rows = -(-len(shown) // ROW)
    image = right.imshow(first.reshape(TEXT_ROWS, ROW)[:rows], origin="upper", aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=right, shrink=0.9).set_label("id")
    right.set_title(f"first {len(shown):,} tokens, {ROW} a row")
    return figure


def _frame(dataset: Dataset, trajectory: int, t: int) -> np.ndarray:
    """One frame [C, *space], at most two axes of space."""
    frame = dataset.main.read((trajectory,), t, t + 1)[0][:ROWS]
    while frame.ndim > 3:
        frame = frame[:, frame.shape[1] // 2]
    return frame


def _label(name: str, unit: str) -> str:
    return f"{name} [{unit}]" if unit and unit != "1" else name


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _series(values: np.ndarray, times: np.ndarray, names: list[str], label: str) -> Figure:
    """values [T, C]."""
    figure = _figure(8, 1 + 1.1 * len(names))
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for c, (ax, name) in enumerate(zip(axes, names, strict=True)):
        ax.plot(times, values[:, c], linewidth=0.8)
        ax.set_ylabel(name)
        ax.margins(x=0)
    axes[-1].set_xlabel(label)
    return figure


def _image(values: np.ndarray, times: np.ndarray, names: list[str], label: str, axis: str) -> Figure:
    """values [T, C, X]: space across, time upwards."""
    figure = _figure(1 + 3.2 * len(names), 3.6)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    extent = (0, values.shape[2], float(times[0]), float(times[-1]) if len(times) > 1 else 1.0)
    for c, (ax, name) in enumerate(zip(axes, names, strict=True)):
        low, high = _limits(values[:, c])
        image = ax.imshow(values[:, c], aspect="auto", extent=extent, vmin=low, vmax=high, cmap=_map(low))
        figure.colorbar(image, ax=ax, shrink=0.9)
        ax.set_title(name)
        ax.set_xlabel(axis)
    axes[0].set_ylabel(label)
    return figure


def _frames(values: np.ndarray, times: np.ndarray, names: list[str], axis: tuple[str, ...]) -> Figure:
    """values [T, C, Y, X]: a row for each channel, one colour scale a row."""
    ratio = min(2.0, max(0.4, values.shape[2] / values.shape[3]))
    figure = _figure(1 + 1.7 * len(times), 0.6 + (1.7 * ratio + 0.25) * len(names))
    grid = figure.subplots(len(names), len(times), squeeze=False)
    for c, (row, name) in enumerate(zip(grid, names, strict=True)):
        low, high = _limits(values[:, c])
        for t, ax in enumerate(row):
            image = ax.imshow(values[t, c], vmin=low, vmax=high, cmap=_map(low))
            ax.set_xticks([])
            ax.set_yticks([])
            if c == 0:
                ax.set_title(f"t = {times[t]:g}")
        figure.colorbar(image, ax=list(row), shrink=0.9)
        row[0].set_ylabel(f"{name}\n{axis[0]}")
    grid[-1, 0].set_xlabel(axis[1])
    return figure


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Limits of a colour scale: symmetric about zero for data of both signs."""
    if np.isnan(values).all():
        return 0.0, 1.0
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if low < 0 < high:
        high = max(-low, high)
        low = -high
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _map(low: float) -> str:
    return "RdBu_r" if low < 0 else "viridis"

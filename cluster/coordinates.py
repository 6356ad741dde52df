"""The coordinate check: do activations and their changes keep their size as a model grows? (arXiv:2203.03466, appendix D)

A site is a module; over an axis (width, depth, modes, resolution) its mean |x_t| and mean |x_t - x_0| after t steps on
one batch are fitted by a power of the size. Under the right parametrisation the exponents are near zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from trainer.config import ConfigError, load, to_dict
from trainer.parametrization.coordinates import OUTPUT, Trace, trace
from trainer.plain import hold
from trainer.schema import RunConfig

AXES = ("width", "depth", "modes", "resolution")
# Wrong parametrisations are wrong by halves and wholes; models as small as those of a check drift by up to 0.2.
TOLERANCE = 0.2
# How far a size may fall: outputs start smaller at any width where the readout shrinks as 1/width; with depth-muP's
# rates a step changes less with depth where branches do not add up in phase (the bound that sets the rates is on growth).
_OUTPUT_FALL = 1.0
_DEPTH_FALL = 0.5


@dataclass
class Slope:
    """Exponent of one quantity at one site after `step` steps, its standard error, and the range it may lie in."""

    site: str
    quantity: str
    step: int
    exponent: float
    error: float
    low: float
    high: float

    @property
    def ok(self) -> bool:
        """Whether the range is met but for two standard errors."""
        return self.low - 2 * self.error <= self.exponent <= self.high + 2 * self.error


@dataclass
class Axis:
    """One axis: traces by (size, seed), and the slopes of their sites."""

    name: str
    sizes: list[int]
    traces: dict[tuple[int, int], Trace]
    slopes: list[Slope] = field(default_factory=list)

    def values(self, slope: Slope, size: int) -> list[float]:
        """What a slope was fitted to, at one size: a value per seed."""
        site = next(site for site in _sites(self) if site.name == slope.site)
        index = ("size", "change").index(slope.quantity)
        return [site(trace)[slope.step][index] for (own, _), trace in self.traces.items() if own == size]

    @property
    def ok(self) -> bool:
        return all(slope.ok for slope in self.slopes)

    @property
    def failed(self) -> list[Slope]:
        """The slopes outside of their range, the worst first."""
        return sorted(
            (slope for slope in self.slopes if not slope.ok),
            key=lambda s: -max(s.low - s.exponent, s.exponent - s.high),
        )


def default_axes(config: RunConfig) -> dict[str, list[int]]:
    """Sizes by axis that the parametrisation answers for: widths (and depths, with a rule for depth) from those of the
    base model to eight (four) times them; for models with modes half, all and twice of them, and the grid and coarser
    ones."""
    model = config.model
    base = getattr(config.parametrization, "base", {})
    found: dict[str, list[int]] = {}
    if hasattr(model, "width"):
        width = int(base.get("width", model.width))
        found["width"] = [width * factor for factor in (1, 2, 4, 8)]
    if hasattr(config.parametrization, "branch_exponent"):
        depth = int(base.get("depth", model.depth))
        found["depth"] = [depth * factor for factor in (1, 2, 4)]
    if hasattr(model, "modes") and hasattr(config.task, "space"):
        most, points = min(model.modes), min(config.task.space)
        found["modes"] = [count for count in (max(2, most // 2), most, 2 * most) if count <= points]
        found["resolution"] = [points // k for k in (4, 2, 1) if points % k == 0 and points // k >= max(model.modes)]
    return {name: sizes for name, sizes in found.items() if len(sizes) > 1}


def check(
    config: RunConfig,
    axes: Mapping[str, Sequence[int]],
    *,
    steps: int = 4,
    seeds: int = 3,
    along: Mapping[str, Sequence[str]] | None = None,
    tolerance: float = TOLERANCE,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Axis]:
    """Trains the config at each size of each axis for some steps on its own first batch, and fits the exponents.

    Args:
        axes: axis -> sizes; the other sizes stay as in the config.
        along: key of the config -> its values at the sizes of the width axis, such as `{"model.heads": ["2", "4"]}`.
        tolerance: largest |exponent| that counts as none.
        progress: told of each model before it is trained.

    Raises:
        ConfigError: an axis that the model lacks, a size that it cannot have, or `along` of another length.
        DataError, StoreError: data that cannot be read.
    """
    for name, sizes in axes.items():
        if len(set(sizes)) < 2:
            raise ConfigError(f"{name}={list(sizes)}: an exponent needs at least two sizes")
    for key, values in (along or {}).items():
        if len(values) != len(axes.get("width", ())):
            raise ConfigError(
                f"{key}={','.join(values)}: one value for each of the {len(axes.get('width', ()))} widths"
            )
    batch = hold(config, "train", config.train.global_batch)
    found = []
    for name, sizes in axes.items():
        traces = {}
        for place, size in enumerate(sizes):
            words = _words(config, name, size)
            if name == "width":
                words += [f"{key}={values[place]}" for key, values in (along or {}).items()]
            for seed in range(seeds):
                progress(f"{name} {size}, seed {seed}")
                other = load(to_dict(config), [*words, f"seed={config.seed + seed}"])
                given = _coarse(batch, config, size) if name == "resolution" else batch
                traces[size, seed] = trace(other, given, steps)
        axis = Axis(name, sorted(sizes), traces)
        axis.slopes = _slopes(axis, steps, tolerance)
        found.append(axis)
    return found


def _words(config: RunConfig, name: str, size: int) -> list[str]:
    """The overrides that give the config another size."""
    if name in ("width", "depth") and hasattr(config.model, name):
        return [f"model.{name}={size}"]
    if name == "modes" and hasattr(config.model, "modes"):
        return [f"model.modes={[size] * len(config.model.modes)}"]
    if name == "resolution" and hasattr(config.task, "space"):
        return []
    raise ConfigError(
        f"{name}: model.name={config.model.name} has no such axis; it has {', '.join(default_axes(config))}"
    )


def _coarse(batch: Mapping[str, Tensor], config: RunConfig, size: int) -> dict[str, Tensor]:
    """Every k-th point of the batch's grid, so that its shortest axis has `size` points."""
    points, least = min(config.task.space), max(getattr(config.model, "modes", [1]))
    if size < least or points % size:
        raise ConfigError(f"resolution={size}: give whole parts of the {points} points of the data, at least {least}")
    strides: list[Any] = [slice(None, None, points // size)] * len(config.task.space)
    return {**batch, "fields": batch["fields"][(..., *strides)]}


def _slopes(axis: Axis, steps: int, tolerance: float) -> list[Slope]:
    found = []
    for site in _sites(axis):
        for quantity, index in (("size", 0), ("change", 1)):
            for step in range(index, steps + 1):
                points = [(size, site(trace)[step][index]) for (size, _), trace in axis.traces.items()]
                good = [(size, value) for size, value in points if value > 0]
                if not good:  # before the first gradient comes through a readout at zero
                    continue
                low, high = -tolerance, tolerance
                if site.name in (OUTPUT, "readout") and quantity == "size":
                    low -= _OUTPUT_FALL
                if axis.name == "depth" and quantity == "change":
                    low -= _DEPTH_FALL
                finite = [(s, v) for s, v in good if math.isfinite(v)]
                exponent, error = _power(finite) if len(finite) == len(points) else (math.inf, 0.0)
                found.append(Slope(site.name, quantity, step, exponent, error, low, high))
    return found


def _power(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Exponent of a power law through points, and its standard error from the scatter around it."""
    x, y = np.log(np.array(points, dtype=float)).T
    x = x - x.mean()
    exponent = float(x @ y / (x @ x))
    rest = y - y.mean() - exponent * x
    return exponent, float(np.sqrt(rest @ rest / max(1, len(y) - 2) / (x @ x)))


@dataclass
class Site:
    """A place that models of all sizes of an axis have."""

    name: str
    path: Callable[[Trace], str]

    def __call__(self, trace: Trace) -> list[tuple[float, float]]:
        return trace[self.path(trace)]


def _sites(axis: Axis) -> list[Site]:
    """All modules; over depth, where blocks share what there is to change, those around the blocks and the last block."""
    some = axis.traces[axis.sizes[0], 0]
    if axis.name != "depth":
        common = set.intersection(*(set(trace) for trace in axis.traces.values()))
        return [Site(path, lambda _, path=path: path) for path in some if path in common]  # type: ignore[misc]
    found = []
    for path in some:
        head, number, tail = _in_block(path)
        if number is None:
            found.append(Site(path, lambda _, path=path: path))  # type: ignore[misc]
        elif number == 0 and not tail:
            last = lambda trace, head=head: f"{head}.{_last(trace, head)}"  # noqa: E731
            found.append(Site(f"{head}.last", last))
    return found


def _in_block(path: str) -> tuple[str, int | None, str]:
    """(list of blocks, number, rest) of a path such as layers.3.mlp.up; number None outside of such a list."""
    words = path.split(".")
    for place, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[:place]), int(word), ".".join(words[place + 1 :])
    return path, None, ""


def _last(trace: Trace, head: str) -> int:
    return max(number for other, number, _ in map(_in_block, trace) if other == head and number is not None)


def to_json(found: Sequence[Axis]) -> dict[str, Any]:
    """The check as plain containers."""
    return {
        "ok": all(axis.ok for axis in found),
        "axes": {
            axis.name: {
                "ok": axis.ok,
                "sizes": axis.sizes,
                "slopes": [
                    {
                        "site": s.site,
                        "quantity": s.quantity,
                        "step": s.step,
                        "exponent": s.exponent if math.isfinite(s.exponent) else None,
                        "error": s.error,
                        "low": s.low,
                        "high": s.high,
                        "ok": s.ok,
                    }
                    for s in axis.slopes
                ],
                "traces": [{"size": size, "seed": seed, "sites": trace} for (size, seed), trace in axis.traces.items()],
            }
            for axis in found
        },
    }

"""From a sweep's axes to its points: what each run sets, in an order that depends on the config alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cluster.sweep.config import DRAWS, SweepConfig
from trainer.config import ConfigError

Point = dict[str, Any]  # axis -> value


def points(config: SweepConfig) -> list[Point]:
    """All points: the combinations of the grid, of each zipped group and of the draws.

    Raises:
        ConfigError: an axis without values, lists of unequal length, or an impossible ladder.
    """
    parts: list[list[Point]] = [[{name: v} for v in values(f"grid.{name}", a)] for name, a in config.grid.items()]
    parts += [_zipped(i, group) for i, group in enumerate(config.zip)]
    if config.random.samples:
        parts.append(_draws(config))
    if not parts:
        raise ConfigError("the sweep has no axes: give grid, zip or random")
    return [
        {name: value for part in combination for name, value in part.items()}
        for combination in itertools.product(*parts)
    ]


def values(name: str, axis: Any) -> list[Any]:
    """The values of one axis: a list, or a ladder {from, to, steps} or {from, factor, steps}.

    Raises:
        ConfigError: neither, or without values.
    """
    if isinstance(axis, Mapping):
        found = _ladder(name, axis)
    elif isinstance(axis, Sequence) and not isinstance(axis, str):
        found = [number(value) for value in axis]
    else:
        raise ConfigError(
            f"{name}={axis!r}: expected a list of values, or a ladder such as {{from: 1, to: 8, steps: 4}}"
        )
    if not found:
        raise ConfigError(f"{name} is empty: give at least one value")
    keys = [repr(value) for value in found]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{name} has {key} twice")
    return found


def number(value: Any) -> Any:
    """`value`, and words such as 1e-3, which YAML does not take for numbers, as numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def rounded(value: float) -> float:
    """A computed value with as many digits as people write."""
    return float(f"{value:.6g}")


def _zipped(index: int, group: Mapping[str, Any]) -> list[Point]:
    lists = {}
    for name, axis in group.items():  # in a list that goes with others a value may well appear again
        plain = isinstance(axis, list) and axis
        lists[name] = [number(v) for v in axis] if plain else values(f"zip[{index}].{name}", axis)
    lengths = {name: len(found) for name, found in lists.items()}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ConfigError(f"zip[{index}]: lists of unequal length ({told}); make them equal")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def _ladder(name: str, axis: Mapping[str, Any]) -> list[Any]:
    for key in axis:
        if key not in ("from", "to", "factor", "steps", "scale"):
            raise ConfigError(f"unknown key '{name}.{key}': valid keys: factor, from, scale, steps, to")
    scale = axis.get("scale", "log")
    if scale not in ("log", "linear"):
        raise ConfigError(f"{name}.scale={scale}: must be log or linear")
    start, end, factor, steps = (number(axis.get(key)) for key in ("from", "to", "factor", "steps"))
    if (end is None) == (factor is None) or start is None:
        raise ConfigError(f"{name}: a ladder has from, steps, and either to or factor")
    for key, value in (("from", start), ("to", end), ("factor", factor)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
        ):
            raise ConfigError(f"{name}.{key}={value!r}: expected a number")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ConfigError(f"{name}.steps={steps!r}: expected a whole number, at least 1")
    if factor is not None:
        if scale == "linear":
            raise ConfigError(f"{name}: factor has no effect with scale=linear; give to")
        end = start * factor ** (steps - 1)
    if scale == "log" and not (start > 0 and end > 0):
        raise ConfigError(f"{name}: a ladder on a logarithmic scale runs over positive numbers; set scale: linear")
    made = np.geomspace(start, end, steps) if scale == "log" else np.linspace(start, end, steps)
    whole = all(isinstance(value, int) for value in (start, axis.get("to", axis.get("factor"))))
    return list(dict.fromkeys(round(v) for v in made)) if whole else [rounded(v) for v in made]


def _draws(config: SweepConfig) -> list[Point]:
    """Each axis has a stream of its own, so that one more axis or one more sample leaves the others as they were."""
    columns: dict[str, list[Any]] = {}
    for name, axis in config.random.axes.items():
        where = f"random.axes.{name}"
        if not isinstance(axis, Mapping) or len(axis) != 1 or next(iter(axis)) not in DRAWS:
            raise ConfigError(
                f"{where}={axis!r}: expected one of {', '.join(DRAWS)}, such as {{log_uniform: [1.0e-4, 1.0e-2]}}"
            )
        ((kind, given),) = axis.items()
        rng = np.random.default_rng([config.random.seed, *name.encode()])
        columns[name] = [draw(where, kind, given, rng) for _ in range(config.random.samples)]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def draw(where: str, kind: str, given: Any, rng: np.random.Generator) -> Any:
    if not isinstance(given, list) or not given:
        raise ConfigError(f"{where}.{kind}={given!r}: expected a list")
    if kind == "choice":
        return number(given[int(rng.integers(len(given)))])
    ends = [number(value) for value in given]
    if (
        len(ends) != 2
        or not all(isinstance(v, int | float) and math.isfinite(v) for v in ends)
        or not ends[0] < ends[1]
    ):
        raise ConfigError(f"{where}.{kind}={given!r}: expected [low, high] with low < high")
    low, high = ends
    if kind.startswith("log") and not low > 0:
        raise ConfigError(f"{where}.{kind}={given!r}: low must be greater than 0")
    if kind == "int":
        return int(rng.integers(int(low), int(high) + 1))
    if kind == "log_int":
        return min(int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))), int(high))
    if kind == "log_uniform":
        return rounded(math.exp(rng.uniform(math.log(low), math.log(high))))
    return rounded(float(rng.uniform(low, high)))

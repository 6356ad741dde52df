"""What an importer gives: the variables of one source file, read block by block."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar, Protocol

import numpy as np

from datamodules.format import DataError

from .files import SourceFile

FIELDS = "fields"  # the variable that samples come from


@dataclass
class Variable:
    """One array of a source file.

    dimensions: axes in Keel's order; `trajectory` first where it has one, then `time` where it has one.
    shape: of this file's part. dtype: numpy's name of the values.
    read: `read(i, a, b)` gives trajectory i, of it frames [a, b) if it has a `time` axis; all of a variable without a
    trajectory axis. Shape: `shape` without the trajectory axis.
    """

    dimensions: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int, int], np.ndarray]
    units: str = ""

    @property
    def per_trajectory(self) -> bool:
        return self.dimensions[:1] == ("trajectory",)

    @property
    def timed(self) -> bool:
        return "time" in self.dimensions


@dataclass
class Source:
    """One source file, open.

    variables: by name; `fields` has axes (trajectory, time, channel, *space).
    attributes: what the data set's attributes say of it: channels, dt, parameters, units, boundary_conditions, ...
    close: frees it.
    """

    variables: dict[str, Variable]
    attributes: dict[str, Any] = field(default_factory=dict)
    close: Callable[[], None] = lambda: None


class Importer(Protocol):
    """Understands one layout."""

    config_class: ClassVar[type]
    suffixes: ClassVar[tuple[str, ...]]  # of file names

    def __init__(self, config: Any) -> None: ...

    @staticmethod
    def recognises(file: SourceFile) -> bool:
        """Whether the file, which has one of the suffixes, is of this layout."""
        ...

    def open(self, file: SourceFile) -> Source:
        """Open a file. Raises DataError, naming it, if it is not of this layout."""
        ...


def need(module: str, what: str) -> ModuleType:
    """A package of the extra `import`; DataError that names the extra if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"{what} needs the package {module}: pip install 'keel[import]'") from error


def constant(dimensions: tuple[str, ...], values: np.ndarray) -> Variable:
    """A variable without a trajectory axis from values in memory."""
    held = np.asarray(values)
    return Variable(dimensions, held.shape, held.dtype.name, lambda i, a, b: held)


def per_trajectory(values: np.ndarray, dimensions: tuple[str, ...] = ("trajectory",)) -> Variable:
    """A variable with a trajectory axis from values in memory (small ones: parameters)."""
    held = np.asarray(values)
    if "time" in dimensions:
        return Variable(dimensions, held.shape, held.dtype.name, lambda i, a, b: held[i, a:b])
    return Variable(dimensions, held.shape, held.dtype.name, lambda i, a, b: held[i])


def time_step(times: np.ndarray) -> float | None:
    """The one step of times [..., T], of all trajectories; None if there is none (to a thousandth of a step)."""
    steps = np.diff(np.asarray(times, np.float64), axis=-1)
    if not steps.size or not np.isfinite(steps).all():
        return None
    mean = float(steps.mean())
    return None if np.abs(steps - mean).max() > 1e-3 * abs(mean) else float(f"{mean:.9g}")


def channels_first(block: np.ndarray) -> np.ndarray:
    """[T, *space, C] -> [T, C, *space]."""
    return np.moveaxis(block, -1, 1)


def components(name: str, axes: list[str], order: int) -> list[str]:
    """Channel names of a tensor field of that order, last axis fastest: u_x, u_y; s_xx, s_xy, s_yx, s_yy."""
    suffixes = [""]
    for _ in range(order):
        suffixes = [suffix + axis for suffix in suffixes for axis in axes]
    return [f"{name}_{suffix}" if suffix else name for suffix in suffixes]


def free_name(name: str, taken: Any, axes: tuple[str, ...]) -> str:
    """`name`, with underscores behind it if an axis or another variable has that name."""
    while name in taken or name in axes or name in (FIELDS, "trajectory", "channel", "time"):
        name += "_"
    return name


def plain(value: Any) -> Any:
    """An attribute of a file as plain JSON; None for what has no such form."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray):
        return [plain(entry) for entry in value.tolist()] if value.ndim else plain(value.item())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) else None

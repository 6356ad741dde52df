"""Splits: which trajectories and which of their frames, said in one line.

A split is a list of terms joined by commas, all of which must hold:

=================  =========================================================================
``train``          a split named in the data set
``10:200``         a range of trajectories (tokens for text); either end may be left out
``viscosity<1e-3`` a condition on an array with one number per trajectory: ``< <= > >= == !=``
``parameters.k>2`` the same on a column of an array [trajectory, column] whose columns have names
``frames=0:40``    a range of the frames of each trajectory: a split by time
=================  =========================================================================

Without a name or range all trajectories are meant. ``train, viscosity>=1e-3, frames=0:40`` trains on the early part of
the viscous trajectories; ``test, viscosity<1e-3, frames=40:`` tests out of distribution in both.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.format import Array, DataError, Dataset

from .windows import Ids

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le, ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "<": operator.lt, ">": operator.gt,
}  # fmt: skip
_RANGE = re.compile(r"(\d*):(\d*)")
_FRAMES = re.compile(r"frames\s*=\s*(\d*):(\d*)")
_CONDITION = re.compile(r"([A-Za-z_]\w*)(?:\.(\w+))?\s*(<=|>=|==|!=|<|>)\s*(\S+)")


@dataclass(frozen=True)
class Split:
    """``[first, last)`` of axis 0, or ``only`` some of them (ascending); frames ``[begin, end)``, ``end=0`` for all."""

    first: int
    last: int
    only: Ids | None = None
    begin: int = 0
    end: int = 0


def select(dataset: Dataset, array: Array, text: str) -> Split:
    """The split that ``text`` says. ``DataError`` if a term is not understood or unknown, or if nothing is left."""
    url, length = dataset.url, array.shape[0]
    first, last, begin, end, bounded = 0, length, 0, 0, False
    conditions = []
    for term in (part.strip() for part in text.split(",")):
        if match := _FRAMES.fullmatch(term):
            begin, end = _frames(url, array, term, match)
        elif match := _CONDITION.fullmatch(term):
            conditions.append((term, match))
        elif bounded:
            raise DataError(f"{url}: split {text!r}: {term!r} is a second name or range; give one, and conditions")
        else:
            bounded = True
            first, last = _range(dataset, array, term)
    if not conditions:
        return Split(first, last, None, begin, end)
    keep = np.ones(last - first, bool)
    for term, match in conditions:
        name, column, sign, number = match.groups()
        values = per_trajectory(dataset, array, name, column)[first:last]
        try:
            keep &= _OPERATORS[sign](values, float(number))
        except ValueError:
            raise DataError(
                f"{url}: split {text!r}: {number!r} in {term!r} is not a number; write such as viscosity<1e-3"
            ) from None
    only = first + np.flatnonzero(keep).astype(np.int64)
    if not len(only):
        raise DataError(f"{url}: split {text!r} is empty: no trajectory of {first}:{last} fulfils its conditions")
    return Split(first, last, only, begin, end)


def _frames(url: str, array: Array, term: str, match: re.Match[str]) -> tuple[int, int]:
    if array.window_axis != 1:
        raise DataError(f"{url}: {term!r}: {array.name} has no time axis; leave frames out")
    begin, end = int(match[1] or 0), int(match[2] or array.shape[1])
    if not begin < end <= array.shape[1]:
        raise DataError(f"{url}: {term!r} is empty or exceeds the {array.shape[1]} frames of a trajectory")
    return begin, end


def _range(dataset: Dataset, array: Array, term: str) -> tuple[int, int]:
    url, length = dataset.url, array.shape[0]
    if match := _RANGE.fullmatch(term):
        start, stop = int(match[1] or 0), int(match[2] or length)
        if not start < stop <= length:
            raise DataError(f"{url}: split {term} is empty or exceeds the {length} entries of {array.name}")
        return start, stop
    if term not in dataset.splits:
        known = ", ".join(sorted(dataset.splits)) or "none"
        raise DataError(f"{url}: has no split {term!r}; it has {known}; name one of them or give start:stop")
    start, stop = dataset.splits[term]
    if start >= stop:
        raise DataError(f"{url}: split {term!r} is empty; make more data or give start:stop")
    return start, stop


def per_trajectory(
    dataset: Dataset, array: Array, name: str, column: str | None = None, whole: bool = False
) -> np.ndarray:
    """Values [n] of the array ``name`` with one number for each of the n trajectories of ``array``, or of a named column.

    ``whole``: entries of any shape, [n, ...].

    ``DataError`` if there is no such array or it is not that.
    """
    url, length, axis = dataset.url, array.shape[0], array.dimensions[0]
    # By the axis' name, not its extent: as many frames as trajectories do not make times parameters.
    found = {n: a for n, a in dataset.arrays.items() if a.window_axis == 0 and a.dimensions[0] == axis}
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise DataError(
            f"{url}: has no array {name!r} with one entry for each of {length} trajectories; it has {known}"
        )
    values = found[name]
    if column is None:
        if len(values.shape) != 1 and not whole:
            names = values.attributes.get("columns")
            hint = f"name a column, such as {name}.{names[0]}" if names else "conditions need one number each"
            raise DataError(f"{url}: array {name!r} has shape {list(values.shape)}; {hint}")
        return values.read((), 0, length)
    names = list(values.attributes.get("columns", []))
    if len(values.shape) != 2 or column not in names:
        raise DataError(
            f"{url}: array {name!r} has no column {column!r}; it has {', '.join(map(str, names)) or 'none with a name'}"
        )
    return values.read((), 0, length)[:, names.index(column)]

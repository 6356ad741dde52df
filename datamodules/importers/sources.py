"""Many source files as one: their variables end to end along the trajectory axis, in the order of the splits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from datamodules.format import DataError

from .base import FIELDS, Importer, Source, Variable
from .files import SourceFile

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """A run of trajectories [start, stop) of one file, which belongs to one split."""

    file: SourceFile
    start: int
    stop: int
    split: str


@dataclass
class Described:
    """What was read of a file when it was looked at; the file is closed again."""

    file: SourceFile
    variables: dict[str, Variable]
    attributes: dict[str, Any]

    @property
    def trajectories(self) -> int:
        return self.variables[FIELDS].shape[0]


class Sources:
    """All files; at most one is open at a time.

    Raises DataError where files do not fit together, naming both.
    """

    def __init__(self, importer: Importer, files: Sequence[SourceFile], fractions: dict[str, float]) -> None:
        self.importer = importer
        self._open: tuple[SourceFile, Source] | None = None
        self.described = [self._describe(file) for file in files]
        first = self.described[0]
        for other in self.described[1:]:
            _same(first, other)
        self.parts = self._split(fractions)
        self._starts = [0, *accumulate(part.stop - part.start for part in self.parts)]
        self.trajectories = self._starts[-1]

    def _describe(self, file: SourceFile) -> Described:
        source = self.source(file)
        for name, variable in source.variables.items():
            if 0 in variable.shape:
                raise DataError(f"{file.url}: {name} has shape {variable.shape}: it is empty")
        return Described(file, dict(source.variables), source.attributes)

    def source(self, file: SourceFile) -> Source:
        """The file, open."""
        if self._open is None or self._open[0] is not file:
            self.close()
            self._open = (file, self.importer.open(file))
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _split(self, fractions: dict[str, float]) -> list[Part]:
        """By folder where the files lie in folders named so; else each file by the fractions, rounding carried over.

        Raises DataError where there are too few trajectories to give each split one that is to have some.
        """
        if not fractions:
            whole = [Part(d.file, 0, d.trajectories, d.file.split or "train") for d in self.described]
            return [part for name in SPLITS for part in whole if part.split == name]
        train, validation, test = (fractions.get(name, 0.0) for name in SPLITS)
        seen = (train + validation) / (train + validation + test)
        trained = train / (train + validation) if seen else 0.0
        found: dict[str, list[Part]] = {name: [] for name in SPLITS}
        before, done = 0, dict.fromkeys(SPLITS, 0)
        for d in self.described:
            # Of all files up to this one: both cuts only grow, so that each share is exact to one trajectory over all of
            # them, however few a file holds.
            before += d.trajectories
            rest = round(seen * before)
            first = round(trained * rest)
            low = 0
            for name, total in zip(SPLITS, (first, rest - first, before - rest), strict=True):
                high = low + total - done[name]
                done[name] = total
                if high > low:
                    found[name].append(Part(d.file, low, high, name))
                low = high
        for name in SPLITS:
            if fractions.get(name, 0.0) > 0 and not found[name]:
                raise DataError(
                    f"split {name}={fractions[name]:g}: gets none of the {before} trajectories; raise its share or leave it out"
                )
        return [part for name in SPLITS for part in found[name]]

    def splits(self) -> dict[str, list[int]]:
        """Split -> [start, stop) on the trajectory axis; those that are empty are left out."""
        ranges: dict[str, list[int]] = {}
        for part, start in zip(self.parts, self._starts, strict=False):
            stop = start + part.stop - part.start
            ranges[part.split] = [ranges[part.split][0] if part.split in ranges else start, stop]
        return ranges

    def locate(self, trajectory: int) -> tuple[SourceFile, int]:
        """File of a trajectory, and its number there."""
        p = bisect_right(self._starts, trajectory) - 1
        part = self.parts[p]
        return part.file, part.start + trajectory - self._starts[p]

    def read(self, name: str, trajectory: int, a: int, b: int) -> np.ndarray:
        """Block of a variable; see `Variable.read`."""
        if not self.described[0].variables[name].per_trajectory:
            return self.source(self.described[0].file).variables[name].read(0, 0, 0)
        file, local = self.locate(trajectory)
        return self.source(file).variables[name].read(local, a, b)

    def attributes(self) -> dict[str, Any]:
        """Attributes of all files: those that differ are left out, except that channels and dt must not differ."""
        found = dict(self.described[0].attributes)
        for other in self.described[1:]:
            for key in [key for key, value in found.items() if other.attributes.get(key) != value]:
                if key in ("channels", "dt"):
                    raise DataError(
                        f"{other.file.url}: {key}={other.attributes.get(key)} but {self.described[0].file.url} has "
                        f"{found[key]}; import them as data sets of their own"
                    )
                del found[key]
        return found

    def check_static(self) -> None:
        """Arrays without a trajectory axis must be the same in all files."""
        first = self.described[0]
        names = [name for name, variable in first.variables.items() if not variable.per_trajectory]
        values = {name: self.read(name, 0, 0, 0) for name in names}
        for other in self.described[1:]:
            source = self.source(other.file)
            for name in names:
                if not np.array_equal(
                    source.variables[name].read(0, 0, 0), values[name], equal_nan=values[name].dtype.kind == "f"
                ):
                    raise DataError(
                        f"{other.file.url}: {name} differs from that of {first.file.url}; import them as data sets of their own"
                    )


def _same(first: Described, other: Described) -> None:
    """DataError unless two files hold the same variables in the same shapes."""
    if first.variables.keys() != other.variables.keys():
        names = ", ".join(sorted(first.variables.keys() ^ other.variables.keys()))
        raise DataError(
            f"{other.file.url}: not the same variables as in {first.file.url}; only one of them has {names}"
        )
    for name, a in first.variables.items():
        b, skip = other.variables[name], int(a.per_trajectory)
        if a.dimensions != b.dimensions or a.shape[skip:] != b.shape[skip:]:
            raise DataError(
                f"{other.file.url}: mixed shapes: {name} is {_shape(b)} but in {first.file.url} {_shape(a)}; "
                "import them as data sets of their own"
            )


def _shape(variable: Variable) -> str:
    named = zip(variable.dimensions, variable.shape, strict=True)
    return "(" + ", ".join(f"{axis}={n}" for axis, n in named) + ")"

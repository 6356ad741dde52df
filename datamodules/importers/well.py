"""The layout of The Well (arXiv 2412.00568; https://polymathic-ai.org/the_well/data_format).

HDF5 with groups `dimensions`, `scalars`, `t0_fields` (B T x y z), `t1_fields` (... D), `t2_fields` (... D D), each field
with the attributes `sample_varying`, `time_varying` and `dim_varying`, and `boundary_conditions`.

Fields that vary in time become channels, scalars first, then vectors and tensors by component (`velocity_x`,
`stress_xy`); axes along which a field does not vary are filled by repetition. Fields without time become arrays of their
own, [trajectory, *space] or [*space]. Scalars that vary between trajectories or in time become arrays; the others, and the
`simulation_parameters` of the file, become one number for each trajectory, so that files of several parameters go together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from datamodules.format import DataError

from .base import FIELDS, Source, Variable, components, constant, free_name, per_trajectory, plain, time_step
from .files import SourceFile
from .hdf5 import SUFFIXES, open_hdf5

ORDERS = ("t0_fields", "t1_fields", "t2_fields")


@dataclass
class WellConfig:
    """Nothing needs to be said: the files describe themselves."""


class Well:
    config_class: ClassVar[type] = WellConfig
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    def __init__(self, config: WellConfig) -> None:
        self.config = config

    @staticmethod
    def recognises(file: SourceFile) -> bool:
        with open_hdf5(file) as h5:
            return "dimensions" in h5 and any(order in h5 for order in ORDERS)

    def open(self, file: SourceFile) -> Source:
        h5 = open_hdf5(file)
        try:
            variables, attributes = _Reader(file, h5).read()
        except (KeyError, AttributeError, IndexError) as error:
            h5.close()
            raise DataError(f"{file.url}: is not in the layout of The Well ({error})") from error
        except DataError:
            h5.close()
            raise
        return Source(variables, attributes, h5.close)


class _Reader:
    """The variables of one open file."""

    def __init__(self, file: SourceFile, h5: Any) -> None:
        self.file, self.h5 = file, h5
        self.axes = [plain(name) for name in h5["dimensions"].attrs["spatial_dims"]]
        self.space = tuple(int(h5["dimensions"][axis].shape[-1]) for axis in self.axes)
        self.trajectories = int(h5.attrs["n_trajectories"])
        self.time = h5["dimensions"]["time"]
        self.frames = int(self.time.shape[-1])

    def read(self) -> tuple[dict[str, Variable], dict[str, Any]]:
        channels: list[str] = []
        moving: list[tuple[Any, int]] = []
        variables: dict[str, Variable] = {}
        for order, group in enumerate(ORDERS):
            for name in self._names(group):
                dataset = self.h5[group][name]
                self._check(dataset, f"{group}/{name}", order)
                if dataset.attrs["time_varying"]:
                    channels += components(name, self.axes, order)
                    moving.append((dataset, order))
                else:
                    variables |= self._still(name, dataset, order, variables)
        if not moving:
            raise DataError(f"{self.file.url}: has no field that varies in time")
        shape = (self.trajectories, self.frames, len(channels), *self.space)
        types = np.result_type(*(dataset.dtype for dataset, _ in moving))
        fields = Variable(("trajectory", "time", "channel", *self.axes), shape, types.name, self._reader(moving, types))
        variables = {FIELDS: fields, **variables, **self._coordinates()}
        self._scalars(variables)
        return variables, self._attributes(channels)

    def _names(self, group: str) -> list[str]:
        if group not in self.h5:
            return []
        held = self.h5[group]
        return [plain(name) for name in held.attrs["field_names"]] if "field_names" in held.attrs else sorted(held)

    def _expected(self, dataset: Any, order: int) -> list[tuple[str, int]]:
        """The axes that a field must have, by its attributes."""
        varying = [bool(flag) for flag in dataset.attrs["dim_varying"]]
        axes = [("trajectory", self.trajectories)] if dataset.attrs["sample_varying"] else []
        axes += [("time", self.frames)] if dataset.attrs["time_varying"] else []
        axes += [(a, n) for a, n, flag in zip(self.axes, self.space, varying, strict=True) if flag]
        return axes + [(f"component {i + 1}", len(self.axes)) for i in range(order)]

    def _check(self, dataset: Any, name: str, order: int) -> None:
        expected = self._expected(dataset, order)
        if dataset.shape != tuple(n for _, n in expected):
            wanted = ", ".join(f"{axis}={n}" for axis, n in expected)
            raise DataError(
                f"{self.file.url}: {name} has shape {dataset.shape} where its attributes say ({wanted}); "
                "wrong axis order, or wrong attributes"
            )

    def _frames(self, dataset: Any, order: int, i: int, a: int, b: int) -> np.ndarray:
        """Frames [a, b) of trajectory i with all axes of space, [T, *space, components]; one frame if it has no time."""
        attrs = dataset.attrs
        index: tuple[Any, ...] = (i,) if attrs["sample_varying"] else ()
        index += (slice(a, b),) if attrs["time_varying"] else ()
        block = dataset[index] if index else dataset[()]
        block = block if attrs["time_varying"] else block[None]
        varying = [bool(flag) for flag in attrs["dim_varying"]]
        extents = iter(block.shape[1:])
        shape = [next(extents) if flag else 1 for flag in varying]
        block = block.reshape(len(block), *shape, len(self.axes) ** order)
        return np.broadcast_to(block, (len(block), *self.space, block.shape[-1]))

    def _reader(self, moving: list[tuple[Any, int]], types: np.dtype[Any]) -> Any:
        count = sum(len(self.axes) ** order for _, order in moving)

        def read(i: int, a: int, b: int) -> np.ndarray:
            out = np.empty((b - a, count, *self.space), types)
            at = 0
            for dataset, order in moving:
                block = np.moveaxis(self._frames(dataset, order, i, a, b), -1, 1)
                out[:, at : at + block.shape[1]] = block
                at += block.shape[1]
            return out

        return read

    def _still(self, name: str, dataset: Any, order: int, taken: dict[str, Variable]) -> dict[str, Variable]:
        """A field without time: one variable for each component."""
        found = {}
        lead = ("trajectory",) if dataset.attrs["sample_varying"] else ()
        shape = (self.trajectories, *self.space) if lead else self.space
        for c, component in enumerate(components(name, self.axes, order)):
            unique = free_name(component, taken, tuple(self.axes))
            read = self._component(dataset, order, c)
            found[unique] = Variable((*lead, *self.axes), shape, dataset.dtype.name, read)
        return found

    def _component(self, dataset: Any, order: int, c: int) -> Any:
        return lambda i, a, b: self._frames(dataset, order, i, 0, 1)[0][..., c]

    def _coordinates(self) -> dict[str, Variable]:
        found = {}
        if self.time.ndim == 1:
            found["time"] = constant(("time",), self.time[()].astype(np.float64))
        else:
            found["times"] = per_trajectory(self.time[()].astype(np.float64), ("trajectory", "time"))
        for axis in self.axes:
            values = self.h5["dimensions"][axis]
            if values.ndim == 1:
                found[axis] = constant((axis,), values[()].astype(np.float64))
        return found

    def _scalars(self, variables: dict[str, Variable]) -> None:
        """Adds what varies; numbers that hold for the whole file go to each of its trajectories."""
        numbers: dict[str, Any] = {}
        for name in self.h5.attrs.get("simulation_parameters", ()):
            value = self.h5.attrs.get(plain(name))
            if value is not None and np.ndim(value) == 0:
                numbers[plain(name)] = plain(value)
        for name in self._names("scalars") if "scalars" in self.h5 else ():
            held = self.h5["scalars"][name]
            sample, timed = bool(held.attrs["sample_varying"]), bool(held.attrs["time_varying"])
            values = held[()]
            if not sample and not timed:
                numbers.setdefault(name, plain(np.asarray(values).reshape(-1)[0]))
                continue
            dimensions = ("trajectory",) * sample + ("time",) * timed
            shape = (self.trajectories,) * sample + (self.frames,) * timed
            if math.prod(shape) != np.size(values):
                raise DataError(f"{self.file.url}: scalars/{name} has shape {values.shape}, expected {shape}")
            unique = free_name(name, variables, tuple(self.axes))
            values = np.reshape(values, shape)
            variables[unique] = per_trajectory(values, dimensions) if sample else constant(dimensions, values)
        for name, value in numbers.items():
            if isinstance(value, int | float):
                held = np.full(self.trajectories, float(value))
                variables[free_name(name, variables, tuple(self.axes))] = per_trajectory(held)

    def _attributes(self, channels: list[str]) -> dict[str, Any]:
        attributes: dict[str, Any] = {"channels": channels, "grid": plain(self.h5.attrs.get("grid_type", "cartesian"))}
        if "dataset_name" in self.h5.attrs:
            attributes["name"] = plain(self.h5.attrs["dataset_name"])
        step = time_step(self.time[()])
        attributes |= {"dt": step} if step is not None else {}
        boundaries: dict[str, str] = {}
        for held in self.h5.get("boundary_conditions", {}).values():
            kind = plain(held.attrs["bc_type"]).lower()
            boundaries |= {plain(axis): kind for axis in held.attrs["associated_dims"]}
        attributes["boundary_conditions"] = boundaries
        ends = {a: self.h5["dimensions"][a] for a in self.axes if self.h5["dimensions"][a].ndim == 1}
        attributes["domain"] = {axis: [float(held[0]), float(held[-1])] for axis, held in ends.items()}
        return attributes

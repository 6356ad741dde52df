"""The layouts of PDEBench (arXiv 2210.07182; github.com/pdebench/PDEBench), four kinds of HDF5 file:

tensor   `tensor` [N, T, *space] with `x-coordinate`, `t-coordinate` (T or T + 1 entries) and, for Darcy, `nu` [N, *space];
         parameters are attributes of the file (advection, Burgers, 1D reaction-diffusion, Darcy)
gas      `density`, `pressure`, `Vx`, `Vy`, `Vz`, each [N, T, *space] (compressible Navier-Stokes)
groups   one group a trajectory, `0000/data` [T, *space, C] with `0000/grid/t`, `x`, `y` (diffusion-sorption, 2D
         diffusion-reaction, radial dam break)
flow     `velocity` [N, T, *space, D], `particles` [N, T, *space, 1], `force` [N, *space, D], `t` [N, T]
         (incompressible Navier-Stokes)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from datamodules.format import DataError

from .base import (
    FIELDS,
    Source,
    Variable,
    channels_first,
    components,
    constant,
    free_name,
    per_trajectory,
    plain,
    time_step,
)
from .files import SourceFile
from .hdf5 import SUFFIXES, open_hdf5

GAS = ("density", "pressure", "Vx", "Vy", "Vz")
AXES = ("x", "y", "z")
Read = Callable[[int, int, int], np.ndarray]


@dataclass
class PDEBenchConfig:
    """channels: names of the channels, where the file has none (u, or u_0, u_1, ... otherwise)."""

    channels: list[str] = field(default_factory=list)


class PDEBench:
    config_class: ClassVar[type] = PDEBenchConfig
    suffixes: ClassVar[tuple[str, ...]] = SUFFIXES

    def __init__(self, config: PDEBenchConfig) -> None:
        self.config = config

    @staticmethod
    def recognises(file: SourceFile) -> bool:
        with open_hdf5(file) as h5:
            return _kind(h5) != ""

    def open(self, file: SourceFile) -> Source:
        h5 = open_hdf5(file)
        kinds = {"tensor": self._tensor, "gas": self._gas, "groups": self._groups, "flow": self._flow}
        try:
            kind = _kind(h5)
            if not kind:
                raise DataError(
                    f"{file.url}: has {', '.join(sorted(h5)[:6]) or 'nothing'}: none of PDEBench's layouts "
                    "(tensor; density, pressure, Vx; 0000/data; velocity, particles)"
                )
            return kinds[kind](file, h5)
        except (KeyError, AttributeError, IndexError) as error:
            h5.close()
            raise DataError(f"{file.url}: is not in a layout of PDEBench ({error})") from error
        except DataError:
            h5.close()
            raise

    def _names(self, file: SourceFile, count: int) -> list[str]:
        given = self.config.channels
        if given and len(given) != count:
            raise DataError(f"{file.url}: has {count} channels, channels={given} names {len(given)}")
        return list(given) or (["u"] if count == 1 else [f"u_{i}" for i in range(count)])

    def _tensor(self, file: SourceFile, h5: Any) -> Source:
        data = h5["tensor"]
        axes = _axes(file, "tensor", data.shape, 2)
        coordinates = _coordinates(file, h5, "tensor", data.shape[1], data.shape[2:], axes)
        shape = (data.shape[0], data.shape[1], 1, *data.shape[2:])
        read: Read = lambda i, a, b: data[i, a:b][:, None]  # noqa: E731
        fields = Variable(("trajectory", "time", "channel", *axes), shape, data.dtype.name, read)
        variables = {FIELDS: fields, **coordinates}
        if "nu" in h5:
            coefficient = h5["nu"]
            expected = (data.shape[0], *data.shape[2:])
            if coefficient.shape != expected:
                raise DataError(f"{file.url}: nu has shape {coefficient.shape}; expected {expected} as tensor has")
            dimensions = ("trajectory", *axes)
            variables["nu"] = Variable(dimensions, expected, coefficient.dtype.name, lambda i, a, b: coefficient[i])
        return _source(file, h5, variables, self._names(file, 1))

    def _gas(self, file: SourceFile, h5: Any) -> Source:
        names = [name for name in GAS if name in h5]
        held = [h5[name] for name in names]
        shape = held[0].shape
        axes = _axes(file, names[0], shape, 2)
        for name, data in zip(names, held, strict=True):
            if data.shape != shape:
                raise DataError(f"{file.url}: {name} has shape {data.shape} but {names[0]} has {shape}: mixed shapes")
        coordinates = _coordinates(file, h5, names[0], shape[1], shape[2:], axes)
        full = (shape[0], shape[1], len(names), *shape[2:])
        read: Read = lambda i, a, b: np.stack([data[i, a:b] for data in held], 1)  # noqa: E731
        fields = Variable(("trajectory", "time", "channel", *axes), full, held[0].dtype.name, read)
        return _source(file, h5, {FIELDS: fields, **coordinates}, names)

    def _flow(self, file: SourceFile, h5: Any) -> Source:
        velocity, particles = h5["velocity"], h5.get("particles")
        axes = _axes(file, "velocity", velocity.shape[:-1], 2)
        n, frames, *space = velocity.shape[:-1]
        if velocity.shape[-1] != len(axes):
            raise DataError(
                f"{file.url}: velocity has {velocity.shape[-1]} components on {len(axes)} axes; wrong axis order?"
            )
        held = [velocity] if particles is None else [velocity, particles]
        for data in held:
            if data.shape[:-1] != velocity.shape[:-1] or (data is particles and data.shape[-1] != 1):
                raise DataError(
                    f"{file.url}: particles has shape {data.shape} but velocity {velocity.shape}: mixed shapes"
                )
        names = components("velocity", list(axes), 1) + ([] if particles is None else ["particles"])
        read: Read = lambda i, a, b: np.concatenate([channels_first(data[i, a:b]) for data in held], 1)  # noqa: E731
        shape = (n, frames, len(names), *space)
        variables = {FIELDS: Variable(("trajectory", "time", "channel", *axes), shape, velocity.dtype.name, read)}
        if "force" in h5:
            force = h5["force"]
            if force.shape != (n, *space, len(axes)):
                due = {"trajectory": n, **dict(zip(axes, space, strict=True)), "component": len(axes)}
                wanted = ", ".join(f"{axis}={extent}" for axis, extent in due.items())
                raise DataError(f"{file.url}: force has shape {force.shape} where ({wanted}) is due: mixed shapes")
            for c, name in enumerate(components("force", list(axes), 1)):
                still = _component(force, c)
                variables[name] = Variable(("trajectory", *axes), (n, *space), force.dtype.name, still)
        attributes = {}
        if "t" in h5:
            times = np.asarray(h5["t"][()], np.float64)
            if times.shape != (n, frames):
                raise DataError(
                    f"{file.url}: t has shape {times.shape} but velocity {velocity.shape} has {n} trajectories of {frames} "
                    f"frames; the order must be (trajectory, time, {', '.join(axes)}, component): wrong axis order?"
                )
            variables["times"] = per_trajectory(times, ("trajectory", "time"))
            step = time_step(times)
            attributes = {"dt": step} if step is not None else {}
        return _source(file, h5, variables, names, attributes)

    def _groups(self, file: SourceFile, h5: Any) -> Source:
        keys = sorted(key for key in h5 if re.fullmatch(r"\d+", key))
        first = h5[keys[0]]
        shape = first["data"].shape
        axes = _axes(file, f"{keys[0]}/data", shape[:-1], 1)
        grid = first.get("grid", {})
        coordinates = {}
        for name, extent in zip(("t", *axes), shape[:-1], strict=True):
            if name in grid:
                if len(grid[name]) != extent:
                    raise DataError(
                        f"{file.url}: {keys[0]}/data has shape {shape}; grid/{name} has {len(grid[name])} entries where "
                        f"(t, {', '.join(axes)}, channel) needs {extent}: wrong axis order?"
                    )
                axis = "time" if name == "t" else name
                coordinates[axis] = constant((axis,), np.asarray(grid[name][()], np.float64))

        def read(i: int, a: int, b: int) -> np.ndarray:
            data = h5[keys[i]]["data"]
            if data.shape != shape:
                raise DataError(
                    f"{file.url}: {keys[i]}/data has shape {data.shape} but {keys[0]}/data {shape}: mixed shapes"
                )
            return channels_first(data[a:b])

        full = (len(keys), shape[0], shape[-1], *shape[1:-1])
        fields = Variable(("trajectory", "time", "channel", *axes), full, first["data"].dtype.name, read)
        names = self._names(file, shape[-1])
        return _source(file, h5, {FIELDS: fields, **coordinates}, names)


def _kind(h5: Any) -> str:
    if "tensor" in h5:
        return "tensor"
    if "density" in h5:
        return "gas"
    if "velocity" in h5 and getattr(h5["velocity"], "ndim", 0) >= 4:
        return "flow"
    numbered = next((key for key in h5 if re.fullmatch(r"\d+", key)), None)
    return "groups" if numbered is not None and "data" in h5[numbered] else ""


def _axes(file: SourceFile, name: str, shape: tuple[int, ...], lead: int) -> tuple[str, ...]:
    """Names of the axes behind the `lead` first ones."""
    rank = len(shape) - lead
    if not 1 <= rank <= len(AXES):
        raise DataError(f"{file.url}: {name} has shape {shape}: {rank} axes of space; 1 to 3 are possible")
    return AXES[:rank]


def _coordinates(
    file: SourceFile, h5: Any, name: str, frames: int, space: tuple[int, ...], axes: tuple[str, ...]
) -> dict[str, Variable]:
    """Coordinates of time and space; DataError where their lengths do not fit the axes."""
    found = {}
    for axis, extent in zip(("time", *axes), (frames, *space), strict=True):
        key = f"{axis[0]}-coordinate"
        if key not in h5 or h5[key].ndim != 1:
            continue
        values = np.asarray(h5[key][()], np.float64)
        if len(values) == extent + 1 and axis == "time":
            values = values[:-1]  # PDEBench stores one time too many in some files
        if len(values) != extent:
            raise DataError(
                f"{file.url}: {key} has {len(values)} entries but axis {axis} of {name} {(*h5[name].shape,)} has {extent}; "
                f"the order must be (trajectory, time, {', '.join(axes)}): wrong axis order?"
            )
        found[axis] = constant((axis,), values)
    return found


def _component(data: Any, c: int) -> Read:
    return lambda i, a, b: data[i][..., c]


def _source(
    file: SourceFile, h5: Any, variables: dict[str, Variable], channels: list[str], more: dict[str, Any] | None = None
) -> Source:
    """With the file's numeric attributes as a parameter of each of its trajectories."""
    fields = variables[FIELDS]
    axes = fields.dimensions[3:]
    for key, value in h5.attrs.items():
        number = plain(value)
        if isinstance(number, int | float) and not isinstance(number, bool) and key != "latestIndex":
            held = np.full(fields.shape[0], float(number))
            variables[free_name(key, variables, axes)] = per_trajectory(held)
    attributes: dict[str, Any] = {"channels": channels, **(more or {})}
    if "time" in variables and (step := time_step(variables["time"].read(0, 0, 0))) is not None:
        attributes["dt"] = step
    ends = {axis: variables[axis].read(0, 0, 0) for axis in axes if axis in variables}
    attributes["domain"] = {axis: [float(held[0]), float(held[-1])] for axis, held in ends.items()}
    return Source(variables, attributes, h5.close)

"""NetCDF-4 files and Zarr groups, through xarray: axes are known by name, in any order.

Data variables with a time axis and the axes of space become channels of `fields`. Those without time become arrays of
their own: a number or a field for each trajectory, or a static field; a single number goes to each trajectory of its file.
What fits nowhere is refused, unless `variables` names what is wanted. A file without a trajectory axis is one trajectory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from datamodules.format import DataError

from .base import FIELDS, Source, Variable, constant, free_name, need, per_trajectory, plain, time_step
from .files import SourceFile
from .zarr_groups import open_group

TRAJECTORY = (
    "trajectory", "traj", "sample", "samples", "member", "ensemble", "realization", "batch", "simulation", "run", "case",
)  # fmt: skip
TIME = ("time", "t", "step", "valid_time")
CHANNEL = ("channel", "channels", "component", "variable")
# Times stay numbers; what only describes other variables (bounds of cells, grid mappings) is no data variable.
DECODING: dict[str, Any] = {"decode_times": False, "decode_coords": "all"}


@dataclass
class XarrayConfig:
    """Which names mean what; empty: the usual ones.

    trajectory, time, channel: names of these axes in the files. space: those of space, in the order wanted.
    variables: data variables that become channels, in this order; others with time, and those that fit nowhere, are left out.
        Empty: all that have time and space.
    axes: names, in order, for the axes of Zarr arrays that have as many and name none themselves.
    """

    trajectory: str = ""
    time: str = ""
    channel: str = ""
    space: list[str] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    axes: list[str] = field(default_factory=list)


class XarrayData:
    config_class: ClassVar[type] = XarrayConfig
    suffixes: ClassVar[tuple[str, ...]] = (".nc", ".nc4", ".netcdf", ".zarr")

    def __init__(self, config: XarrayConfig) -> None:
        self.config = config

    @staticmethod
    def recognises(file: SourceFile) -> bool:
        return file.suffix in XarrayData.suffixes

    def open(self, file: SourceFile) -> Source:
        data = _open(file, self.config.axes)
        try:
            variables, attributes = _Reader(file, data, self.config).read()
        except DataError:
            data.close()
            raise
        return Source(variables, attributes, data.close)


def _open(file: SourceFile, axes: list[str]) -> Any:
    """The `xarray.Dataset`, nothing of it loaded; times stay numbers."""
    if file.suffix == ".zarr":
        return open_group(file, axes, DECODING)
    if axes:
        raise ValueError(f"option axes={','.join(axes)}: has no effect on NetCDF, whose axes have names")
    xarray = need("xarray", "reading NetCDF")
    try:
        need("h5netcdf", "reading NetCDF")
        return xarray.open_dataset(file.handle(), engine="h5netcdf", cache=False, **DECODING)
    except (OSError, ValueError, KeyError) as error:
        if not file.store.exists(file.path):
            raise DataError(f"{file.url}: no such file") from error
        hint = " A NetCDF-3 file is first made NetCDF-4: nccopy -k nc4 OLD NEW."
        raise DataError(f"{file.url}: cannot be opened ({' '.join(str(error).split())[:200]}).{hint}") from error


class _Reader:
    def __init__(self, file: SourceFile, data: Any, config: XarrayConfig) -> None:
        self.file, self.data, self.config = file, data, config
        dims = [str(name) for name in data.sizes]
        self.trajectory = self._axis("trajectory", config.trajectory, TRAJECTORY, dims)
        self.time = self._axis("time", config.time, TIME, dims)
        self.channel = self._axis("channel", config.channel, CHANNEL, dims)
        if not self.time:
            raise DataError(f"{file.url}: none of its axes ({', '.join(dims)}) is time; name it with -o time=AXIS")
        known = (self.trajectory, self.time, self.channel)
        moving = [v for v in self._named() if self.time in v.dims] or [
            v for v in data.data_vars.values() if self.time in v.dims
        ]
        rank = max((sum(d not in known for d in v.dims) for v in moving), default=0)
        spatial = [v for v in moving if sum(d not in known for d in v.dims) == rank]
        if not spatial:
            raise DataError(f"{file.url}: no data variable has the time axis {self.time!r}")
        self.space = list(config.space) or [str(d) for d in spatial[0].dims if d not in known]
        for name in self.space:
            if name not in data.sizes:
                raise DataError(f"{file.url}: has no axis {name!r} for space; it has {', '.join(dims)}")
        self.moving = [v for v in spatial if set(v.dims) - set(known) == set(self.space)]
        if (config.variables and len(self.moving) != len(config.variables)) or not self.moving:
            shapes = "; ".join(f"{v.name} ({', '.join(map(str, v.dims))})" for v in moving)
            raise DataError(
                f"{file.url}: its variables have different axes ({shapes}) where time and space ({', '.join(self.space)}) "
                "are needed; choose with -o variables=... or name the axes with -o trajectory=, time=, channel=, space="
            )

    def _named(self) -> list[Any]:
        for name in self.config.variables:
            if name not in self.data.data_vars:
                known = ", ".join(map(str, self.data.data_vars))
                raise DataError(f"{self.file.url}: has no variable {name!r}; it has {known}")
        return [self.data[name] for name in self.config.variables]

    def _axis(self, role: str, given: str, usual: tuple[str, ...], dims: list[str]) -> str:
        if given and given not in dims:
            raise DataError(f"{self.file.url}: has no axis {given!r} for {role}; it has {', '.join(dims)}")
        return given or next((name for name in usual if name in dims), "")

    def read(self) -> tuple[dict[str, Variable], dict[str, Any]]:
        sizes, channels = self.data.sizes, []
        for variable in self.moving:
            names = [str(variable.name)]
            if self.channel in variable.dims:
                labels = (
                    self.data[self.channel].values if self.channel in self.data.coords else range(sizes[self.channel])
                )
                names = [f"{variable.name}_{label}" for label in labels]
                if (
                    len(self.moving) == 1
                    and self.channel in self.data.coords
                    and self.data[self.channel].dtype.kind in "UO"
                ):
                    names = [str(label) for label in labels]
            channels += names
        count = sizes[self.trajectory] if self.trajectory else 1
        space = tuple(sizes[name] for name in self.space)
        types = np.result_type(*(variable.dtype for variable in self.moving))
        if types.kind not in "fiub":
            raise DataError(f"{self.file.url}: {self.moving[0].name} holds {types}; only real numbers can be imported")
        axes = ("trajectory", "time", "channel", *self.space)
        shape = (count, sizes[self.time], len(channels), *space)
        variables = {FIELDS: Variable(axes, shape, types.name, self._frames)}
        variables |= self._coordinates()
        variables |= self._still(variables)
        return variables, self._attributes(channels)

    def _frames(self, i: int, a: int, b: int) -> np.ndarray:
        parts = []
        for variable in self.moving:
            index: dict[str, Any] = {self.time: slice(a, b)}
            if self.trajectory in variable.dims:
                index[self.trajectory] = i
            order = [self.time, *([self.channel] if self.channel in variable.dims else []), *self.space]
            block = variable.isel(index).transpose(*order).values
            parts.append(block if self.channel in variable.dims else block[:, None])
        return np.concatenate(parts, 1)

    def _coordinates(self) -> dict[str, Variable]:
        found = {}
        for axis, name in (("time", self.time), *((name, name) for name in self.space)):
            if name in self.data.coords and self.data[name].ndim == 1 and self.data[name].dtype.kind in "fiu":
                held = constant((axis,), np.asarray(self.data[name].values, np.float64))
                held.units = str(self.data[name].attrs.get("units", ""))
                found[axis] = held
        return found

    def _still(self, taken: dict[str, Variable]) -> dict[str, Variable]:
        """Variables without time (or with no space): parameters, coefficients, masks, series."""
        names = {self.trajectory: "trajectory", self.time: "time", **{axis: axis for axis in self.space}}
        found: dict[str, Variable] = {}
        left: list[str] = []
        for variable in self.data.data_vars.values():
            if any(variable.name == other.name for other in self.moving):
                continue
            if self.config.variables and self.time in variable.dims:
                continue
            if variable.dtype.kind not in "fiub" or any(dim not in names for dim in variable.dims):
                left.append(f"{variable.name} ({', '.join(map(str, variable.dims))}) {variable.dtype}")
                continue
            if not variable.dims:
                unique = free_name(str(variable.name), {**taken, **found}, tuple(self.space))
                count = taken[FIELDS].shape[0]
                found[unique] = per_trajectory(np.full(count, variable.values))
                continue
            order = [axis for axis in (self.trajectory, self.time, *self.space) if axis in variable.dims]
            axes = tuple(names[axis] for axis in order)
            shape = tuple(self.data.sizes[axis] for axis in order)
            unique = free_name(str(variable.name), {**taken, **found}, tuple(self.space))
            read = self._block(variable, order)
            found[unique] = Variable(axes, shape, variable.dtype.name, read, str(variable.attrs.get("units", "")))
        if left and not self.config.variables:
            fields = ", ".join(filter(None, (self.trajectory, self.time, self.channel, *self.space)))
            raise DataError(
                f"{self.file.url}: fits nowhere: {'; '.join(left)}; numbers on the axes {fields} can be imported; name the "
                f"channels wanted to leave the rest out: -o variables={','.join(str(v.name) for v in self.moving)}"
            )
        return found

    def _block(self, variable: Any, order: list[str]) -> Any:
        def read(i: int, a: int, b: int) -> np.ndarray:
            index: dict[str, Any] = {self.trajectory: i} if self.trajectory in order else {}
            if self.trajectory in order and self.time in order:
                index[self.time] = slice(a, b)
            left = [axis for axis in order if not isinstance(index.get(axis), int)]
            return np.asarray(variable.isel(index).transpose(*left).values)

        return read

    def _attributes(self, channels: list[str]) -> dict[str, Any]:
        attributes: dict[str, Any] = {"channels": channels}
        units = {str(v.name): str(v.attrs["units"]) for v in self.moving if "units" in v.attrs}
        if self.time in self.data.coords:
            times = self.data[self.time]
            step = time_step(times.values) if times.dtype.kind in "fiu" else None
            attributes |= {"dt": step} if step is not None else {}
            if "units" in times.attrs:
                units["time"] = str(times.attrs["units"])
        attributes["units"] = units
        kept = {str(key): plain(value) for key, value in self.data.attrs.items()}
        attributes["source_attributes"] = {key: value for key, value in kept.items() if value is not None}
        return attributes

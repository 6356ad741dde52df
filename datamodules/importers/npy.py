"""Plain `.npy` files: one array of trajectories each, or one trajectory each. NumPy's format has no names, so `axes` does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from datamodules.format import DataError

from .base import FIELDS, Source, Variable, constant
from .files import RangeFile, SourceFile


@dataclass
class NpyConfig:
    """How to read the arrays.

    axes: names of the axes in the order of the file; `trajectory`, `time` and `channel` are known, all others are space.
        A file without `trajectory` is one trajectory, one without `channel` has one channel.
    channels: their names. dt: time between frames; 0: not known.
    """

    axes: list[str] = field(default_factory=lambda: ["trajectory", "time", "channel", "y", "x"])
    channels: list[str] = field(default_factory=list)
    dt: float = 0.0

    def __post_init__(self) -> None:
        if len(set(self.axes)) != len(self.axes) or "time" not in self.axes:
            raise ValueError(f"axes={self.axes}: must be different names with `time` among them")
        if self.dt < 0:
            raise ValueError(f"dt={self.dt}: must be positive, or 0 where it is not known")


class Npy:
    config_class: ClassVar[type] = NpyConfig
    suffixes: ClassVar[tuple[str, ...]] = (".npy",)

    def __init__(self, config: NpyConfig) -> None:
        self.config = config

    @staticmethod
    def recognises(file: SourceFile) -> bool:
        return file.path.endswith(".npy")

    def open(self, file: SourceFile) -> Source:
        given, config = _Slices(file), self.config
        axes = config.axes
        if len(axes) != len(given.shape):
            raise DataError(
                f"{file.url}: has shape {given.shape}, {len(given.shape)} axes, but axes={','.join(axes)} names {len(axes)}; "
                "give -o axes=... in the order of the file"
            )
        if 0 in given.shape:
            raise DataError(f"{file.url}: has shape {given.shape}: it is empty")
        space = [axis for axis in axes if axis not in ("trajectory", "time", "channel")]
        extents = dict(zip(axes, given.shape, strict=True))
        count = extents.get("channel", 1)
        names = list(config.channels) or (["u"] if count == 1 else [f"u_{i}" for i in range(count)])
        if len(names) != count:
            raise DataError(f"{file.url}: axis channel has {count} entries, channels={names} names {len(names)}")
        order = ("trajectory", "time", "channel", *space)
        left = [axis for axis in axes if axis != "trajectory"]

        def read(i: int, a: int, b: int) -> np.ndarray:
            index = {"trajectory": i, "time": slice(a, b)}
            block = given[tuple(index.get(axis, slice(None)) for axis in axes)]
            block = np.moveaxis(block, [left.index(axis) for axis in order if axis in left], range(len(left)))
            return block if "channel" in axes else block[:, None]

        shape = (extents.get("trajectory", 1), extents["time"], count, *(extents[axis] for axis in space))
        variables = {FIELDS: Variable(order, shape, given.dtype.name, read)}
        attributes: dict[str, Any] = {"channels": names}
        if config.dt:
            attributes["dt"] = config.dt
            variables["time"] = constant(("time",), config.dt * np.arange(extents["time"]))
        return Source(variables, attributes, given.close)


class _Slices:
    """Slices of a `.npy` file: a local one is mapped into memory, of a remote one only the bytes of a slice are fetched."""

    def __init__(self, file: SourceFile) -> None:
        self.url, self._mapped = file.url, None
        try:
            if file.local:
                self._mapped = np.load(file.local, mmap_mode="r", allow_pickle=False)
                self.shape, self.dtype, fortran = self._mapped.shape, self._mapped.dtype, False
            else:
                self._file = RangeFile(file.store, file.path)
                version = np.lib.format.read_magic(self._file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                self.shape, fortran, self.dtype = read(self._file)
                self._begin = self._file.tell()
        except (ValueError, EOFError) as error:
            raise DataError(f"{file.url}: is not a plain .npy file ({error})") from error
        except FileNotFoundError as error:
            raise DataError(f"{file.url}: no such file") from error
        if fortran:
            raise DataError(f"{file.url}: is in Fortran order; copy it to a local disk first, or save it in C order")
        if self.dtype.hasobject or self.dtype.kind not in "fiub":
            raise DataError(f"{file.url}: holds {self.dtype}; only real numbers can be imported")

    def __getitem__(self, index: tuple[Any, ...]) -> np.ndarray:
        if self._mapped is not None:
            return np.asarray(self._mapped[index])
        # Leading axes that are cut give one byte range; the rest of the index is applied to what it holds.
        lead, offset, rest = 0, 0, list(self.shape)
        for part, extent in zip(index, self.shape, strict=True):
            inner = math.prod(self.shape[lead + 1 :])
            if isinstance(part, slice):
                a, b, _ = part.indices(extent)
                offset, rest[0] = offset + a * inner, b - a
                break
            offset, lead, rest = offset + part * inner, lead + 1, rest[1:]
        size = math.prod(rest) * self.dtype.itemsize
        start = self._begin + offset * self.dtype.itemsize
        data = self._file.store.read_range(self._file.path, start, start + size)
        block = np.frombuffer(data, self.dtype).reshape(rest)
        return np.asarray(block[(slice(None), *index[lead + 1 :])])

    def close(self) -> None:
        """Drop the map."""
        self._mapped = None

"""Plain `.npy` files: one array of trajectories each, or one trajectory each. NumPy's format has no names, so `axes` does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from datamodules.format import DataError

from . import files
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
    """Slices of a `.npy` file: a local one is mapped into memory, of a remote one only blocks with bytes of a slice are fetched.

    Where trajectory and time are not the first axes these are nearly all blocks: slow, but memory stays the same.
    """

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
        return self._fetch(index, 0, 0)

    def _fetch(self, index: tuple[Any, ...], axis: int, offset: int) -> np.ndarray:
        """`index` from `axis` on, applied to the part of the file that begins with entry `offset`.

        A byte range where it is one. Else a part of at most a block is read and cut, and a larger one piece by piece.
        """
        part, inner = index[axis], math.prod(self.shape[axis + 1 :])
        if not isinstance(part, slice) and axis + 1 < len(index):
            return self._fetch(index, axis + 1, offset + part * inner)
        a, b, _ = part.indices(self.shape[axis]) if isinstance(part, slice) else (part, part + 1, 1)
        rest, row = index[axis + 1 :], inner * self.dtype.itemsize
        start = self._begin + offset * self.dtype.itemsize
        if all(p == slice(None) for p in rest):
            data = self._file.store.read_range(self._file.path, start + a * row, start + b * row)
            block = np.frombuffer(data, self.dtype).reshape(b - a, *self.shape[axis + 1 :])
        elif row > files.BLOCK_BYTES:
            block = np.stack([self._fetch(index, axis + 1, offset + j * inner) for j in range(a, b)])
        else:
            step = files.BLOCK_BYTES // row
            pieces = (
                self._rows(start + j * row, min(step, b - j), axis)[(slice(None), *rest)] for j in range(a, b, step)
            )
            block = np.concatenate([piece.copy() for piece in pieces])
        return block if isinstance(part, slice) else block[0]

    def _rows(self, start: int, count: int, axis: int) -> np.ndarray:
        """Entries of `axis` from a byte on; the next ones are often in the same block of the file."""
        self._file.seek(start)
        data = self._file.read(count * math.prod(self.shape[axis + 1 :]) * self.dtype.itemsize)
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[axis + 1 :])

    def close(self) -> None:
        """Drop the map."""
        self._mapped = None

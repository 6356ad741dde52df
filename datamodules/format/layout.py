"""Geometry of one array in Zarr v3 sharding, and its `zarr.json`.

An array has axes `(trajectory, time, channel, *space)` or `(token,)`. Shards cut axis 0 only; inner chunks have extent 1
before the window axis (`time`, or `token`) and are whole after it. With inner chunks in C order a window along that axis
is one byte range of one shard, or a few for text that crosses a shard.

Zarr v3 core: https://zarr-specs.readthedocs.io/en/latest/v3/core/; sharding codec: ZEP 2, `sharding_indexed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from .errors import DataError

DTYPES = {
    "float32": "<f4", "float64": "<f8", "uint8": "u1", "uint16": "<u2", "int32": "<i4", "int64": "<i8",
}  # fmt: skip
CHECKSUM_BYTES = 4
INDEX_ENTRY_BYTES = 16  # offset and length of a chunk, both uint64
ABSENT = 2**64 - 1  # offset and length of a chunk that was not written: it holds the fill value

BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}


@dataclass(frozen=True)
class ArraySpec:
    """Shape and cutting of an array.

    shape: extents of all axes.
    dtype: numpy name, one of DTYPES.
    dimensions: names of the axes.
    shard_length: extent of a shard on axis 0.
    chunk_length: extent of an inner chunk on the window axis (frames or tokens read at once).
    attributes: of the array, plain JSON.
    """

    shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    shard_length: int
    chunk_length: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: not storable; use one of {', '.join(DTYPES)}")
        if len(self.dimensions) != len(self.shape) or not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape={self.shape}: needs one extent >= 1 for each of dimensions={self.dimensions}")
        if self.shard_length < 1 or self.chunk_length < 1:
            raise ValueError(f"shard_length={self.shard_length}, chunk_length={self.chunk_length}: must be >= 1")
        if self.shard_shape[self.window_axis] % self.chunk_length:
            raise ValueError(
                f"chunk_length={self.chunk_length}: must divide the {self.shard_shape[self.window_axis]} "
                f"{self.dimensions[self.window_axis]} entries of a shard"
            )

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.dtype])

    @cached_property
    def window_axis(self) -> int:
        """The axis along which windows are read: `time` where there is one, else axis 0."""
        return self.dimensions.index("time") if "time" in self.dimensions else 0

    @cached_property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of one entry of the window axis."""
        return self.shape[self.window_axis + 1 :]

    @cached_property
    def shard_shape(self) -> tuple[int, ...]:
        return (self.shard_length, *self.shape[1:])

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        return (*(1 for _ in range(self.window_axis)), self.chunk_length, *self.frame_shape)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Inner chunks of a full shard along the axes up to the window axis."""
        extents = self.shard_shape[: self.window_axis + 1]
        return tuple(s // c for s, c in zip(extents, self.chunk_shape, strict=False))

    @cached_property
    def chunk_count(self) -> int:
        return math.prod(self.chunks)

    @cached_property
    def chunk_bytes(self) -> int:
        """Stored bytes of an inner chunk with its checksum."""
        return math.prod(self.chunk_shape) * self.numpy_dtype.itemsize + CHECKSUM_BYTES

    @cached_property
    def index_bytes(self) -> int:
        return self.chunk_count * INDEX_ENTRY_BYTES + CHECKSUM_BYTES

    @cached_property
    def shards(self) -> int:
        return math.ceil(self.shape[0] / self.shard_length)

    def shard_key(self, k: int) -> str:
        """Object of shard k, relative to the array (Zarr's default chunk key encoding)."""
        return "/".join(["c", str(k), *("0" for _ in self.shape[1:])])

    def shard_extent(self, k: int) -> int:
        """Entries of axis 0 that shard k really holds; the last shard may hold fewer than shard_length."""
        return min(self.shard_length, self.shape[0] - k * self.shard_length)

    def present_chunks(self, k: int) -> int:
        """Inner chunks that shard k holds: the first ones in C order, as only axis 0 can be cut short."""
        extent = self.shard_extent(k)
        if self.window_axis == 0:
            return math.ceil(extent / self.chunk_length)
        return extent * math.prod(self.chunks[1:])

    def shard_bytes(self, k: int) -> int:
        """Size of the object of shard k."""
        return self.present_chunks(k) * self.chunk_bytes + self.index_bytes

    def to_json(self) -> dict[str, Any]:
        """The array's `zarr.json`."""
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": [BYTES, CRC32C],
            "index_codecs": [BYTES, CRC32C],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shard_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": list(self.dimensions),
            "attributes": self.attributes,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any], where: str) -> ArraySpec:
        """Read an array's `zarr.json`, also one of zarr-python; DataError where this reader cannot read the array."""
        try:
            shape = tuple(document["shape"])
            shard_shape = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
            names = document.get("dimension_names") or [f"dim_{i}" for i in range(len(shape))]
            dimensions = tuple(name or f"dim_{i}" for i, name in enumerate(names))
            codec = document["codecs"][0]
            if len(document["codecs"]) != 1 or codec["name"] != "sharding_indexed":
                raise DataError(f"{where}: is not sharded; write it again with the sharding_indexed codec")
            sharding = codec["configuration"]
            for field_name, required in (("codecs", ["bytes", "crc32c"]), ("index_codecs", ["bytes", "crc32c"])):
                found = [c["name"] for c in sharding[field_name]]
                if found != required:
                    raise DataError(f"{where}: {field_name}={found} cannot be read; supported: {required}")
            if any(c.get("configuration", {}).get("endian", "little") != "little" for c in sharding["codecs"]):
                raise DataError(f"{where}: is big-endian; write it again as little-endian")
            if sharding.get("index_location", "end") != "end":
                raise DataError(f"{where}: index_location={sharding['index_location']!r}; supported: 'end'")
            encoding = document["chunk_key_encoding"]
            separator = encoding.get("configuration", {}).get("separator", "/")
            if encoding["name"] != "default" or separator != "/":
                raise DataError(f"{where}: chunk keys are not of the default encoding with separator '/'")
            if document["fill_value"] not in (0, 0.0):
                raise DataError(f"{where}: fill_value={document['fill_value']!r}; supported: 0")
            axis = dimensions.index("time") if "time" in dimensions else 0
            chunk = tuple(sharding["chunk_shape"])
            spec = cls(
                shape=shape,
                dtype=document["data_type"],
                dimensions=dimensions,
                shard_length=shard_shape[0],
                chunk_length=chunk[axis],
                attributes=document.get("attributes", {}),
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: is not the description of a Zarr v3 array ({error!r})") from error
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if spec.shard_shape != shard_shape or spec.chunk_shape != chunk:
            raise DataError(
                f"{where}: shards {shard_shape} of chunks {chunk} cannot be read in windows; shards must cut axis 0 only "
                f"and chunks must be {spec.chunk_shape[:axis]} before and {spec.frame_shape} after the window axis"
            )
        return spec

"""Geometry of one array in Zarr v3 sharding, and its `zarr.json`.

An array has axes `(trajectory, time, channel, *space)`, `(token,)`, or any others: `(trajectory, parameter)`, `(y, x)`.
Shards cut axis 0 only; inner chunks have extent 1 before the window axis (`time`, else axis 0) and are whole after it.
With inner chunks in C order a window along that axis is one byte range of one shard, or a few where it crosses shards.
Arrays of other writers may be cut otherwise (`Foreign`); they are read chunk by chunk.

Zarr v3 core: https://zarr-specs.readthedocs.io/en/latest/v3/core/; sharding codec: ZEP 2, `sharding_indexed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from . import codecs
from .codecs import CHECKSUM_BYTES
from .dtypes import BFLOAT16, DTYPES, MARK, STORABLE, parse_fill, stored
from .errors import DataError

INDEX_ENTRY_BYTES = 16  # offset and length of a chunk, both uint64
ABSENT = 2**64 - 1  # offset and length of a chunk that was not written: it holds the fill value


@dataclass(frozen=True)
class Foreign:
    """How an array of another writer is cut and encoded, where that is not how Keel does it.

    shard_shape, chunk_shape: full rank. stages: codecs after `bytes`. index_first: whether the index begins the shard.
    index_checksum: whether it has a crc32c. fill: value of absent chunks.
    """

    shard_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    stages: tuple[str, ...]
    index_first: bool = False
    index_checksum: bool = True
    fill: Any = 0


@dataclass(frozen=True)
class ArraySpec:
    """Shape, type and cutting of an array.

    shape: extents of all axes.
    dtype: one of `dtypes.STORABLE`.
    dimensions: names of the axes; the same name means the same extent in all arrays of a data set.
    shard_length: extent of a shard on axis 0.
    chunk_length: extent of an inner chunk on the window axis (frames or tokens read at once).
    attributes: of the array, plain JSON.
    level: of zstd compression, -7 to 22; None: not compressed. 3 is usual. Chunks then vary in size.
    foreign: only for reading what others wrote.
    """

    shape: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    shard_length: int
    chunk_length: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)
    level: int | None = None
    foreign: Foreign | None = None

    def __post_init__(self) -> None:
        if self.dtype not in STORABLE:
            raise ValueError(f"dtype={self.dtype!r}: not storable; use one of {', '.join(STORABLE)}")
        if len(self.dimensions) != len(self.shape) or not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape={self.shape}: needs one extent >= 1 for each of dimensions={self.dimensions}")
        if len(set(self.dimensions)) != len(self.dimensions):
            raise ValueError(f"dimensions={self.dimensions}: a name appears twice")
        if self.level is not None and self.level not in codecs.LEVELS:
            raise ValueError(f"level={self.level}: zstd has {codecs.LEVELS[0]} to {codecs.LEVELS[-1]}; 3 is usual")
        if self.foreign is not None:
            self._check_foreign(self.foreign)
            return
        if self.shard_length < 1 or self.chunk_length < 1:
            raise ValueError(f"shard_length={self.shard_length}, chunk_length={self.chunk_length}: must be >= 1")
        if self.shard_shape[self.window_axis] % self.chunk_length:
            raise ValueError(
                f"chunk_length={self.chunk_length}: must divide the {self.shard_shape[self.window_axis]} "
                f"{self.dimensions[self.window_axis]} entries of a shard"
            )

    def _check_foreign(self, foreign: Foreign) -> None:
        shards, chunks, rank = foreign.shard_shape, foreign.chunk_shape, len(self.shape)
        if len(shards) != rank or len(chunks) != rank or min(*shards, *chunks) < 1:
            raise ValueError(f"shards {shards} of chunks {chunks} do not fit shape={self.shape}")
        if any(s % c for s, c in zip(shards, chunks, strict=True)):
            raise ValueError(f"chunks {chunks} do not divide shards {shards}")

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the stored elements; bits (uint16) for bfloat16."""
        return np.dtype(DTYPES[stored(self.dtype)])

    @cached_property
    def value_dtype(self) -> np.dtype[Any]:
        """Of the values that a reader gets; float32 for bfloat16."""
        return np.dtype(np.float32) if self.dtype == BFLOAT16 else self.numpy_dtype

    @cached_property
    def stages(self) -> tuple[str, ...]:
        """Codecs of a chunk after `bytes`."""
        if self.foreign is not None:
            return self.foreign.stages
        return ("crc32c",) if self.level is None else ("zstd", "crc32c")

    @cached_property
    def fixed(self) -> bool:
        """Whether chunks have one size and follow from arithmetic: what Keel writes without compression."""
        return self.level is None and self.foreign is None

    @cached_property
    def fill(self) -> Any:
        """Value of a chunk that was not written."""
        return self.foreign.fill if self.foreign is not None else 0

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
        return self.foreign.shard_shape if self.foreign is not None else (self.shard_length, *self.shape[1:])

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        if self.foreign is not None:
            return self.foreign.chunk_shape
        return (*(1 for _ in range(self.window_axis)), self.chunk_length, *self.frame_shape)

    @cached_property
    def chunks(self) -> tuple[int, ...]:
        """Inner chunks of a full shard along the axes up to the window axis (all axes of a foreign array)."""
        extents = self.shard_shape if self.foreign is not None else self.shard_shape[: self.window_axis + 1]
        return tuple(s // c for s, c in zip(extents, self.chunk_shape, strict=False))

    @cached_property
    def chunk_count(self) -> int:
        return math.prod(self.chunks)

    @cached_property
    def payload_bytes(self) -> int:
        """Bytes of the values of an inner chunk."""
        return math.prod(self.chunk_shape) * self.numpy_dtype.itemsize

    @cached_property
    def chunk_bytes(self) -> int:
        """Stored bytes of an inner chunk with its checksum, where chunks have one size (`fixed`)."""
        return self.payload_bytes + CHECKSUM_BYTES

    @cached_property
    def index_bytes(self) -> int:
        checksum = CHECKSUM_BYTES if self.foreign is None or self.foreign.index_checksum else 0
        return self.chunk_count * INDEX_ENTRY_BYTES + checksum

    @cached_property
    def shards(self) -> int:
        """Shards along axis 0; those of Keel cut no other axis."""
        return math.ceil(self.shape[0] / self.shard_shape[0])

    def shard_key(self, k: int, *others: int) -> str:
        """Object of shard k (and its place on the other axes), relative to the array (Zarr's default chunk keys)."""
        return "/".join(["c", str(k), *(str(i) for i in others or (0,) * (len(self.shape) - 1))])

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
        """Size of the object of shard k, where chunks have one size (`fixed`)."""
        return self.present_chunks(k) * self.chunk_bytes + self.index_bytes

    def to_json(self) -> dict[str, Any]:
        """The array's `zarr.json`."""
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": codecs.to_json(self.level),
            "index_codecs": [codecs.BYTES, codecs.CRC32C],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": stored(self.dtype),
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.shard_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": False if self.dtype == "bool" else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": list(self.dimensions),
            "attributes": {**self.attributes, MARK: BFLOAT16} if self.dtype == BFLOAT16 else self.attributes,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any], where: str) -> ArraySpec:
        """Read an array's `zarr.json`, also one of zarr-python; DataError where this reader cannot read the array."""
        try:
            return cls._parsed(document)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: is not the description of a Zarr v3 array ({error!r})") from error
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error

    @classmethod
    def _parsed(cls, document: dict[str, Any]) -> ArraySpec:
        shape = tuple(document["shape"])
        shards = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
        names = document.get("dimension_names") or [None] * len(shape)
        dimensions = tuple(name or f"dim_{i}" for i, name in enumerate(names))
        codec = document["codecs"][0]
        if len(document["codecs"]) != 1 or codec["name"] != "sharding_indexed":
            raise ValueError("is not sharded; write it again with the sharding_indexed codec")
        encoding = document["chunk_key_encoding"]
        if encoding["name"] != "default" or encoding.get("configuration", {}).get("separator", "/") != "/":
            raise ValueError("chunk keys are not of the default encoding with separator '/'")
        attributes = dict(document.get("attributes", {}))
        dtype = attributes.pop(MARK, document["data_type"])
        if not isinstance(dtype, str) or stored(dtype) != document["data_type"] or dtype not in STORABLE:
            raise ValueError(f"data_type={document['data_type']!r}: cannot be read; known: {', '.join(STORABLE)}")
        sharding = codec["configuration"]
        stages, level = codecs.from_json(sharding["codecs"])
        index_stages, _ = codecs.from_json(sharding["index_codecs"])
        if index_stages not in ((), ("crc32c",)):
            raise ValueError(f"index_codecs={['bytes', *index_stages]}: cannot be read")
        first = sharding.get("index_location", "end") == "start"
        fill = parse_fill(document["fill_value"], np.dtype(DTYPES[document["data_type"]]))
        chunks = tuple(sharding["chunk_shape"])
        foreign = Foreign(shards, chunks, stages, first, index_stages == ("crc32c",), fill)
        axis = dimensions.index("time") if "time" in dimensions else 0
        cut = {"shard_length": shards[0], "chunk_length": chunks[axis], "level": level, "attributes": attributes}
        if shards[1:] == shape[1:] and shards[axis] % chunks[axis] == 0:
            ours = cls(shape, dtype, dimensions, **cut)
            if Foreign(ours.shard_shape, ours.chunk_shape, ours.stages) == foreign:
                return ours
        return cls(shape, dtype, dimensions, **cut, foreign=foreign)

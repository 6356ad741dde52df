"""One shard: inner chunks with their checksums, then the index, byte for byte as Zarr's `sharding_indexed` codec has it."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np

from . import codecs
from .codecs import CHECKSUM_BYTES
from .crc import crc32c
from .dtypes import BFLOAT16, to_bfloat16
from .errors import DataError
from .layout import ABSENT, ArraySpec

CRC_DTYPE = np.dtype("<u4")
INDEX_DTYPE = np.dtype("<u8")
SPILL_BYTES = 512 * 2**20  # shards whose values are larger are encoded in a temporary file, not in memory


def index_of(spec: ArraySpec, sizes: np.ndarray) -> np.ndarray:
    """Index of chunks of these sizes, the first ones in C order, back to back; the others are absent."""
    index = np.full((spec.chunk_count, 2), ABSENT, INDEX_DTYPE)
    index[: len(sizes), 1] = sizes
    index[: len(sizes), 0] = np.cumsum(sizes, dtype=np.uint64) - sizes.astype(np.uint64)
    return index


def encode_index(index: np.ndarray) -> bytes:
    body = np.ascontiguousarray(index, INDEX_DTYPE).tobytes()
    return body + crc32c(body).to_bytes(CHECKSUM_BYTES, "little")


def decode_index(spec: ArraySpec, data: bytes | memoryview, where: str, size: int | None = None) -> np.ndarray:
    """The index from its `spec.index_bytes` stored bytes; DataError if its checksum or entries are wrong.

    `size`: bytes of the shard, within which all chunks must lie.
    """
    checked = spec.foreign is None or spec.foreign.index_checksum
    body = data[: spec.chunk_count * 2 * INDEX_DTYPE.itemsize]
    if len(data) != spec.index_bytes or (checked and crc32c(body) != int.from_bytes(data[len(body) :], "little")):
        raise DataError(f"{where}: the shard index is damaged (crc32c); delete this object and make the data again")
    index = np.frombuffer(body, INDEX_DTYPE).reshape(spec.chunk_count, 2)
    present = index[index[:, 0] != ABSENT]
    if spec.fixed and (present[:, 1] != spec.chunk_bytes).any():
        raise DataError(f"{where}: a chunk has another length than {spec.chunk_bytes} bytes; the shard is damaged")
    if size is not None and (present.max(initial=0) > size or (present.sum(1) > size).any()):
        raise DataError(f"{where}: the shard index points past its {size} bytes; the shard is damaged")
    return index


class ShardEncoder:
    """Encodes shard k from blocks of its values, so that no more than the encoded shard and a block are held in memory;
    of a shard of more than SPILL_BYTES not even that: it is mapped from a temporary file (in TMPDIR).

    `append` takes the values of the shard [extent, *shape[1:]] in C order, in blocks of any size; `finish` gives the
    bytes. A last chunk cut short is padded with zeros. ValueError for too many or too few values.
    """

    def __init__(self, spec: ArraySpec, k: int) -> None:
        if spec.foreign is not None:
            raise ValueError("an array cut by another writer is only read")
        self.spec, self.k = spec, k
        self.expected = (spec.shard_extent(k), *spec.shape[1:])
        self._total = int(np.prod(self.expected)) * spec.numpy_dtype.itemsize
        self._done = 0
        self._chunk = np.zeros(spec.payload_bytes, np.uint8)  # the chunk that is being filled
        self._sizes: list[int] = []
        spill = self._total > SPILL_BYTES
        self._spilled = tempfile.TemporaryFile() if spill else None  # noqa: SIM115  it lives as long as the shard
        self._packed = bytearray()
        self._fixed: np.ndarray | None = None
        if spec.fixed and self._spilled is not None:
            self._fixed = np.memmap(self._spilled, np.uint8, "w+", shape=(spec.shard_bytes(k),))
        elif spec.fixed:
            self._packed = bytearray(spec.shard_bytes(k))  # which stores take as it is
            self._fixed = np.frombuffer(self._packed, np.uint8)

    def append(self, values: np.ndarray) -> None:
        spec = self.spec
        typed = to_bfloat16(values) if spec.dtype == BFLOAT16 else np.ascontiguousarray(values, spec.numpy_dtype)
        flat = np.ascontiguousarray(typed).reshape(-1).view(np.uint8)
        if self._done + flat.size > self._total:
            raise self._wrong(self._done + flat.size)
        while flat.size:
            begun = self._done % spec.payload_bytes
            if not begun and flat.size >= spec.payload_bytes:
                whole = flat.size // spec.payload_bytes * spec.payload_bytes
                self._emit(flat[:whole].reshape(-1, spec.payload_bytes))
                taken = whole
            else:
                taken = min(flat.size, spec.payload_bytes - begun)
                self._chunk[begun : begun + taken] = flat[:taken]
                if begun + taken == spec.payload_bytes:
                    self._emit(self._chunk[None])
            self._done += taken
            flat = flat[taken:]

    def finish(self) -> np.ndarray | bytearray:
        """The bytes of the shard."""
        if self._done != self._total:
            raise self._wrong(self._done)
        left = self._done % self.spec.payload_bytes
        if left:
            self._chunk[left:] = 0
            self._emit(self._chunk[None])
        index = encode_index(index_of(self.spec, np.array(self._sizes, np.uint64)))
        if self._fixed is not None:
            self._fixed[self._fixed.size - len(index) :] = np.frombuffer(index, np.uint8)
            return self._fixed if self._spilled is not None else self._packed
        self._pack(index)
        if self._spilled is None:
            return self._packed
        self._spilled.flush()
        return np.memmap(self._spilled, np.uint8, "r")

    def _emit(self, payloads: np.ndarray) -> None:
        """Store whole chunks, uint8 [n, payload_bytes]."""
        spec, first = self.spec, len(self._sizes)
        if self._fixed is not None:
            size = spec.chunk_bytes
            chunks = self._fixed[first * size : (first + len(payloads)) * size].reshape(-1, size)
            chunks[:, :-CHECKSUM_BYTES] = payloads
            sums = np.array([crc32c(chunk[:-CHECKSUM_BYTES]) for chunk in chunks], CRC_DTYPE)
            chunks[:, -CHECKSUM_BYTES:] = sums.view(np.uint8).reshape(-1, CHECKSUM_BYTES)
            self._sizes += [size] * len(payloads)
            return
        assert spec.level is not None
        for payload in payloads:
            packed = codecs.compress(payload, spec.level)
            self._pack(packed)
            self._pack(crc32c(packed).to_bytes(CHECKSUM_BYTES, "little"))
            self._sizes.append(len(packed) + CHECKSUM_BYTES)

    def _pack(self, data: bytes) -> None:
        if self._spilled is not None:
            self._spilled.write(data)
        else:
            self._packed += data

    def _wrong(self, got: int) -> ValueError:
        size = self.spec.numpy_dtype.itemsize
        return ValueError(f"shard {self.k} holds {self.expected}, {self._total // size} values; got {got // size}")


def encode_shard(spec: ArraySpec, k: int, values: np.ndarray) -> np.ndarray | bytearray:
    """Shard k from its values [extent, *shape[1:]] as one buffer. A last chunk cut short is padded with zeros."""
    encoder = ShardEncoder(spec, k)
    if values.shape != encoder.expected:
        raise ValueError(f"values of shape {values.shape}: shard {k} holds {encoder.expected}")
    encoder.append(values)
    return encoder.finish()


def bad_chunk(spec: ArraySpec, data: bytes | memoryview) -> int | None:
    """Number of the first chunk in `data` (whole stored chunks of one size back to back) whose checksum is wrong."""
    payload = spec.chunk_bytes - CHECKSUM_BYTES
    chunks = np.frombuffer(data, np.uint8).reshape(-1, spec.chunk_bytes)
    stored = np.ascontiguousarray(chunks[:, payload:]).view(CRC_DTYPE).reshape(-1)
    for i, chunk in enumerate(chunks):
        if crc32c(chunk[:payload]) != stored[i]:
            return i
    return None


def decode_chunk(spec: ArraySpec, data: bytes | memoryview) -> np.ndarray[Any, Any]:
    """The stored elements of one chunk, [*chunk_shape], of any size and codecs. Raises `codecs.BadChunk`."""
    body = codecs.decode(data, spec.stages, spec.payload_bytes)
    return np.frombuffer(body, spec.numpy_dtype).reshape(spec.chunk_shape)

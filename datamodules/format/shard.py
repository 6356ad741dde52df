"""One shard: inner chunks with their checksums, then the index, byte for byte as Zarr's `sharding_indexed` codec has it."""

from __future__ import annotations

import numpy as np

from .crc import crc32c
from .errors import DataError
from .layout import ABSENT, CHECKSUM_BYTES, ArraySpec

CRC_DTYPE = np.dtype("<u4")
INDEX_DTYPE = np.dtype("<u8")


def computed_index(spec: ArraySpec, k: int) -> np.ndarray:
    """Index of shard k as Keel writes it, uint64 [chunks, 2] of (offset, length): chunks in C order, back to back."""
    index = np.full((spec.chunk_count, 2), ABSENT, INDEX_DTYPE)
    present = spec.present_chunks(k)
    index[:present, 0] = np.arange(present, dtype=np.uint64) * np.uint64(spec.chunk_bytes)
    index[:present, 1] = spec.chunk_bytes
    return index


def encode_index(index: np.ndarray) -> bytes:
    body = np.ascontiguousarray(index, INDEX_DTYPE).tobytes()
    return body + crc32c(body).to_bytes(CHECKSUM_BYTES, "little")


def decode_index(spec: ArraySpec, data: bytes | memoryview, where: str) -> np.ndarray:
    """The index from the last `spec.index_bytes` bytes of a shard; DataError if its checksum or entries are wrong."""
    body, stored = data[:-CHECKSUM_BYTES], int.from_bytes(data[-CHECKSUM_BYTES:], "little")
    if len(data) != spec.index_bytes or crc32c(body) != stored:
        raise DataError(f"{where}: the shard index is damaged (crc32c); delete this object and make the data again")
    index = np.frombuffer(body, INDEX_DTYPE).reshape(spec.chunk_count, 2)
    lengths = index[index[:, 0] != ABSENT, 1]
    if (lengths != spec.chunk_bytes).any():
        raise DataError(f"{where}: a chunk has another length than {spec.chunk_bytes} bytes; the shard is damaged")
    return index


def encode_shard(spec: ArraySpec, k: int, values: np.ndarray) -> np.ndarray:
    """Shard k from its values [extent, *shape[1:]] as one uint8 array. A last chunk cut short is padded with zeros."""
    expected = (spec.shard_extent(k), *spec.shape[1:])
    if values.shape != expected:
        raise ValueError(f"values of shape {values.shape}: shard {k} holds {expected}")
    present, payload = spec.present_chunks(k), spec.chunk_bytes - CHECKSUM_BYTES
    out = np.zeros(spec.shard_bytes(k), np.uint8)
    chunks = out[: present * spec.chunk_bytes].reshape(present, spec.chunk_bytes)
    flat = np.ascontiguousarray(values, spec.numpy_dtype).reshape(-1).view(np.uint8)
    whole = flat.size // payload
    chunks[:whole, :payload] = flat[: whole * payload].reshape(whole, payload)
    if whole < present:
        chunks[whole, : flat.size - whole * payload] = flat[whole * payload :]
    sums = np.array([crc32c(chunk[:payload]) for chunk in chunks], CRC_DTYPE)
    chunks[:, payload:] = sums.view(np.uint8).reshape(present, CHECKSUM_BYTES)
    out[present * spec.chunk_bytes :] = np.frombuffer(encode_index(computed_index(spec, k)), np.uint8)
    return out


def bad_chunk(spec: ArraySpec, data: bytes | memoryview) -> int | None:
    """Number of the first chunk in `data` (whole stored chunks back to back) whose checksum is wrong; None if all hold."""
    payload = spec.chunk_bytes - CHECKSUM_BYTES
    chunks = np.frombuffer(data, np.uint8).reshape(-1, spec.chunk_bytes)
    stored = np.ascontiguousarray(chunks[:, payload:]).view(CRC_DTYPE).reshape(-1)
    for i, chunk in enumerate(chunks):
        if crc32c(chunk[:payload]) != stored[i]:
            return i
    return None

"""The codecs of one inner chunk: little-endian bytes, then any of zstd and crc32c in any order.

Keel writes `bytes, crc32c`, or `bytes, zstd, crc32c`; what others write may lack the checksum. Zstandard: RFC 8878.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import zstandard

from .crc import crc32c

CHECKSUM_BYTES = 4
BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}
KNOWN = ("zstd", "crc32c")
LEVELS = range(-7, 23)

_local = (
    threading.local()
)  # zstandard's contexts may not be shared by threads; making one costs more than a small chunk


class BadChunk(Exception):
    """The stored bytes of a chunk cannot be decoded; says why."""


def _compressor(level: int) -> zstandard.ZstdCompressor:
    held: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in held:
        held[level] = zstandard.ZstdCompressor(level=level)
    return held[level]


def _decompressor() -> zstandard.ZstdDecompressor:
    held: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if held is None:
        held = _local.decompressor = zstandard.ZstdDecompressor()
    return held


def to_json(level: int | None) -> list[dict[str, Any]]:
    """The chunk codecs that Keel writes, as in `zarr.json`."""
    zstd = [] if level is None else [{"name": "zstd", "configuration": {"level": level, "checksum": False}}]
    return [BYTES, *zstd, CRC32C]


def from_json(codecs: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], int | None]:
    """The stages after `bytes`, and the level of a zstd among them. Raises ValueError for what cannot be read."""
    found = [codec["name"] for codec in codecs]
    if not found or found[0] != "bytes" or any(name not in KNOWN for name in found[1:]):
        raise ValueError(f"codecs={found}: cannot be read; supported: 'bytes', then any of {', '.join(KNOWN)}")
    if codecs[0].get("configuration", {}).get("endian", "little") != "little":
        raise ValueError("codecs: big-endian values cannot be read; write the array again as little-endian")
    levels = [int(codec.get("configuration", {}).get("level", 0)) for codec in codecs if codec["name"] == "zstd"]
    return tuple(found[1:]), levels[0] if levels else None


def compress(payload: np.ndarray, level: int) -> bytes:
    """A zstd frame that states its content size."""
    return _compressor(level).compress(payload.data)


def decode(data: bytes | memoryview, stages: tuple[str, ...], payload_bytes: int) -> bytes | memoryview:
    """The `payload_bytes` bytes of a chunk from its stored bytes. Raises BadChunk."""
    body: bytes | memoryview = memoryview(data)
    for stage in reversed(stages):
        if stage == "crc32c":
            if len(body) < CHECKSUM_BYTES:
                raise BadChunk("truncated")
            body, tail = body[:-CHECKSUM_BYTES], body[-CHECKSUM_BYTES:]
            if crc32c(body) != int.from_bytes(tail, "little"):
                raise BadChunk("crc32c")
        else:
            try:
                body = _decompressor().decompress(body, max_output_size=payload_bytes)
            except zstandard.ZstdError as error:
                raise BadChunk(f"zstd: {error}") from error
    if len(body) != payload_bytes:
        raise BadChunk(f"{len(body)} bytes instead of {payload_bytes}")
    return body

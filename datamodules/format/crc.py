"""Checksums: CRC-32C for chunks, CRC-32 for whole objects.

CRC-32C (Castagnoli) is what Zarr's `crc32c` codec appends to each chunk. It says nothing about a whole shard: the CRC of
data followed by its own CRC is the same for all data, so every intact shard of a size has the same CRC-32C. CRC-32 has
another polynomial and does depend on the content.
"""

from __future__ import annotations

import zlib

import google_crc32c
import numpy as np

Buffer = bytes | bytearray | memoryview | np.ndarray


def crc32c(data: Buffer) -> int:
    """CRC-32C of contiguous bytes, without a copy."""
    view = data if isinstance(data, (bytes, np.ndarray)) else np.frombuffer(data, np.uint8)
    return int(google_crc32c.value(view))


def crc32(data: Buffer, previous: int = 0) -> int:
    """CRC-32 (IEEE, that of zlib) of what `previous` covers followed by `data`."""
    return zlib.crc32(data.data if isinstance(data, np.ndarray) else data, previous)

"""Checksums: CRC-32C for chunks, CRC-32 for whole objects.

CRC-32C (Castagnoli) is what Zarr's `crc32c` codec appends to each chunk. It says nothing about a whole shard: the CRC of
data followed by its own CRC is the same for all data, so every intact shard of a size has the same CRC-32C. CRC-32 has
another polynomial and does depend on the content. It is computed by zlib-ng, with the processor's carry-less product:
fourteen times as fast as the zlib of most systems, where it would take longer than all else that a download costs a reader.
"""

from __future__ import annotations

import google_crc32c
import numpy as np
from zlib_ng import zlib_ng

Buffer = bytes | bytearray | memoryview | np.ndarray


def crc32c(data: Buffer) -> int:
    """CRC-32C of contiguous bytes, without a copy."""
    view = data if isinstance(data, (bytes, np.ndarray)) else np.frombuffer(data, np.uint8)
    return int(google_crc32c.value(view))


def crc32(data: Buffer, previous: int = 0) -> int:
    """CRC-32 (IEEE, that of zlib) of what `previous` covers followed by `data`."""
    return int(zlib_ng.crc32(data.data if isinstance(data, np.ndarray) else data, previous))


_POLYNOMIAL = 0xEDB88320  # of CRC-32, bits reversed: x^0 is the highest bit


def combine_crc32(first: int, second: int, length: int) -> int:
    """CRC-32 of A followed by B from those of A and of B, which has ``length`` bytes: ranges can be summed in any order.

    Appending n bytes multiplies a CRC by x^(8 n) modulo the polynomial.
    """
    power, square = 1 << 31, 1 << 23  # x^0, and x^8: a byte
    while length:
        if length & 1:
            power = _multiply(power, square)
        square, length = _multiply(square, square), length >> 1
    return _multiply(power, first) ^ second


def _multiply(a: int, b: int) -> int:
    """Product of two polynomials over GF(2), modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product

"""Element types: what is stored, and what a reader gets. Only bfloat16 differs between the two.

Zarr v3 has no bfloat16 in its core, so its bits are stored as `uint16` and the array's attributes say
`keel_dtype: bfloat16`; zarr-python and xarray see the bits.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

DTYPES = {
    "float16": "<f2", "float32": "<f4", "float64": "<f8",
    "int8": "i1", "int16": "<i2", "int32": "<i4", "int64": "<i8",
    "uint8": "u1", "uint16": "<u2", "uint32": "<u4", "uint64": "<u8",
    "bool": "?",
}  # fmt: skip
BFLOAT16 = "bfloat16"
STORABLE = (*DTYPES, BFLOAT16)
MARK = "keel_dtype"  # attribute of an array whose elements are not what Zarr's data type says


def stored(name: str) -> str:
    """Zarr's data type of a type of Keel."""
    return "uint16" if name == BFLOAT16 else name


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, as uint16. Values that are uint16 already are taken for bits."""
    if values.dtype == np.uint16:
        return values
    single = np.ascontiguousarray(values, np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # cannot carry past the sign: NaNs are set below
    return np.where(np.isnan(single), 0x7FC0 | (bits >> 16), rounded).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 of bfloat16 bits, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def parse_fill(value: Any, dtype: np.dtype[Any]) -> Any:
    """The fill value of an array's metadata. Raises ValueError for one that is not a number of the type."""
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    if isinstance(value, str) and dtype.kind == "f" and value in words:
        return words[value]
    if isinstance(value, bool | int | float) and (dtype.kind == "f" or value == int(value)):
        return value
    raise ValueError(f"fill_value={value!r}: is not a plain {dtype.name}")

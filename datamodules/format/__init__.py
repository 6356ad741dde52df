"""The data format: Zarr v3 groups of sharded, checksummed arrays with a manifest. See `Dataset` and `Writer`."""

from .array import Array, Piece
from .crc import crc32, crc32c
from .dataset import Dataset, ObjectInfo
from .errors import DataError
from .layout import ArraySpec
from .verify import verify
from .writer import Writer, write_dataset

__all__ = [
    "Array",
    "ArraySpec",
    "DataError",
    "Dataset",
    "ObjectInfo",
    "Piece",
    "Writer",
    "crc32",
    "crc32c",
    "verify",
    "write_dataset",
]

"""The data format: Zarr v3 groups of sharded, checksummed arrays with a manifest. See `Dataset` and `Writer`."""

from . import statistics
from .array import Array, Piece
from .copy import copy_dataset
from .crc import crc32, crc32c
from .dataset import Dataset, ObjectInfo
from .errors import DataError
from .layout import ArraySpec
from .shard import ShardEncoder
from .verify import verify
from .writer import Writer, write_dataset

__all__ = [
    "Array",
    "ArraySpec",
    "DataError",
    "Dataset",
    "ObjectInfo",
    "Piece",
    "ShardEncoder",
    "Writer",
    "copy_dataset",
    "crc32",
    "crc32c",
    "statistics",
    "verify",
    "write_dataset",
]

"""What the importers of HDF5 layouts share."""

from __future__ import annotations

from typing import Any

from datamodules.format import DataError

from .base import need
from .files import SourceFile

SUFFIXES = (".hdf5", ".h5")


def open_hdf5(file: SourceFile) -> Any:
    """An `h5py.File`; DataError if it cannot be opened."""
    h5py = need("h5py", "reading HDF5")
    try:
        return h5py.File(file.handle(), "r")
    except OSError as error:
        if not file.store.exists(file.path):
            raise DataError(f"{file.url}: no such file") from error
        raise DataError(f"{file.url}: is not an HDF5 file, or is damaged ({' '.join(str(error).split())})") from error

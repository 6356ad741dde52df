"""Zarr groups (v2 and v3, sharded or not) as lazy `xarray.Dataset`s, also where their arrays do not name their axes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from datamodules.format import DataError
from datamodules.format.dataset import MANIFEST

from .base import need
from .files import SourceFile

HINT = "name the axes of arrays that do not with -o axes=..., as in axes=trajectory,time,channel,y,x"


def open_group(file: SourceFile, axes: Sequence[str], decoding: dict[str, Any]) -> Any:
    """The `xarray.Dataset`, nothing of it loaded.

    axes: names for the axes of arrays that have as many and name none (`zarr.create_array` without `dimension_names`);
        then `file` may also be a single array. decoding: options of `xarray.open_zarr`, where all axes have names.
    Raises DataError where it is no Zarr group, or the axes of an array remain without names.
    """
    xarray, zarr = need("xarray", "reading Zarr groups"), need("zarr", "reading Zarr groups")
    options = {} if file.store.is_local else {"storage_options": file.store.options or None}
    place = file.local or file.url
    if file.store.exists(f"{file.path}/{MANIFEST}"):
        raise DataError(f"{file.url}: is a data set of Keel's already; keel data copy copies it")
    try:
        node = zarr.open(place, mode="r", **options)
    except (OSError, ValueError, KeyError) as error:
        raise _unopened(file, error) from error
    single = isinstance(node, zarr.Array)
    arrays = {"u": node} if single else dict(node.arrays())
    if not arrays:
        raise DataError(f"{file.url}: has no arrays; give the group below it that has")
    unnamed = [name for name, array in arrays.items() if array.ndim and not _named(array)]
    if not unnamed and not single:
        if axes:
            raise ValueError(f"option axes={','.join(axes)}: has no effect, the arrays of {file.url} name their axes")
        with warnings.catch_warnings():  # that reading it is slower without consolidated metadata
            warnings.filterwarnings("ignore", "Failed to open Zarr store with consolidated metadata", RuntimeWarning)
            try:
                return xarray.open_zarr(place, chunks=None, **decoding, **options)
            except (OSError, ValueError, KeyError) as error:
                raise _unopened(file, error) from error
    found = {}
    for name, array in arrays.items():
        names = _named(array) or (tuple(axes) if array.ndim == len(axes) else ())
        if len(names) != array.ndim:
            given = f"axes={','.join(axes)} names {len(axes)}" if axes else HINT
            raise DataError(f"{file.url}: {name} has shape {array.shape} and no names for its axes; {given}")
        found[name] = xarray.Variable(names, _lazy(array), dict(array.attrs))
    try:
        return xarray.Dataset(found, attrs=dict(node.attrs) if not single else {})
    except ValueError as error:  # two extents of one name
        raise _unopened(file, error) from error


def _unopened(file: SourceFile, error: Exception) -> DataError:
    return DataError(f"{file.url}: cannot be opened as a Zarr group ({' '.join(str(error).split())[:200]})")


def _named(array: Any) -> tuple[str, ...]:
    """Names of all axes, by the array's own metadata; () if it has none."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    return tuple(names) if all(names) else ()


def _lazy(array: Any) -> Any:
    """The array as one whose slices alone are read."""
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class Lazy(BackendArray):  # type: ignore[misc, unused-ignore]
        shape, dtype = array.shape, array.dtype

        def __getitem__(self, key: Any) -> Any:
            basic = indexing.IndexingSupport.BASIC
            return indexing.explicit_indexing_adapter(key, self.shape, basic, array.__getitem__)

    return indexing.LazilyIndexedArray(Lazy())

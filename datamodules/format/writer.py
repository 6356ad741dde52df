"""Writing a data set so that it can be stopped at any moment and continued.

Order: shards, each followed by a small record of its size and checksum under `_parts/`; then the `zarr.json` files; then
the manifest; then `_parts/` goes. Without a manifest no reader takes the data set for whole, and a shard counts as written
only when its bytes agree with its record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodules.store import NotFound, Store, canonical_json

from . import statistics
from .dataset import FORMAT, MANIFEST, METADATA, VERSION, ObjectInfo, read_manifest
from .dtypes import BFLOAT16, from_bfloat16, to_bfloat16
from .errors import DataError
from .layout import ArraySpec
from .shard import encode_shard

PARTS = "_parts"


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """The first field in which two JSON values differ, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return f"{path}: {old!r} -> {new!r}"


def check_dimensions(specs: Mapping[str, ArraySpec]) -> None:
    """ValueError if two arrays give one axis name two extents: xarray opens no such group."""
    seen: dict[str, tuple[str, int]] = {}
    for array, spec in specs.items():
        for name, extent in zip(spec.dimensions, spec.shape, strict=True):
            other, known = seen.setdefault(name, (array, extent))
            if known != extent:
                raise ValueError(
                    f"axis {name!r} has {known} entries in array {other!r} and {extent} in {array!r}; give the axes of "
                    f"another resolution names of their own, such as {name}_{extent}"
                )


def finished(store: Store, identity: Mapping[str, Any]) -> int | None:
    """Number of shards of the whole data set at this place, None if there is none.

    DataError if its identity differs from what is given of one.
    """
    try:
        if not store.exists(MANIFEST):
            return None
    except NotFound:
        return None
    manifest, _ = read_manifest(store)
    found = manifest.get("identity") or {}
    _compare(store, {key: value for key, value in found.items() if key in identity}, identity, "the data set")
    return sum(not str(entry["path"]).endswith(METADATA) for entry in manifest["objects"])


def clean(store: Store) -> None:
    """Remove the records of a finished data set and what killed writers left."""
    store.delete_tree(PARTS)
    store.sweep()


def _compare(store: Store, found: Any, identity: Mapping[str, Any], what: str) -> None:
    if found != identity:
        raise DataError(
            f"{store.url}: {what} there was made from another config ({first_difference(found, identity)}); "
            "choose another url or delete it"
        )


class Writer:
    """Writes the shards of one data set, from one process or several.

    Args:
        store: where the data set goes.
        specs: its arrays by name.
        identity: plain JSON that fixes every byte (generator, version, config, seed). Another identity at the same place
            is refused with DataError.
    """

    def __init__(self, store: Store, specs: Mapping[str, ArraySpec], identity: Mapping[str, Any]) -> None:
        self.store, self.specs = store, dict(specs)
        check_dimensions(self.specs)
        arrays = {name: spec.to_json() for name, spec in self.specs.items()}
        self.identity = {**identity, "zarr_layout": hashlib.sha256(canonical_json(arrays)).hexdigest()}

    def finished(self) -> bool:
        """Whether the data set is whole; DataError if another one is at this place."""
        return finished(self.store, self.identity) is not None

    def begin(self) -> None:
        """Claim the place for this identity; DataError if an unfinished data set of another one is there."""
        path = f"{PARTS}/identity.json"
        if not self.store.create(path, canonical_json(self.identity)):
            _compare(self.store, self.store.read_json(path), self.identity, "the unfinished data set")

    def shards(self) -> list[tuple[str, int]]:
        """All (array, shard number), in the order in which they are listed in the manifest."""
        return [(name, k) for name in sorted(self.specs) for k in range(self.specs[name].shards)]

    def _path(self, name: str, k: int) -> str:
        return f"{name}/{self.specs[name].shard_key(k)}"

    def written(self, name: str, k: int) -> dict[str, Any] | None:
        """The record of a shard that is there and whole (its bytes are read and checked); None if it must be written."""
        try:
            record = self.store.read_json(f"{PARTS}/{name}/{k}.json")
            info = ObjectInfo.from_json(record)
            if not info.at(self.store):
                return None
        except (NotFound, KeyError, ValueError):
            return None
        return dict(record)

    def forget(self, name: str, k: int) -> None:
        """Take a shard for one that has not been written."""
        self.store.delete(f"{PARTS}/{name}/{k}.json")

    def write_shard(
        self,
        name: str,
        k: int,
        values: np.ndarray,
        train: tuple[int, int] | None = None,
        allow_nan: bool = False,
    ) -> dict[str, Any]:
        """Write shard k from `values` [extent, *shape[1:]] and return its record.

        With `train` = [start, stop) on axis 0, the record has the moments of the entries within it, per channel.
        `DataError`, naming the place, for values that are not finite as they are stored; with `allow_nan` they are taken, and
        left out of the moments.
        """
        spec = self.specs[name]
        if not allow_nan:
            self._check_finite(name, k, values)
        moments = None
        if train is not None and "channel" in spec.dimensions:
            base = k * spec.shard_length
            chosen = values[max(0, train[0] - base) : max(0, train[1] - base)]
            chosen = from_bfloat16(chosen) if spec.dtype == BFLOAT16 and chosen.dtype == np.uint16 else chosen
            moments = statistics.partial(chosen, spec.dimensions.index("channel"), finite=not allow_nan)
        return self.write_bytes(name, k, encode_shard(spec, k, values), moments)

    def _check_finite(self, name: str, k: int, values: np.ndarray) -> None:
        spec = self.specs[name]
        if spec.dtype != BFLOAT16 and spec.numpy_dtype.kind != "f":
            return
        with np.errstate(over="ignore"):
            if spec.dtype == BFLOAT16:
                stored = from_bfloat16(to_bfloat16(values))
            else:
                stored = np.asarray(values, spec.numpy_dtype)
        finite = np.isfinite(stored)
        if finite.all():
            return
        place = tuple(np.argwhere(~finite)[0].tolist())
        numbers = zip(spec.dimensions, (place[0] + k * spec.shard_length, *place[1:]), strict=False)
        raise DataError(
            f"{self.store.url}: {name} holds {stored[place]} at {', '.join(f'{d} {n}' for d, n in numbers)}, stored as "
            f"{spec.dtype}; mend the values, or take them as they are with allow_nan"
        )

    def write_bytes(
        self, name: str, k: int, data: np.ndarray | bytearray, moments: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write shard k, encoded already (`ShardEncoder`), and return its record with the moments given."""
        path = self._path(name, k)
        record = ObjectInfo.of(path, data).to_json()
        if moments is not None:
            record["statistics"] = dict(moments)
        self.store.write(path, data if isinstance(data, bytearray) else data.data)
        self.store.write_json(f"{PARTS}/{name}/{k}.json", record)
        return record

    def finish(self, attributes: Mapping[str, Any], records: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
        """Write metadata and, last, the manifest. Returns the fingerprint.

        `records`: of all shards. Statistics of the array named by `attributes["array"]` are merged into the attributes.
        """
        objects, attributes = [], {"format": FORMAT, "format_version": VERSION, **attributes}
        for name, k in self.shards():
            if (name, k) not in records:
                raise ValueError(f"shard {k} of {name!r} has not been written")
            objects.append(ObjectInfo.from_json(dict(records[name, k])))
        main = attributes.get("array")
        merged = statistics.merge(records[name, k].get("statistics", {}) for name, k in self.shards() if name == main)
        if merged:
            attributes["statistics"] = merged
        members = {name: spec.to_json() for name, spec in sorted(self.specs.items())}
        # zarr-python's extension: one request tells a reader of the group all about its arrays.
        consolidated = {"kind": "inline", "must_understand": False, "metadata": members}
        group = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": attributes,
            "consolidated_metadata": consolidated,
        }
        documents = {METADATA: group} | {f"{name}/{METADATA}": document for name, document in members.items()}
        for path, document in sorted(documents.items()):
            data = canonical_json(document)
            self.store.write(path, data)
            objects.append(ObjectInfo.of(path, data))
        arrays = {
            name: {
                "shape": list(spec.shape),
                "dtype": spec.dtype,
                "dimensions": list(spec.dimensions),
                "shard_shape": list(spec.shard_shape),
                "chunk_shape": list(spec.chunk_shape),
            }
            for name, spec in self.specs.items()
        }
        manifest = canonical_json(
            {
                "format": FORMAT,
                "version": VERSION,
                "identity": self.identity,
                "arrays": arrays,
                "objects": [info.to_json() for info in sorted(objects, key=lambda info: info.path)],
            }
        )
        self.store.write(MANIFEST, manifest)
        clean(self.store)
        return hashlib.sha256(manifest).hexdigest()


def write_dataset(
    target: str | Store,
    specs: Mapping[str, ArraySpec],
    values: Mapping[str, np.ndarray],
    attributes: Mapping[str, Any],
    identity: Mapping[str, Any] | None = None,
    allow_nan: bool = False,
) -> str:
    """Write arrays that are in memory as a data set; returns its fingerprint.

    `attributes` needs `kind`, `array` and `splits`; statistics of the main array over `splits["train"]` are added.
    `DataError`, naming the place, for values that are not finite, unless `allow_nan`.
    """
    writer = Writer(target if isinstance(target, Store) else Store(target), specs, identity or {})
    writer.begin()
    train = attributes.get("splits", {}).get("train")
    records = {}
    for name, k in writer.shards():
        base, extent = k * specs[name].shard_length, specs[name].shard_extent(k)
        chosen = tuple(train) if train is not None and name == attributes.get("array") else None
        records[name, k] = writer.write_shard(name, k, values[name][base : base + extent], chosen, allow_nan)
    return writer.finish(attributes, records)

"""A data set: a Zarr v3 group with a manifest that lists every object.

zarr.json                  the group: attributes of the data set
<array>/zarr.json          the arrays
<array>/c/<k>/0/...        the shards
manifest.json              path, size and checksums of all of the above; written last, so that a data set is whole
                           exactly when it is there. Its SHA-256 is the data set's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from datamodules.store import NoBucket, NotFound, Store

from .array import Array
from .crc import crc32
from .errors import DataError
from .layout import ArraySpec

FORMAT, VERSION = "keel-dataset", 1
BLOCK_BYTES = 16 * 2**20  # read at once of an object that is checked
MANIFEST, METADATA = "manifest.json", "zarr.json"


@dataclass(frozen=True)
class ObjectInfo:
    """An object of a data set: path relative to it, bytes, CRC-32 (fast) and SHA-256 (hexadecimal) of all of them."""

    path: str
    size: int
    crc32: int
    sha256: str

    @classmethod
    def of(cls, path: str, data: Any) -> ObjectInfo:
        return cls(path, len(memoryview(data)), crc32(data), hashlib.sha256(data).hexdigest())

    def matches(self, data: Any) -> bool:
        """Whether `data` is this object, by size and CRC-32."""
        return len(memoryview(data)) == self.size and crc32(data) == self.crc32

    def at(self, store: Store) -> bool:
        """Whether the object is there, by size and CRC-32, read in blocks. Raises NotFound where it is missing."""
        if store.size(self.path) != self.size:
            return False
        found = 0
        for start in range(0, self.size, BLOCK_BYTES):
            found = crc32(store.read_range(self.path, start, min(start + BLOCK_BYTES, self.size)), found)
        return found == self.crc32

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "crc32": f"{self.crc32:08x}", "sha256": self.sha256}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> ObjectInfo:
        return cls(str(entry["path"]), int(entry["size"]), int(entry["crc32"], 16), str(entry["sha256"]))


def read_manifest(store: Store) -> tuple[dict[str, Any], str]:
    """The manifest and its fingerprint; DataError if there is none or it cannot be understood."""
    try:
        data = store.read(MANIFEST)
    except NoBucket:
        raise
    except NotFound as error:
        raise DataError(f"{store.url}: not a Keel data set, or an unfinished one; run `keel data make`") from error
    try:
        manifest = json.loads(data)
        if manifest["format"] != FORMAT:
            raise DataError(f"{store.join(MANIFEST)}: format={manifest['format']!r}; expected {FORMAT!r}")
        if manifest["version"] > VERSION:
            raise DataError(f"{store.url}: format version {manifest['version']} is newer than {VERSION}; update Keel")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{store.join(MANIFEST)}: damaged ({error!r}); make the data set again") from error
    return manifest, hashlib.sha256(data).hexdigest()


@dataclass
class Dataset:
    """A finished data set, open for reading. Picklable; nothing but metadata is held.

    Attributes:
        attributes: of the group (kind, array, generator, statistics, dt, ...).
        arrays: by name. objects: by path, as in the manifest.
        fingerprint: SHA-256 of the manifest, hexadecimal.
    """

    store: Store
    attributes: dict[str, Any]
    arrays: dict[str, Array]
    objects: dict[str, ObjectInfo]
    fingerprint: str
    manifest: dict[str, Any]

    @classmethod
    def open(cls, source: str | Store) -> Dataset:
        """Open by URL. DataError: not a data set, unfinished or damaged; StoreError: the store's own faults."""
        store = source if isinstance(source, Store) else Store(source)
        manifest, fingerprint = read_manifest(store)
        try:
            objects = {entry["path"]: ObjectInfo.from_json(entry) for entry in manifest["objects"]}
            names = sorted(manifest["arrays"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{store.join(MANIFEST)}: damaged ({error!r}); make the data set again") from error
        group = cls._group(store, objects)
        try:
            # The group's document holds those of its arrays: two requests open a data set of any number of arrays.
            documents = group["consolidated_metadata"]["metadata"]
            specs = {name: ArraySpec.from_json(documents[name], store.join(f"{name}/{METADATA}")) for name in names}
            attributes = dict(group["attributes"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{store.join(METADATA)}: damaged ({error!r}); make the data set again") from error
        cls._check_arrays(store, manifest, specs)
        sizes = (
            {path: info.size for path, info in objects.items()} if any(not s.fixed for s in specs.values()) else None
        )
        arrays = {name: Array(store, name, spec, contiguous=True, sizes=sizes) for name, spec in specs.items()}
        return cls(store, attributes, arrays, objects, fingerprint, manifest)

    @staticmethod
    def _group(store: Store, objects: dict[str, ObjectInfo]) -> dict[str, Any]:
        url = store.join(METADATA)
        try:
            data = store.read(METADATA)
        except NotFound as error:
            raise DataError(f"{url}: missing; make the data set again") from error
        if METADATA not in objects or not objects[METADATA].matches(data):
            raise DataError(
                f"{url}: differs from the manifest; it was changed, or the manifest is that of another data set: "
                "make the data set again"
            )
        document: dict[str, Any] = json.loads(data)
        return document

    @staticmethod
    def _check_arrays(store: Store, manifest: dict[str, Any], specs: dict[str, ArraySpec]) -> None:
        """The group and the manifest must speak of the same arrays."""
        for name, spec in specs.items():
            entry = manifest["arrays"][name]
            if tuple(entry["shape"]) != spec.shape or entry["dtype"] != spec.dtype:
                raise DataError(
                    f"{store.join(MANIFEST)}: array {name!r} is {entry['dtype']} {entry['shape']} there but {spec.dtype} "
                    f"{list(spec.shape)} in {METADATA}; the manifest is that of another data set: make it again"
                )
            if spec.foreign is not None:
                raise DataError(
                    f"{store.join(name)}: is not cut as Keel cuts arrays (shards on axis 0, whole frames); import it"
                )

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def kind(self) -> str:
        """ "fields" or "text"."""
        return str(self.attributes["kind"])

    @property
    def main(self) -> Array:
        """The array that samples come from."""
        return self.arrays[self.attributes["array"]]

    @property
    def splits(self) -> dict[str, tuple[int, int]]:
        """Split name -> [start, stop) on axis 0 of the main array."""
        return {name: (int(start), int(stop)) for name, (start, stop) in self.attributes["splits"].items()}

    def describe(self) -> dict[str, Any]:
        """What `keel data show` prints: plain JSON."""
        return {
            "url": self.url,
            "fingerprint": self.fingerprint,
            "objects": len(self.objects),
            "bytes": sum(info.size for info in self.objects.values()),
            "arrays": {
                name: {
                    "shape": list(array.shape),
                    "dtype": array.spec.dtype,
                    "dimensions": list(array.dimensions),
                    "level": array.spec.level,
                    "attributes": array.attributes,
                    "bytes": sum(
                        self.objects[p].size for p in map(array.shard_path, range(array.shards)) if p in self.objects
                    ),
                    "shards": array.shards,
                    "shard_shape": list(array.spec.shard_shape),
                    "chunk_shape": list(array.spec.chunk_shape),
                }
                for name, array in self.arrays.items()
            },
            "attributes": self.attributes,
        }

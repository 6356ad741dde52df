"""Copying a data set from store to store: concurrent, every byte verified, whole only when the manifest is there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

from datamodules.store import NotFound, Store, canonical_json

from .dataset import MANIFEST, METADATA, Dataset, ObjectInfo
from .errors import DataError

CLAIM = "_parts/copy.json"
Progress = Callable[[int, int], None]


def copy_dataset(source: str | Store, target: str | Store, threads: int = 4, progress: Progress | None = None) -> str:
    """Copy a data set; returns its fingerprint, which is that of the source.

    Objects go whole, `threads` at a time, each compared with the manifest's SHA-256 before it is written; the manifest
    goes last. Call it again after an interruption: objects that are there and whole are kept (their bytes are read and
    compared). `progress(done, total)` counts bytes.

    Raises:
        DataError: no data set at the source, or a damaged one (named); another one, finished or not, at the target.
        ValueError: fewer than one thread. StoreError: a store failed.
    """
    if threads < 1:
        raise ValueError(f"threads={threads}: must be at least 1")
    origin = Dataset.open(source)
    place = target if isinstance(target, Store) else Store(target)
    manifest = origin.store.read(MANIFEST)
    if hashlib.sha256(manifest).hexdigest() != origin.fingerprint:
        raise DataError(f"{origin.url}: changed while it was opened; start again")
    if _finished(place, manifest):
        place.delete_tree("_parts")
        return origin.fingerprint
    claim = canonical_json({"copy_of": origin.fingerprint})
    if not place.create(CLAIM, claim) and place.read(CLAIM) != claim:
        raise DataError(
            f"{place.url}: an unfinished copy of another data set is there; choose another place or delete it"
        )
    # Shards first, then what describes them, as a writer does.
    objects = sorted(origin.objects.values(), key=lambda info: (info.path.endswith(METADATA), info.path))
    total, done = sum(info.size for info in objects), 0
    with ThreadPoolExecutor(threads) as pool:
        futures = {pool.submit(_copy, origin.store, place, info): info for info in objects}
        try:
            for future in as_completed(futures):
                future.result()
                done += futures[future].size
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    place.write(MANIFEST, manifest)
    place.delete_tree("_parts")
    return origin.fingerprint


def _finished(place: Store, manifest: bytes) -> bool:
    """Whether the target is whole already; DataError if it is another data set."""
    try:
        found = place.read(MANIFEST)
    except NotFound:
        if any(path.endswith(METADATA) or path.startswith("_parts/identity") for path in _some(place)):
            raise DataError(f"{place.url}: holds an unfinished data set; choose another place or delete it") from None
        return False
    if found != manifest:
        raise DataError(f"{place.url}: holds another data set; choose another place or delete it")
    return True


def _some(place: Store) -> list[str]:
    """What is at the target, unless an earlier copy has claimed it."""
    return [] if place.exists(CLAIM) else place.list()


def _copy(origin: Store, place: Store, info: ObjectInfo) -> None:
    if _whole(place, info):
        return
    data = origin.read(info.path)
    if not _matches(info, data):
        data = origin.read(info.path)  # once more: it may have been damaged on the way
    if not _matches(info, data):
        raise DataError(
            f"{origin.join(info.path)}: differs from the manifest; the source is damaged: `keel data check`"
        )
    place.write(info.path, data)
    size = place.size(info.path)
    if size != info.size:
        raise DataError(f"{place.join(info.path)}: {size} bytes arrived instead of {info.size}; start again")


def _whole(place: Store, info: ObjectInfo) -> bool:
    try:
        return place.size(info.path) == info.size and _matches(info, place.read(info.path))
    except NotFound:
        return False


def _matches(info: ObjectInfo, data: bytes) -> bool:
    return len(data) == info.size and hashlib.sha256(data).hexdigest() == info.sha256

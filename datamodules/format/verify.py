"""Checking a data set against its manifest."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

from datamodules.store import NotFound, Store

from .array import Array
from .crc import crc32c
from .dataset import METADATA, Dataset, ObjectInfo
from .errors import DataError
from .layout import CHECKSUM_BYTES
from .shard import computed_index, decode_index

BLOCK_BYTES = 16 * 2**20


def verify(source: str | Store, deep: bool = True, threads: int = 4) -> list[str]:
    """One line per missing, short, long or corrupt object, naming it; [] if the data set is whole.

    `deep` reads every byte; otherwise only sizes are compared. DataError if there is no data set to check.
    """
    dataset = Dataset.open(source)
    shards = {array.shard_path(k): (array, k) for array in dataset.arrays.values() for k in range(array.shards)}
    problems = [f"{dataset.store.join(path)}: not in the manifest" for path in shards if path not in dataset.objects]

    def check(info: ObjectInfo) -> str | None:
        url = dataset.store.join(info.path)
        try:
            size = dataset.store.size(info.path)
        except NotFound:
            return f"{url}: missing"
        if size != info.size:
            return f"{url}: {'truncated' if size < info.size else 'too long'}, {size} bytes instead of {info.size}"
        if not deep:
            return None
        digest = hashlib.sha256()
        for start in range(0, size, BLOCK_BYTES):
            digest.update(dataset.store.read_range(info.path, start, min(start + BLOCK_BYTES, size)))
        if digest.hexdigest() != info.sha256:
            where = _where(dataset, info, *shards[info.path]) if not info.path.endswith(METADATA) else ""
            return f"{url}: corrupt, its SHA-256 is not that of the manifest{where}"
        return None

    with ThreadPoolExecutor(threads) as pool:
        problems += [found for found in pool.map(check, dataset.objects.values()) if found]
    return problems


def _where(dataset: Dataset, info: ObjectInfo, array: Array, k: int) -> str:
    """Which part of a corrupt shard is wrong, for the message."""
    spec = array.spec
    tail = dataset.store.read_range(info.path, info.size - spec.index_bytes, info.size)
    try:
        if (decode_index(spec, tail, info.path) != computed_index(spec, k)).any():
            return " (in the shard index)"
    except DataError:
        return " (in the shard index)"
    for number in range(spec.present_chunks(k)):
        start = number * spec.chunk_bytes
        chunk = dataset.store.read_range(info.path, start, start + spec.chunk_bytes)
        if crc32c(chunk[:-CHECKSUM_BYTES]) != int.from_bytes(chunk[-CHECKSUM_BYTES:], "little"):
            return f" (chunk {number} at byte {start})"
    return ""

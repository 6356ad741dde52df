"""Checking a data set against its manifest."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor

from datamodules.store import NotFound, Store, StoreError, Unreachable

from .array import Array
from .codecs import BadChunk
from .dataset import BLOCK_BYTES, METADATA, Dataset, ObjectInfo
from .errors import DataError
from .layout import ABSENT
from .shard import decode_chunk, decode_index, index_of


def verify(source: str | Store, deep: bool = True, threads: int = 4) -> list[str]:
    """One line per missing, short, long, corrupt or unreadable object, naming it; [] if the data set is whole.

    `deep` reads every byte; otherwise only sizes are compared. Once the store does not answer any more within its deadline,
    what is left is not asked for. DataError if there is no data set to check.
    """
    dataset = Dataset.open(source)
    shards = {array.shard_path(k): (array, k) for array in dataset.arrays.values() for k in range(array.shards)}
    problems = [f"{dataset.store.join(path)}: not in the manifest" for path in shards if path not in dataset.objects]

    def check(info: ObjectInfo) -> str | None:
        url = dataset.store.join(info.path)
        if gone.is_set():
            return f"{url}: not checked, as the store no longer answers"
        try:
            return compare(info, url)
        except NotFound:
            return f"{url}: missing"
        except Unreachable as error:
            gone.set()
            return str(error)
        except StoreError as error:
            return str(error)

    def compare(info: ObjectInfo, url: str) -> str | None:
        size = dataset.store.size(info.path)
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

    gone = threading.Event()
    with ThreadPoolExecutor(threads) as pool:
        problems += [found for found in pool.map(check, dataset.objects.values()) if found]
    return problems


def _where(dataset: Dataset, info: ObjectInfo, array: Array, k: int) -> str:
    """Which part of a corrupt shard is wrong, for the message."""
    spec = array.spec
    tail = dataset.store.read_range(info.path, info.size - spec.index_bytes, info.size)
    try:
        index = decode_index(spec, tail, info.path, info.size)
    except DataError:
        return " (in the shard index)"
    present = index[index[:, 0] != ABSENT]
    if len(present) != spec.present_chunks(k) or (index_of(spec, present[:, 1]) != index).any():
        return " (in the shard index)"
    for number, (start, length) in enumerate(present.tolist()):
        try:
            decode_chunk(spec, dataset.store.read_range(info.path, start, start + length))
        except BadChunk:
            return f" (chunk {number} at byte {start})"
    return " (each chunk is sound: it is another shard)"

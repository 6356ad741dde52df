"""Small data sets whose every value says where it belongs."""

from __future__ import annotations

import threading

import numpy as np

from datamodules.format import ArraySpec, Dataset, write_dataset
from datamodules.format.shard import encode_shard
from datamodules.store import Sink, Store
from datamodules.stream.cache import ShardCache
from datamodules.stream.fetch import Reader
from datamodules.stream.metrics import Metrics
from datamodules.stream.prefetch import THREADS
from datamodules.stream.windows import FieldWindows


def field_values(trajectories: int, frames: int, channels: int = 2, side: int = 4) -> np.ndarray:
    """float32 [trajectory, time, channel, y, x] of distinct integers (exact in float32 below 2^24)."""
    shape = (trajectories, frames, channels, side, side)
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def write_fields(
    url: str,
    trajectories: int = 10,
    frames: int = 7,
    channels: int = 2,
    side: int = 4,
    per_shard: int = 3,
    splits: dict[str, list[int]] | None = None,
    level: int | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> str:
    """The values above as a data set; returns its fingerprint. Splits: all but two trajectories, one, one.

    ``extra``: arrays with one entry for each trajectory.
    """
    n = trajectories
    spec = ArraySpec(
        shape=(n, frames, channels, side, side),
        dtype="float32",
        dimensions=("trajectory", "time", "channel", "y", "x"),
        shard_length=per_shard,
        level=level,
    )
    attributes = {
        "kind": "fields",
        "array": "fields",
        "channels": [f"c{i}" for i in range(channels)],
        "dt": 0.5,
        "splits": splits or {"train": [0, n - 2], "validation": [n - 2, n - 1], "test": [n - 1, n]},
    }
    extra = extra or {}
    specs = {"fields": spec} | {k: ArraySpec((n,), v.dtype.name, ("trajectory",), n) for k, v in extra.items()}
    return write_dataset(url, specs, {"fields": field_values(n, frames, channels, side), **extra}, attributes)


def replace_shard(url: str, k: int) -> str:
    """Put an intact shard of other data in the place of shard ``k`` of ``write_fields``; returns its path."""
    array, values = Dataset.open(url).main, field_values(10, 7) + 1
    base, extent = k * array.shard_length, array.spec.shard_extent(k)
    Store(url).write(array.shard_path(k), bytes(encode_shard(array.spec, k, values[base : base + extent])))
    return array.shard_path(k)


def token_values(tokens: int) -> np.ndarray:
    """uint8 [tokens], a fixed aperiodic sequence."""
    return (np.arange(tokens, dtype=np.uint64) ** 2 // 7 % 251).astype(np.uint8)


def write_text(
    url: str, tokens: int = 5000, per_shard: int = 1024, chunk: int = 128, separator: int | None = None
) -> str:
    """The tokens above as a data set split 80:20; returns its fingerprint."""
    spec = ArraySpec((tokens,), "uint8", ("token",), shard_length=per_shard, chunk_length=chunk)
    cut = tokens * 4 // 5
    attributes = {
        "kind": "text",
        "array": "tokens",
        "vocab_size": 256,
        "splits": {"train": [0, cut], "validation": [cut, tokens]},
        **({} if separator is None else {"separator": separator}),
    }
    return write_dataset(url, {"tokens": spec}, {"tokens": token_values(tokens)}, attributes)


def fields_reader(url: str, cache: ShardCache | None = None, frames: int = 3, stride: int = 2) -> Reader:
    """A reader of the train split; of 7 frames it gives windows that begin at 0, 2 and 4."""
    dataset = Dataset.open(url)
    return Reader(dataset, FieldWindows(dataset.main, *dataset.splits["train"], frames, stride), cache, Metrics())


def stream_threads() -> int:
    """Reading threads that are alive."""
    return sum(t.name.startswith(THREADS) for t in threading.enumerate())


def used_at_once(cache: ShardCache) -> int:
    """Bytes that a cache holds at one moment. A listing is none: it may show a file and the one that took its place. While the
    lock is held nothing leaves and no room is given, so that a second listing has what is really there."""
    with cache._lock("evict"):
        return min(cache.used(), cache.used())


def flipping(sink: Sink, at: int) -> Sink:
    """``sink`` with one bit of byte ``at`` turned on its way."""

    def take(offset: int, piece: memoryview) -> None:
        data = bytearray(piece)
        if offset <= at < offset + len(data):
            data[at - offset] ^= 1
        sink(offset, memoryview(data))

    return take

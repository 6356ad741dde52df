"""Byte ranges that are kept: read once, whatever happens to the copy, and within the bound of the cache."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.format import Dataset
from datamodules.store import Store
from datamodules.stream import fetch as fetch_module
from datamodules.stream import ranges as ranges_module
from datamodules.stream.cache import ShardCache
from datamodules.stream.fetch import Reader
from datamodules.stream.ranges import RangeCache

from .samples import fields_reader, write_fields

SIDE = 64
FRAME = 2 * SIDE * SIDE * 4 + 4  # bytes of a frame with its checksum
IDS = np.arange(10)
BOUND = 64 << 20


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_module, "REMOTE_GAP", 0)  # nothing is fetched that nobody asked for


def write(url: str, level: int | None = None) -> None:
    write_fields(url, trajectories=12, side=SIDE, level=level)


def reader_of(url: str, root: Path, bound: int = BOUND) -> Reader:
    """Two of seven frames of each trajectory."""
    return fields_reader(url, RangeCache(str(root), bound), frames=2, stride=7)


def parts(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*.some*") if path.is_file())


def expected(url: str) -> torch.Tensor:
    return fields_reader(url, frames=2, stride=7).batch(IDS)["fields"]


@pytest.mark.parametrize("level", [None, 1])
def test_ranges_are_fetched_once_and_nothing_else(memory: str, tmp_path: Path, level: int | None) -> None:
    write(memory, level)
    reader, right = reader_of(memory, tmp_path), expected(memory)
    for ids in (IDS[:4], IDS[4:]):
        assert torch.equal(reader.batch(ids)["fields"], right[ids])
    fetched = reader.metrics.fetched
    assert level or fetched == 10 * 2 * FRAME
    assert torch.equal(reader.batch(IDS[::-1])["fields"], right.flip(0)) and reader.metrics.fetched == fetched
    occupied, shards = RangeCache(str(tmp_path), BOUND).used(), 12 * 7 * FRAME
    assert occupied < 10 * 2 * (FRAME + 2 * 4096) < shards / 2
    later = reader_of(memory, tmp_path)  # another process, say
    assert torch.equal(later.batch(IDS)["fields"], right)
    assert later.metrics.fetched == 0 if level is None else later.metrics.fetched < fetched / 100  # indices of shards
    assert reader.caches == 0  # no whole shard is ever asked for


def test_what_is_missing_is_fetched_and_no_more(memory: str, tmp_path: Path) -> None:
    write(memory)
    reader, right = reader_of(memory, tmp_path), expected(memory)
    reader.batch(IDS[:6])
    assert torch.equal(reader.batch(IDS)["fields"], right) and reader.metrics.fetched == 10 * 2 * FRAME


@pytest.mark.parametrize("how", ["zeros", "noise", "short", "empty"])
def test_a_copy_that_a_crash_left_is_mended(memory: str, tmp_path: Path, how: str) -> None:
    write(memory)
    right = expected(memory)
    reader_of(memory, tmp_path).batch(IDS)
    path = parts(tmp_path)[0]
    with path.open("r+b") as file:
        if how in ("zeros", "noise"):
            file.seek(100)
            file.write(bytes(5000) if how == "zeros" else os.urandom(5000))
        else:
            file.truncate(1000 if how == "short" else 0)
    later = reader_of(memory, tmp_path)
    assert torch.equal(later.batch(IDS)["fields"], right)
    assert later.metrics.fetched == (2 if how in ("zeros", "noise") else 6) * FRAME
    assert torch.equal(reader_of(memory, tmp_path).batch(IDS)["fields"], right) and len(parts(tmp_path)) == 4


def test_a_copy_made_anew_under_the_same_inode_is_another(memory: str, tmp_path: Path) -> None:
    """Which chunks were verified is known by file; one that was evicted often gives its inode to the next."""
    write(memory)
    reader, right = reader_of(memory, tmp_path), expected(memory)
    reader.batch(IDS)
    reader.batch(IDS)  # all verified
    identity = reader._file(path := reader.windows.array.shard_path(0)).identity  # type: ignore[union-attr]
    for shard in range(4):
        name = reader.windows.array.shard_path(shard)
        reader._files.forget(name)
        reader.ranges.drop(reader.dataset.fingerprint, name)  # type: ignore[union-attr]
    assert parts(tmp_path) == []
    assert torch.equal(reader.batch(IDS[:1])["fields"], right[:1])
    again = reader._file(path).identity  # type: ignore[union-attr]
    assert again[:3] == identity[:3] or again[1] != identity[1]
    assert again[3] != identity[3]
    assert torch.equal(reader.batch(IDS)["fields"], right)


def test_a_whole_copy_serves_and_one_that_rots_is_dropped(memory: str, tmp_path: Path) -> None:
    write(memory)
    right, whole = expected(memory), fields_reader(memory, ShardCache(str(tmp_path), BOUND), frames=2, stride=7)
    whole.batch(IDS)
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "locks"]
    reader = reader_of(memory, tmp_path)
    assert torch.equal(reader.batch(IDS)["fields"], right) and reader.metrics.fetched == 0 and not parts(tmp_path)
    with sorted(copies)[0].open("r+b") as file:
        file.write(bytes(1000))
    later = reader_of(memory, tmp_path)
    assert torch.equal(later.batch(IDS)["fields"], right) and 0 < later.metrics.fetched <= 6 * FRAME
    assert torch.equal(reader_of(memory, tmp_path).batch(IDS)["fields"], right) and len(parts(tmp_path)) == 1


def test_a_full_disk_costs_the_copies_alone(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(memory)
    right, really = expected(memory), os.pwrite

    def full(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) > ranges_module.MARK:
            really(descriptor, data[: len(data) // 2], offset)
            raise OSError(errno.ENOSPC, "No space left on device")
        return really(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    reader = reader_of(memory, tmp_path)
    for _ in range(2):
        assert torch.equal(reader.batch(IDS)["fields"], right)
    assert reader.metrics.fetched == 2 * 10 * 2 * FRAME
    assert [record.getMessage().count("no space left") for record in caplog.records] == [1]


def _read(reader: Reader, seed: int, results: multiprocessing.SimpleQueue[bool]) -> None:  # type: ignore[type-arg]
    reader, right = pickle.loads(pickle.dumps(reader)), None
    for ids in np.random.default_rng(seed).permuted(np.tile(IDS, (20, 1)), axis=1):
        found = reader.batch(ids[:5])["fields"]
        right = fields_reader(reader.dataset.store.url, frames=2, stride=7).batch(ids[:5])["fields"]
        results.put(torch.equal(found, right))


@pytest.mark.parametrize("share", [0.4, 2.0])
def test_processes_write_the_same_copies_within_the_bound(tmp_path: Path, share: float) -> None:
    """A cache with room for some of the ranges, and for all. The store is a folder, taken for a remote one."""
    url = str(tmp_path / "data")
    write(url)
    bound = int(share * 10 * 2 * FRAME)
    dataset = Dataset.open(url)
    dataset.store.is_local = False
    reader = Reader(dataset, fields_reader(url, frames=2, stride=7).windows, RangeCache(str(tmp_path / "cache"), bound), fields_reader(url).metrics)  # fmt: skip
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_read, args=(reader, seed, results)) for seed in range(3)]
    for worker in workers:
        worker.start()
    seen, watcher = [], RangeCache(str(tmp_path / "cache"), bound)
    while any(worker.is_alive() for worker in workers):
        seen.append(watcher.used())
        time.sleep(0.002)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [results.get() for _ in range(60)] == [True] * 60
    assert 0 < max(seen) <= bound
    assert not list((tmp_path / "cache").rglob("*.part"))
    assert share < 1 or len(parts(tmp_path / "cache")) == 4


def test_the_room_that_others_were_given_counts(memory: str, tmp_path: Path) -> None:
    """A lump is taken ahead of what is written, so that not every write looks at the whole folder."""
    first, second = RangeCache(str(tmp_path), BOUND), RangeCache(str(tmp_path), BOUND)
    assert first._more(BOUND * 3 // 4) and not second._more(BOUND // 2) and second._more(BOUND // 8)
    del first
    assert second._more(BOUND // 2)  # what a process that ended had not written is free again


def test_sizes_of_which_zeros_have_a_checksum_of_zero_are_not_kept(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(memory)
    assert RangeCache.suits(FRAME - 4)
    monkeypatch.setattr(ranges_module, "crc32c", lambda data: int(any(data)))
    reader = reader_of(memory, tmp_path)
    for _ in range(2):
        assert torch.equal(reader.batch(IDS)["fields"], expected(memory))
    assert reader.metrics.fetched == 2 * 10 * 2 * FRAME and not parts(tmp_path)


def test_a_store_that_is_gone_is_not_missed(memory: str, tmp_path: Path) -> None:
    write(memory)
    right = expected(memory)
    reader = reader_of(memory, tmp_path)
    reader.batch(IDS)
    Store(memory).delete_tree()
    assert torch.equal(reader.batch(IDS)["fields"], right)

"""The room of the cache: bounds of several runs, and disks that are full."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.format.crc import crc32
from datamodules.store import OutOfSpace, Sink
from datamodules.stream import cache as cache_module
from datamodules.stream.cache import ShardCache

from .test_cache import SIZE, Source, content, fetch, files


class Disk:
    """A disk on which so many bytes of shards fit; ``quota`` may be changed."""

    def __init__(self, root: Path, quota: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.quota, self.allocate = root, quota, cache_module._allocate
        monkeypatch.setattr(cache_module, "_allocate", self)

    def __call__(self, descriptor: int, size: int) -> None:
        if sum(p.stat().st_size for p in self.root.rglob("*") if p.is_file()) + size > self.quota:
            raise OSError(28, "No space left on device")
        self.allocate(descriptor, size)


def test_a_full_disk_costs_own_shards_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(tmp_path, 3 * SIZE, monkeypatch)
    source, cache = Source(), ShardCache(str(tmp_path), 10 * SIZE)
    descriptor, _ = cache.open(source, "0" * 64, "neighbour", SIZE, crc32(content("neighbour")))
    assert descriptor is not None
    os.close(descriptor)
    for name in "abcd":
        time.sleep(0.01)
        assert fetch(cache, source, name) == content(name)
    assert files(tmp_path) == ["c", "d", "neighbour"]


def test_a_full_disk_is_one_warning_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(tmp_path, 0, monkeypatch)
    source, cache = Source(), ShardCache(str(tmp_path), 10 * SIZE)
    assert fetch(cache, source, "a") is None and fetch(cache, source, "b") is None
    (record,) = caplog.records
    assert f"{tmp_path}: no space left for a shard of {SIZE} bytes" in record.getMessage()
    assert files(tmp_path) == [] and source.downloads == []
    disk.quota = SIZE  # somebody made room
    assert fetch(cache, source, "a") == content("a")


def test_a_disk_that_fills_in_a_download_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Full(Source):
        def read_ranges(self, requests: list[tuple[str, int, int]], sinks: list[Sink]) -> list[bytes]:
            raise OutOfSpace("no space left")

    assert fetch(ShardCache(str(tmp_path), 10 * SIZE), Full(), "a") is None
    assert files(tmp_path) == [] and len(caplog.records) == 1


def test_a_small_bound_does_not_evict_what_a_larger_one_keeps(tmp_path: Path) -> None:
    source, large, small = Source(), ShardCache(str(tmp_path), 6 * SIZE), ShardCache(str(tmp_path), 2 * SIZE)
    for name in "abcd":
        fetch(large, source, name)
        time.sleep(0.01)
    copy = pickle.loads(pickle.dumps(small))
    fetch(small, source, "e")
    fetch(copy, source, "f")
    assert files(tmp_path) == list("abcdef")
    fetch(small, source, "g")
    assert files(tmp_path) == list("bcdefg")  # the larger bound holds for all
    del large
    fetch(small, source, "h")
    assert files(tmp_path) == ["g", "h"]


def _announces(root: str, ready: Any) -> None:
    cache = ShardCache(root, 10 * SIZE)
    ready.put(cache.capacity)
    time.sleep(60)


def test_the_bound_of_a_killed_process_is_forgotten(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.SimpleQueue()
    process = context.Process(target=_announces, args=(str(tmp_path), ready))
    process.start()
    ready.get()
    source, cache = Source(), ShardCache(str(tmp_path), SIZE)
    for name in "ab":
        fetch(cache, source, name)
        time.sleep(0.01)
    assert files(tmp_path) == ["a", "b"]
    process.kill()
    process.join()
    fetch(cache, source, "c")
    assert files(tmp_path) == ["c"]
    assert len([p for p in (tmp_path / "locks").iterdir() if p.name.startswith("bound")]) == 1

"""The cache is bounded, verified, atomic, and safe among threads and processes, also when they are killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.format import DataError
from datamodules.format.crc import crc32
from datamodules.store import Sink
from datamodules.stream import cache as cache_module
from datamodules.stream.cache import ShardCache, Stopped, default_root

from .samples import used_at_once

SIZE = 50_000
PIECE = 7_000


def content(name: str, size: int = SIZE) -> bytes:
    return np.random.default_rng(crc32(name.encode())).bytes(size)


class Source:
    """A store of generated objects that counts, and can corrupt or delay, what it serves."""

    url = "fake://bucket/data"

    def __init__(self, corrupt: int = 0, delay: float = 0.0, size: int = SIZE) -> None:
        self.corrupt, self.delay, self.size = corrupt, delay, size
        self.downloads: list[str] = []

    def read_ranges(self, requests: list[tuple[str, int, int]], sinks: list[Sink]) -> list[bytes]:
        time.sleep(self.delay)
        for (path, start, stop), sink in zip(requests, sinks, strict=True):
            data = bytearray(content(path, self.size)[start:stop])
            if start == 0:
                self.downloads.append(path)
                if self.corrupt:
                    self.corrupt -= 1
                    data[7] ^= 1
            sink(0, memoryview(data[:5]))  # a try that broke off
            for first in range(0, len(data), PIECE):
                sink(first, memoryview(data)[first : first + PIECE])
        return [b""] * len(requests)


def fetch(cache: ShardCache, source: Source, name: str) -> bytes | None:
    descriptor, _ = cache.open(source, "f" * 64, name, source.size, crc32(content(name, source.size)))
    if descriptor is None:
        return None
    try:
        return os.pread(descriptor, source.size + 1, 0)
    finally:
        os.close(descriptor)


def files(root: Path) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.is_file() and p.parent.name != "locks")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "BLOCK", 4096)


def test_a_shard_is_downloaded_once_and_survives_the_object(tmp_path: Path, small_blocks: None) -> None:
    source, cache = Source(), ShardCache(str(tmp_path), 10 * SIZE)
    for _ in range(3):
        assert fetch(cache, source, "a/c/0") == content("a/c/0")
    assert fetch(ShardCache(str(tmp_path), 10 * SIZE), source, "a/c/0") == content("a/c/0")
    assert source.downloads == ["a/c/0"]
    assert files(tmp_path) == ["a%2Fc%2F0"]
    descriptor, fetched = cache.open(source, "f" * 64, "b", SIZE, crc32(content("b")))
    assert fetched == SIZE and descriptor is not None
    os.close(descriptor)


def test_data_sets_do_not_share_entries(tmp_path: Path) -> None:
    source, cache = Source(), ShardCache(str(tmp_path), 10 * SIZE)
    for fingerprint in ("1" * 64, "2" * 64):
        descriptor, fetched = cache.open(source, fingerprint, "a", SIZE, crc32(content("a")))
        assert fetched == SIZE and descriptor is not None
        os.close(descriptor)


def test_bounded_in_bytes_and_least_recently_used_leaves(tmp_path: Path) -> None:
    source, cache = Source(), ShardCache(str(tmp_path), 3 * SIZE)
    for name in "abc":
        fetch(cache, source, name)
        time.sleep(0.01)  # distinct times of use
    fetch(cache, source, "a")  # now b is the oldest
    fetch(cache, source, "d")
    assert files(tmp_path) == ["a", "c", "d"]
    assert cache.used() == 3 * SIZE
    for name in "efgh":
        fetch(cache, source, name)
        assert cache.used() <= 3 * SIZE


def test_a_shard_larger_than_the_cache_is_not_cached(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), SIZE)
    fetch(cache, Source(), "a")
    big = Source(size=2 * SIZE)
    assert fetch(cache, big, "b") is None
    assert big.downloads == [] and files(tmp_path) == ["a"]  # and nothing was thrown out for it


def test_an_evicted_shard_stays_readable_for_who_has_it_open(tmp_path: Path) -> None:
    source, cache = Source(), ShardCache(str(tmp_path), SIZE)
    descriptor, _ = cache.open(source, "f" * 64, "a", SIZE, crc32(content("a")))
    assert descriptor is not None
    fetch(cache, source, "b")
    assert files(tmp_path) == ["b"]
    assert os.pread(descriptor, SIZE, 0) == content("a")
    os.close(descriptor)


def test_one_bad_download_is_repeated_and_two_name_the_shard(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), 10 * SIZE)
    source = Source(corrupt=1)
    assert fetch(cache, source, "a") == content("a")
    assert len(source.downloads) == 2
    with pytest.raises(DataError, match=r"fake://bucket/data/b: corrupt"):
        fetch(cache, Source(corrupt=2), "b")
    assert files(tmp_path) == ["a"]


def test_truncated_copy_is_fetched_again_and_dropped_copy_too(tmp_path: Path) -> None:
    source, cache = Source(), ShardCache(str(tmp_path), 10 * SIZE)
    fetch(cache, source, "a")
    os.truncate(next(p for p in tmp_path.rglob("a") if p.is_file()), SIZE // 2)
    assert fetch(cache, source, "a") == content("a")
    cache.drop("f" * 64, "a")
    assert files(tmp_path) == []
    assert fetch(cache, source, "a") == content("a")
    assert len(source.downloads) == 3


def test_a_failing_store_leaves_nothing(tmp_path: Path) -> None:
    class Broken(Source):
        def read_ranges(self, requests: list[tuple[str, int, int]], sinks: list[Sink]) -> list[bytes]:
            raise ConnectionError("gone")

    cache = ShardCache(str(tmp_path), 10 * SIZE)
    with pytest.raises(ConnectionError):
        fetch(cache, Broken(), "a")
    assert files(tmp_path) == []


def test_a_download_stops_between_blocks(tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "PARALLEL", 1)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == 3

    cache = ShardCache(str(tmp_path), 10 * SIZE)
    with pytest.raises(Stopped):
        cache.open(Source(), "f" * 64, "a", SIZE, crc32(content("a")), stop)
    assert len(asked) == 3 and files(tmp_path) == []
    assert fetch(cache, Source(), "a") == content("a")


def test_threads_download_a_shard_once(tmp_path: Path) -> None:
    source, cache = Source(delay=0.02), ShardCache(str(tmp_path), 10 * SIZE)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: fetch(cache, source, f"s{i % 2}"), range(16)))
    assert results == [content(f"s{i % 2}") for i in range(16)]
    assert sorted(source.downloads) == ["s0", "s1"]


def _use(root: str, seed: int, results: multiprocessing.SimpleQueue) -> None:
    cache, source, bad = ShardCache(root, 4 * SIZE), Source(delay=0.001), 0
    for i in np.random.default_rng(seed).integers(0, 8, 60):
        data = fetch(cache, source, f"s{i}")
        bad += data is not None and data != content(f"s{i}")
    results.put((bad, len(source.downloads)))


def test_processes_share_a_cache_that_is_too_small(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    workers = [context.Process(target=_use, args=(str(tmp_path), seed, results)) for seed in range(3)]
    for worker in workers:
        worker.start()
    seen, watcher = [], ShardCache(str(tmp_path), 4 * SIZE)
    while any(worker.is_alive() for worker in workers):
        seen.append(used_at_once(watcher))
        time.sleep(0.005)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    outcome = [results.get() for _ in workers]
    assert [bad for bad, _ in outcome] == [0, 0, 0]
    assert 0 < max(seen) <= 4 * SIZE
    assert [name for name in files(tmp_path) if name.endswith(".part")] == []


class Stuck(Source):
    """Serves the first blocks and then hangs, so that the process can be killed in the middle of a download."""

    def __init__(self, reached: str) -> None:
        super().__init__()
        self.reached = reached

    def read_ranges(self, requests: list[tuple[str, int, int]], sinks: list[Sink]) -> list[bytes]:
        if requests[0][1] > 0:
            Path(self.reached).touch()
            time.sleep(60)
        return super().read_ranges(requests, sinks)


def _download(root: str, reached: str) -> None:
    fetch(ShardCache(root, 10 * SIZE), Stuck(reached), "a")


@pytest.fixture
def killed(tmp_path: Path, small_blocks: None) -> Iterator[Path]:
    """A cache whose only user was killed with SIGKILL in the middle of a download."""
    root, reached = tmp_path / "cache", tmp_path / "reached"
    process = multiprocessing.get_context("fork").Process(target=_download, args=(str(root), str(reached)))
    process.start()
    deadline = time.monotonic() + 20
    while not reached.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # While the writer lives, its file is neither used nor removed.
    ShardCache(str(root), 10 * SIZE)
    assert len(files(root)) == 1 and files(root)[0].endswith(".part")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    yield root


def test_kill_in_a_download_leaves_a_part_that_is_swept(killed: Path) -> None:
    assert [name.endswith(".part") for name in files(killed)] == [True]
    ShardCache(str(killed), 10 * SIZE)
    assert files(killed) == []


def test_kill_in_a_download_is_repaired_by_a_running_process(killed: Path) -> None:
    cache = ShardCache.__new__(ShardCache)  # as one that was made before the kill: without the sweep
    cache.root, cache.capacity = str(killed), 10 * SIZE
    assert fetch(cache, Source(), "a") == content("a")
    assert files(killed) == ["a"]


CALLS = {"fcntl": "flock", "os": "posix_fallocate ftruncate pwrite replace utime unlink"}


def _dies(root: str, fatal: int) -> None:
    """Evicts, downloads and opens, and is killed at the fatal-th call of the system."""
    count = 0

    def watched(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return run

    for module, names in CALLS.items():
        for name in names.split():
            setattr(sys.modules[module], name, watched(getattr(sys.modules[module], name)))
    fetch(ShardCache(root, 2 * SIZE), Source(), "c")
    os._exit(0)


def test_kill_at_any_call_leaves_nothing_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL before each call of the system that a download with an eviction makes, one after the other."""
    monkeypatch.setattr(cache_module, "BLOCK", SIZE // 2)
    fatal, outcomes, survived = 0, set(), False
    while not survived:
        fatal += 1
        root = tmp_path / str(fatal)
        cache = ShardCache(str(root), 2 * SIZE)
        for name in ("a", "b"):  # full
            assert fetch(cache, Source(), name) == content(name)
        process = multiprocessing.get_context("fork").Process(target=_dies, args=(str(root), fatal))
        process.start()
        process.join(60)
        survived = process.exitcode == 0
        assert survived or process.exitcode == -signal.SIGKILL
        again = ShardCache(str(root), 2 * SIZE)
        left = files(root)
        outcomes.add(" ".join(left))
        assert left in (["a", "b"], ["b"], ["b", "c"]) and again.used() <= 2 * SIZE
        source = Source()
        for name in ("b", "c"):
            assert fetch(again, source, name) == content(name)
        assert source.downloads == [name for name in ("b", "c") if name not in left]
        shutil.rmtree(root)
    assert fatal > 20 and outcomes == {"a b", "b", "b c"}


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEEL_CACHE", str(tmp_path))
    assert default_root() == str(tmp_path)
    monkeypatch.delenv("KEEL_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_root() == "/home/someone/.cache/keel"
    with pytest.raises(ValueError, match="capacity=0"):
        ShardCache(str(tmp_path), 0)


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    fetch(ShardCache(str(tmp_path), 10 * SIZE), Source(), "a")
    assert threading.active_count() == before


class Slow(Source):
    """Waits in a download until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()

    def read_ranges(self, requests: list[tuple[str, int, int]], sinks: list[Sink]) -> list[bytes]:
        self.reached.set()
        assert self.go.wait(20)
        return super().read_ranges(requests, sinks)


def test_a_child_forked_in_a_download_holds_no_lock(tmp_path: Path) -> None:
    """The lock is of the open file, which a child shares: it would last as long as the child."""
    source, cache = Slow(), ShardCache(str(tmp_path), 10 * SIZE)
    worker = threading.Thread(target=fetch, args=(cache, source, "a"))
    worker.start()
    assert source.reached.wait(20)
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        names = [os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")]
        os.write(tell, b"%d" % sum("/locks/" in name for name in names))
        time.sleep(60)
        os._exit(0)
    try:
        assert os.read(told, 9) == b"0"
        with cache._lock(cache._target("f" * 64, "a"), wait=False) as held:
            assert not held  # what the child did not drop
        source.go.set()
        worker.join(20)
        with cache._lock(cache._target("f" * 64, "a"), wait=False) as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)
    assert fetch(cache, source, "a") == content("a") and source.downloads == ["a"]

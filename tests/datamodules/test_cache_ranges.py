"""Byte ranges that are kept: read once, whatever happens to the copy, and within the bound of the cache."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.data import FieldsConfig, FieldsData
from datamodules.format import DataError, Dataset
from datamodules.format.shard import encode_shard
from datamodules.store import Changed, Store
from datamodules.stream import blocks as blocks_module
from datamodules.stream import fetch as fetch_module
from datamodules.stream import ranges as ranges_module
from datamodules.stream.cache import ShardCache
from datamodules.stream.fetch import Reader
from datamodules.stream.files import File
from datamodules.stream.ranges import RangeCache

from .samples import field_values, fields_reader, flipping, used_at_once, write_fields

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


def test_what_was_never_written_is_not_read(tmp_path: Path) -> None:
    cache = RangeCache(str(tmp_path), BOUND)
    file = File(*cache.partial("f" * 64, "path", 1 << 20)[:1], mark=b"x")  # type: ignore[index]
    cache.keep(file.descriptor, 1 << 16, b"x" * 100)
    assert file.empty(0, 1 << 16) and file.empty(1 << 17, 1 << 18) and not file.empty(0, (1 << 16) + 1)
    assert not file.empty((1 << 16) + 50, (1 << 16) + 60)


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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("from_byte", [0, ranges_module.MARK])
def test_a_full_or_broken_disk_costs_the_copies_alone(
    memory: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    from_byte: int,
) -> None:
    write(memory)
    right, really = expected(memory), os.pwrite

    def broken(descriptor: int, data: bytes, offset: int) -> int:
        if len(data) > from_byte:
            really(descriptor, data[: len(data) // 2], offset)
            raise OSError(code, os.strerror(code))
        return really(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", broken)
    reader, before = reader_of(memory, tmp_path), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert torch.equal(reader.batch(IDS)["fields"], right)
    assert reader.metrics.fetched == 2 * 10 * 2 * FRAME
    assert [record.getMessage().count(os.strerror(code)) for record in caplog.records] == [1]
    assert len(os.listdir("/proc/self/fd")) <= before + len(parts(tmp_path)) and not list(tmp_path.rglob("*.part"))


def test_a_folder_that_takes_no_files_costs_the_copies_alone(
    memory: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(memory)
    (tmp_path / "file").touch()
    data = FieldsData(FieldsConfig(url=memory, frames=2, stride=7, cache=str(tmp_path / "file")), global_batch=2)
    reader = data.reader("train")
    assert reader.ranges is None and torch.equal(reader.batch(IDS)["fields"], expected(memory))
    assert "byte ranges are read in every epoch" in caplog.records[0].getMessage()


class Flipping(Store):
    """Of the first `count` answers, one bit at `at` is wrong."""

    count, at = 1, 0

    def read_ranges(self, requests: Any, sinks: Any = None, tags: Any = None) -> list[bytes]:
        if self.count and requests[0][2] - requests[0][1] > self.at and tags is not None:  # not a whole shard
            self.count -= 1
            sinks = [flipping(sinks[0], self.at), *sinks[1:]]
        return super().read_ranges(requests, sinks, tags)


@pytest.mark.parametrize("gap", [0, 1 << 20])
def test_nothing_is_kept_but_what_was_verified(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: int
) -> None:
    """A request runs over chunks that are there and known to be right; the answer is wrong in one of them, or in one that
    was asked for."""
    write(memory)
    right, other = expected(memory), reader_of(memory, tmp_path)
    other.batch(IDS[1:2])
    other.batch(IDS[1:2])
    monkeypatch.setattr(fetch_module, "REMOTE_GAP", gap)
    monkeypatch.setattr(blocks_module, "WASTE", 1)
    reader = reader_of(memory, tmp_path)
    store = Flipping(memory)
    store.at = 7 * FRAME + 100 if gap else 100  # in the frames of trajectory 1, or of trajectory 0
    reader.dataset.store = store  # type: ignore[misc]
    assert torch.equal(reader.batch(IDS[[0, 2]])["fields"], right[[0, 2]]) and store.count == 0
    assert torch.equal(other.batch(IDS[:3])["fields"], right[:3])
    assert other.metrics.fetched == 2 * FRAME  # trajectory 1; the others were kept
    later = reader_of(memory, tmp_path)
    assert torch.equal(later.batch(IDS[:3])["fields"], right[:3]) and later.metrics.fetched == 0


def test_what_was_kept_of_a_data_set_that_was_replaced_is_forgotten(memory: str, tmp_path: Path) -> None:
    write(memory)
    reader = reader_of(memory, tmp_path)
    reader.batch(IDS)
    assert len(parts(tmp_path)) == 4
    write_fields(memory, trajectories=12, side=SIDE, extra={"nu": np.ones(12, np.float32)})
    reader._watch._next = 0.0
    with pytest.raises(DataError, match="changed while it was read"):
        for _ in range(100):
            reader.batch(IDS)
            time.sleep(0.05)
    assert not parts(tmp_path)
    assert reader.ranges.partial(reader.dataset.fingerprint, "any", 1000) is None  # type: ignore[union-attr]
    assert RangeCache(str(tmp_path), BOUND).partial(reader.dataset.fingerprint, "any", 1000) is not None


def test_a_shard_that_comes_back_after_another_was_read(memory: str, tmp_path: Path) -> None:
    """The store has ETags; what was read of the wrong object, whose checksums fit, is not kept beyond it."""
    write(memory)
    right, reader = expected(memory), reader_of(memory, tmp_path)
    path, store = reader.windows.array.shard_path(0), reader.dataset.store
    whole, read, tag = store.read(path), type(store).read_ranges, ["wrong"]
    with pytest.MonkeyPatch.context() as patch:

        def tagged(self: Store, requests: Any, sinks: Any = None, tags: Any = None) -> list[bytes]:
            for name, *_ in requests if tags is not None else ():
                if tags.setdefault(name, tag[0]) != tag[0]:
                    raise Changed(f"{name} was replaced", name, name)
            return read(self, requests, sinks)

        patch.setattr(Store, "read_ranges", tagged)
        encoded = encode_shard(reader.windows.array.spec, 0, field_values(3, 7, side=SIDE) + 1)
        store.write(path, bytes(encoded))
        assert torch.equal(reader.batch(IDS[:1])["fields"], right[:1] + 1)  # nobody can tell
        store.write(path, whole)
        tag[0] = "right"
        assert torch.equal(reader.batch(IDS[1:])["fields"], right[1:])
        assert torch.equal(reader.batch(IDS)["fields"], right)
    assert torch.equal(reader_of(memory, tmp_path).batch(IDS)["fields"], right)


def test_a_cache_that_is_removed_costs_the_copies_alone(memory: str, tmp_path: Path) -> None:
    write(memory)
    right, reader = expected(memory), reader_of(memory, tmp_path / "cache")
    reader.batch(IDS[:4])
    reader.ranges._room = 0  # type: ignore[union-attr]
    shutil.rmtree(tmp_path / "cache")
    reader._files = type(reader._files)()
    for _ in range(2):
        assert torch.equal(reader.batch(IDS)["fields"], right)


def _keep(cache: RangeCache, folder: str, results: multiprocessing.SimpleQueue[bool]) -> None:  # type: ignore[type-arg]
    others = [os.open(f"{folder}/{i}", os.O_RDWR | os.O_CREAT) for i in range(20)]
    for descriptor in others:
        os.write(descriptor, b"of somebody else")
    descriptor, mark = cache.partial("f" * 64, "path", 1 << 20)  # type: ignore[misc]
    cache.keep(descriptor, 0, b"x" * 1000)
    results.put(bool(mark) and os.pread(descriptor, 1000, 0) == b"x" * 1000)
    results.put(all(os.fstat(other).st_size == 16 for other in others))


def test_a_forked_process_touches_no_file_but_its_own(tmp_path: Path) -> None:
    cache = RangeCache(str(tmp_path / "cache"), BOUND)
    cache.keep(cache.partial("f" * 64, "other", 1 << 20)[0], 0, b"x")  # type: ignore[index]
    cache._room = 0  # so that the child has to announce something
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    worker = context.Process(target=_keep, args=(cache, str(tmp_path), results))
    worker.start()
    worker.join(20)
    assert worker.exitcode == 0 and [results.get(), results.get()] == [True, True]


def test_a_cache_that_is_full_is_not_asked_for_every_block(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(memory)
    reader, looks = reader_of(memory, tmp_path, bound=3 * FRAME), [0]
    monkeypatch.setattr(ranges_module, "PATIENCE_S", float("inf"))
    evict = RangeCache._evict

    def counted(self: RangeCache, size: int) -> Any:
        looks[0] += 1
        return evict(self, size)

    monkeypatch.setattr(RangeCache, "_evict", counted)
    hog = RangeCache(str(tmp_path), 3 * FRAME)
    assert hog._more(2 * FRAME) and looks == [1]
    for _ in range(3):
        reader.batch(IDS)
    assert looks == [2] and reader.metrics.fetched == 3 * 10 * 2 * FRAME


def _read(reader: Reader, seed: int, results: multiprocessing.SimpleQueue[bool]) -> None:  # type: ignore[type-arg]
    torch.set_num_threads(1)  # threads of a team that the parent had are not there any more
    reader = pickle.loads(pickle.dumps(reader))
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
        seen.append(used_at_once(watcher))
        time.sleep(0.002)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [results.get() for _ in range(60)] == [True] * 60
    assert 0 < max(seen) <= bound
    assert not list((tmp_path / "cache").rglob("*.part"))
    later = pickle.loads(pickle.dumps(reader))
    later.batch(IDS)
    assert later.metrics.fetched == 0 or share < 1


def test_the_room_that_others_were_given_counts(memory: str, tmp_path: Path) -> None:
    """A lump is taken ahead of what is written, so that not every write looks at the whole folder."""
    first, second = RangeCache(str(tmp_path), BOUND), RangeCache(str(tmp_path), BOUND)
    assert first._more(BOUND * 3 // 4) and not second._more(BOUND // 2)
    second._later = 0.0
    assert second._more(BOUND // 8)
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

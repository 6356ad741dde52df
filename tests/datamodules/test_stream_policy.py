"""What is fetched and kept: whole shards or ranges, ahead of need but bounded; memory used again; data that change."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import tracemalloc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.data import FieldsConfig, FieldsData
from datamodules.format import DataError, Dataset
from datamodules.mixture import MixtureConfig, MixtureData
from datamodules.store import Store, Unreachable
from datamodules.stream import buffers
from datamodules.stream.ahead import Ahead
from datamodules.stream.buffers import KEEP, PAGE, Pool, Slab
from datamodules.stream.cache import ShardCache
from datamodules.stream.fetch import Reader
from datamodules.stream.metrics import Metrics
from datamodules.stream.watch import Watch
from datamodules.stream.windows import FieldWindows, TokenWindows

from .samples import field_values, fields_reader, stream_threads, write_fields, write_text

FRAME = 2 * 4 * 4 * 4 + 4  # bytes with checksum


def data_of(url: str, tmp_path: Path, **config: Any) -> FieldsData:
    given = {"url": url, "frames": 2, "window_shards": 2, "cache": str(tmp_path), **config}
    return FieldsData(FieldsConfig(**given), global_batch=8)


@pytest.mark.parametrize(
    ("config", "cached", "kept"),
    [
        ({}, True, False),
        ({"stride": 7}, False, True),  # an epoch uses 2 of 7 frames
        ({"train": "0:2"}, True, False),
        ({"cache_bytes": 5000}, False, False),  # too small for the shards in use, and for what an epoch reads
        ({"cache_bytes": 5000, "stride": 7}, False, True),  # but not for two of seven frames
        ({"cache_bytes": 0}, False, False),
        ({"fetch": "ranges"}, False, False),
        ({"fetch": "shards", "stride": 7}, True, False),
    ],
)
def test_auto_takes_shards_that_will_be_used(
    memory: str, tmp_path: Path, config: dict[str, Any], cached: bool, kept: bool
) -> None:
    write_fields(memory)
    data = data_of(memory, tmp_path, **config)
    reader = data.reader(data.config.train, window_shards=2)
    assert ((reader.cache is not None), (reader.ranges is not None)) == (cached, kept)
    values, ids = field_values(10, 7), np.arange(2)
    batch = reader.batch(ids)
    assert np.array_equal(batch["fields"][0].numpy(), values[0, :2])
    assert (data.metrics.misses > 0) == cached
    assert data.metrics.used == 2 * 2 * 2 * 16 * 4


SHARD = 3 * 7 * FRAME + 3 * 7 * 16 + 4  # bytes with their index


@pytest.mark.parametrize(("train", "shards"), [("0:24", 4), ("1:24", 8), ("1:3", 1), ("0:9", 3), ("train, nu>0", 8)])
def test_room_for_what_is_in_use_and_what_is_next(memory: str, tmp_path: Path, train: str, shards: int) -> None:
    """A group of a split that begins inside a shard lies in two of them."""
    nu = np.ones(30, np.float32)
    nu[::3] = nu[8] = nu[14] = 0  # groups of two trajectories, some of them in two shards
    write_fields(memory, trajectories=30, extra={"nu": nu})
    assert data_of(memory, tmp_path).dataset.objects["fields/c/0/0/0/0/0"].size == SHARD
    for missing in (0, 1):
        data = data_of(memory, tmp_path, train=train, cache_bytes=shards * SHARD - missing)
        assert (data.train_reader().caches > 0) == (not missing), missing  # type: ignore[attr-defined]
        windows = data.windows_of(train)
        ids = np.arange(windows.samples)
        groups = [ids[a : a + windows.group] for a in range(0, len(ids), windows.group)]
        lead = windows.locate(ids).lead
        assert windows.touched == max(len(np.unique(lead[group] // 3)) for group in groups)


@pytest.mark.parametrize(("length", "touched"), [(100, 2), (1024, 2), (1025, 3), (3000, 4)])
def test_sequences_lie_across_shards(tmp_path: Path, length: int, touched: int) -> None:
    write_text(str(tmp_path), tokens=64 * 1024)
    windows = TokenWindows(Dataset.open(str(tmp_path)).main, 1, 64 * 1024, length)
    first = windows.locate(np.arange(windows.samples)).start
    found = [
        (first[min(a + windows.group, windows.samples) - 1] + length) // 1024 - first[a] // 1024 + 1
        for a in range(0, windows.samples, windows.group)
    ]
    assert max(found) <= windows.touched == touched


def test_sources_of_a_mixture_share_the_room(memory: str, tmp_path: Path) -> None:
    write_fields(memory, trajectories=30)

    def readers(room: int, **config: Any) -> list[bool]:
        given = {
            "url": memory,
            "window_shards": 2,
            "cache": str(tmp_path),
            "cache_bytes": room * SHARD,
            "train": "0:24",
        }
        data = MixtureData(MixtureConfig(sources=[given, given | config]), global_batch=8)
        return [reader.cache is not None for reader in data.train_reader().readers]  # type: ignore[attr-defined]

    assert readers(8) == [True, True]
    assert readers(7) == [True, False]
    assert readers(7, fetch="shards") == [False, True]
    assert readers(7, cache=str(tmp_path / "other")) == [True, True]
    with pytest.raises(DataError, match=f"need {4 * SHARD} bytes; raise it"):
        readers(3, fetch="shards")


def test_policies_are_checked() -> None:
    with pytest.raises(ValueError, match="fetch='shard': unknown; use shards"):
        FieldsConfig(url="x", fetch="shard")
    with pytest.raises(ValueError, match="verify='never'"):
        FieldsConfig(url="x", verify="never")
    with pytest.raises(ValueError, match="fetch=shards: needs a cache"):
        FieldsConfig(url="x", fetch="shards", cache_bytes=0)


def test_ranges_waste_little(memory: str) -> None:
    """Windows far apart in a shard are fetched one by one although the gaps are small."""
    write_fields(memory, trajectories=40, frames=40, per_shard=40)
    dataset = Dataset.open(memory)
    reader = Reader(dataset, FieldWindows(dataset.main, 0, 40, 4, 40), None, Metrics())
    for ids in np.array_split(np.random.default_rng(0).permutation(40), 4):
        reader.batch(ids)
    assert reader.metrics.fetched <= 1.2 * reader.metrics.used


def test_first_batches_do_not_wait_for_shards(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fields(memory, trajectories=10)
    gate = threading.Event()
    whole = Reader.cached
    monkeypatch.setattr(Reader, "cached", lambda self, path, stop: gate.wait(30) and whole(self, path))
    data = data_of(memory, tmp_path)
    batches = iter(data.train_dataloader())
    first = [next(batches)["index"] for _ in range(4)]  # read_ahead of them
    gate.set()
    first += [next(batches)["index"] for _ in range(2)]
    data.teardown()
    assert torch.cat(first).tolist() == data.order.at(np.arange(48)).tolist()
    assert 0 < data.metrics.misses <= 4


@pytest.mark.parametrize("fetch", ["shards", "ranges"])
def test_closing_does_not_wait_for_a_store_that_is_away(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetch: str
) -> None:
    write_fields(memory)
    away, back, read = threading.Event(), threading.Event(), Store.read_ranges

    def hangs(self: Store, *given: Any, **options: Any) -> list[bytes]:
        if threading.current_thread() is not threading.main_thread():
            away.set()
            assert back.wait(60)
        return read(self, *given, **options)

    monkeypatch.setattr(Store, "read_ranges", hangs)
    data = data_of(memory, tmp_path, fetch=fetch)
    batches = iter(data.train_dataloader())
    next(batches)
    assert away.wait(20)
    begin = time.monotonic()
    data.teardown()
    assert time.monotonic() - begin < 5
    assert stream_threads() > 0
    back.set()
    deadline = time.monotonic() + 20
    while stream_threads() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_shards_come_in_order_of_need_and_bounded() -> None:
    batches = [np.array([i // 3]) for i in range(30)]  # three batches a shard
    seen, running, lock = [], [], threading.Lock()

    def download(path: str, stop: Any) -> None:
        with lock:
            seen.append(path)
        if path == "2":
            raise DataError("the reader that needs it will say so")

    def settled() -> list[str]:
        deadline = time.monotonic() + 10
        while not ahead._jobs.empty() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        return list(seen)

    ahead = Ahead(iter(batches), lambda ids: {str(ids[0]): 10}, download, limit=25, horizon=100, threads=1)
    try:
        running = []
        for _ in range(30):
            ahead.advance()
            running.append(len(settled()))
        assert seen == [str(k) for k in range(10)]  # each once, in order
        assert all(n - (i + 3) // 3 <= 3 for i, n in enumerate(running))  # never more than the limit ahead
        assert running[0] == 3
    finally:
        ahead.close()
    assert stream_threads() == 0


def test_memory_is_used_again_only_when_nobody_sees_it(tmp_path: Path) -> None:
    write_fields(str(tmp_path))
    reader, values = fields_reader(str(tmp_path)), field_values(10, 7)
    kept = reader.batch(np.array([0, 1, 2, 3]))["fields"]
    view = kept[1:, 0].numpy()
    address = kept.data_ptr()
    assert address % PAGE == 0
    del kept
    other = reader.batch(np.array([4, 5, 6, 7]))["fields"]
    assert other.data_ptr() != address  # the view still lives
    assert np.array_equal(view, np.stack([values[0, 2], values[0, 4], values[1, 0]]))
    del view
    gc.collect()
    assert reader.batch(np.array([8, 9, 10, 11]))["fields"].data_ptr() == address
    hoard = [reader.batch(np.arange(4)) for _ in range(3 * KEEP)]
    assert len({b["fields"].data_ptr() for b in hoard}) == 3 * KEEP
    del hoard
    gc.collect()
    assert sum(map(len, reader._pool._free.values())) <= KEEP
    assert isinstance(Pool().__getstate__(), dict)


def test_verify_first_and_always(tmp_path: Path) -> None:
    for always in (False, True):
        url = str(tmp_path / str(always))
        write_fields(url)
        dataset = Dataset.open(url)
        reader = Reader(dataset, FieldWindows(dataset.main, 0, 8, 3), None, Metrics(), always)
        reader.batch(np.arange(5))
        with (Path(url) / dataset.main.shard_path(0)).open("r+b") as file:  # rots in place, under our feet
            file.seek(9)
            file.write(b"\x55")
        if always:
            with pytest.raises(DataError, match="corrupt"):
                reader.batch(np.arange(5))
        else:
            reader.batch(np.arange(5))  # a file stays open for some seconds; what was verified there is not read again
            reader._files._open.clear()
            with pytest.raises(DataError, match="fields/c/0/0/0/0/0: corrupt"):
                reader.batch(np.arange(5))
        fresh = Reader(dataset, FieldWindows(dataset.main, 0, 8, 3), None, Metrics())
        with pytest.raises(DataError, match="corrupt"):
            fresh.batch(np.arange(5))


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_local_shard_of_another_data_set_is_noticed(tmp_path: Path, always: bool, in_place: bool) -> None:
    """All its chunks are intact, so that their checksums tell nothing."""
    ours, other = str(tmp_path / "ours"), str(tmp_path / "other")
    write_fields(ours)
    write_fields(other, splits={"train": [0, 8]})
    dataset, path = Dataset.open(ours), Dataset.open(ours).main.shard_path(0)
    theirs = (Path(other) / Dataset.open(other).main.shard_path(1)).read_bytes()

    def replaced() -> None:
        file = Path(ours) / path
        if not in_place:
            file.unlink()
        file.write_bytes(theirs)

    running = Reader(dataset, FieldWindows(dataset.main, 0, 8, 3), None, Metrics(), always)
    running.batch(np.arange(5))
    replaced()
    running._files._open.clear()
    with pytest.raises(DataError, match=f"{path}: .* of another data set: its checksum differs") as caught:
        running.batch(np.arange(5))
    assert "\n" not in str(caught.value)
    fresh = Reader(dataset, FieldWindows(dataset.main, 0, 8, 3), None, Metrics(), always)
    if always:
        with pytest.raises(DataError, match="of another data set"):
            fresh.batch(np.arange(5))
    else:
        fresh.batch(np.arange(5))
    (Path(ours) / path).write_bytes(theirs + b"1")
    for reader in (running, fresh):
        reader._files._open.clear()
        with pytest.raises(DataError, match=f"{path}: too long, {len(theirs) + 1} bytes instead of {len(theirs)}"):
            reader.batch(np.arange(5))


def test_touched_files_are_read_on(tmp_path: Path) -> None:
    write_fields(str(tmp_path))
    reader = fields_reader(str(tmp_path))
    first = reader.batch(np.arange(5))["fields"]
    for file in (tmp_path / "fields").rglob("0"):
        file.touch()
    reader._files._open.clear()
    assert torch.equal(reader.batch(np.arange(5))["fields"], first)


@pytest.mark.parametrize("where", ["local", "remote"])
def test_data_that_change_under_a_run_are_noticed(memory: str, tmp_path: Path, where: str) -> None:
    url = memory if where == "remote" else str(tmp_path)
    write_fields(url)
    now = [0.0]
    watch = Watch(Dataset.open(url), clock=lambda: now[0])
    watch.check()
    reader = fields_reader(url)
    reader._watch = watch
    first = reader.batch(np.arange(4))
    Store(url).delete_tree()
    with pytest.raises(DataError, match="was removed while it was read"):
        watch.check(now=True)
    write_fields(url, trajectories=11)  # intact in itself, but another
    if where == "local":
        reader._files._open.clear()
    assert reader.batch(np.arange(4))["fields"].shape == first["fields"].shape  # not looked again yet
    now[0] += 61
    deadline = time.monotonic() + 20
    with pytest.raises(DataError, match=r"changed while it was read \(fingerprint \w{12} is now \w{12}\)") as caught:
        while time.monotonic() < deadline:  # nobody waits for a look at a remote store
            reader.batch(np.arange(4))
    assert "\n" not in str(caught.value) and url in str(caught.value)


def test_nobody_waits_for_a_store_that_is_out(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fields(memory)
    reader = fields_reader(memory, ShardCache(str(tmp_path), 1 << 20))
    first, now, looks = reader.batch(np.arange(24)), [0.0], []
    out, ended = threading.Event(), threading.Event()

    def hangs(self: Store, path: str) -> bytes:
        looks.append(path)
        assert out.wait(20)
        ended.set()
        raise Unreachable("no route")

    reader._watch = Watch(reader.dataset, clock=lambda: now[0])
    monkeypatch.setattr(Store, "read", hangs)
    for _ in range(3):
        now[0] += 61
        assert torch.equal(reader.batch(np.arange(24))["fields"], first["fields"])
    out.set()
    assert ended.wait(20) and looks == ["manifest.json"]
    assert torch.equal(reader.batch(np.arange(24))["fields"], first["fields"])
    deadline = time.monotonic() + 20
    while len(looks) < 2 and time.monotonic() < deadline:  # and one looks again later
        now[0] += 61
        reader.batch(np.arange(24))
    assert len(looks) >= 2


def test_few_batches_of_memory_serve_all(tmp_path: Path) -> None:
    write_fields(str(tmp_path))
    data = FieldsData(FieldsConfig(url=str(tmp_path), frames=3), global_batch=8)
    addresses = set()
    for batch in itertools.islice(data.train_dataloader(), 20 * 5):
        addresses.add(batch["fields"].untyped_storage().data_ptr())
        del batch
    data.teardown()
    assert len(addresses) <= 4 + 4  # read_ahead, and those in the making and in hand


@pytest.mark.parametrize("fetch", ["local", "shards", "ranges"])
def test_memory_is_flat_over_epochs(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fetch: str) -> None:
    url = str(tmp_path / "data") if fetch == "local" else memory
    write_fields(url, side=16)
    slabs: weakref.WeakSet[Slab] = weakref.WeakSet()
    make = Slab.__init__
    monkeypatch.setattr(Slab, "__init__", lambda self, *given: (slabs.add(self), make(self, *given))[1])
    data = data_of(url, tmp_path, frames=3, **({} if fetch == "local" else {"fetch": fetch}))
    batches, alive = iter(data.train_dataloader()), []
    size, epoch = 8 * 3 * 2 * 16 * 16 * 4, 8 * 5 // 8
    others = tracemalloc.Filter(False, buffers.__file__)

    def epochs(count: int) -> int:
        """Bytes that Python and NumPy hold afterwards, without the slabs that the pool lends."""
        alive.extend(weakref.ref(next(batches)["fields"]) for _ in range(count * epoch))
        gc.collect()
        return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([others]).traces)

    tracemalloc.start()
    try:
        epochs(10)  # until caches are full
        early, late = ([epochs(3) for _ in range(5)] for _ in range(2))
    finally:
        tracemalloc.stop()
        data.teardown()
    # What is in the making at a moment is chance: the least of several moments is not.
    assert min(late) - min(early) < 2 * size  # of the 75 batches that were made
    assert len(slabs) <= KEEP + 4  # a slab more for each thread and for the batch in hand
    assert sum(reference() is not None for reference in alive) <= 1

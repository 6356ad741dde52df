"""Batches: the right bytes, few requests, and faults that are repaired or named."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.format import Array, DataError, Dataset, Piece
from datamodules.store import Store
from datamodules.stream import files
from datamodules.stream.blocks import MAX_BLOCK, coalesce
from datamodules.stream.buffers import Pool
from datamodules.stream.cache import ShardCache
from datamodules.stream.fetch import Reader
from datamodules.stream.metrics import Metrics
from datamodules.stream.order import Order
from datamodules.stream.ranges import RangeCache
from datamodules.stream.stream import Share, Stream
from datamodules.stream.windows import FieldWindows, TokenWindows, Windows

from .samples import field_values, fields_reader, flipping, token_values, write_fields, write_text


def shard_file(url: str, k: int = 0) -> Path:
    return Path(url) / Dataset.open(url).main.shard_path(k)


def test_field_windows_hold_the_frames_they_name(tmp_path: Path) -> None:
    write_fields(str(tmp_path))
    reader, values = fields_reader(str(tmp_path)), field_values(10, 7)
    assert reader.windows.samples == 8 * 3  # starts 0, 2, 4 of 7 frames
    ids = np.array([5, 0, 23, 5, 8])
    batch = reader.batch(ids)
    assert batch["index"].dtype == torch.int64 and batch["index"].tolist() == ids.tolist()
    assert batch["fields"].dtype == torch.float32 and batch["fields"].shape == (5, 3, 2, 4, 4)
    expected = np.stack([values[i // 3, 2 * (i % 3) : 2 * (i % 3) + 3] for i in ids.tolist()])
    assert np.array_equal(batch["fields"].numpy(), expected)


@pytest.mark.parametrize("length", [1, 7, 128, 300, 1024, 3000])
def test_token_windows_across_chunks_and_shards(tmp_path: Path, length: int) -> None:
    write_text(str(tmp_path))
    dataset, tokens = Dataset.open(str(tmp_path)), token_values(5000)
    windows = TokenWindows(dataset.main, 100, 4100, length)
    reader = Reader(dataset, windows, None, Metrics())
    assert windows.samples == 3999 // length
    ids = np.unique(np.linspace(0, windows.samples - 1, 9).astype(int))[::-1]
    batch = reader.batch(ids)
    assert batch["tokens"].dtype == torch.int64
    expected = np.stack([tokens[100 + i * length : 100 + i * length + length + 1] for i in ids.tolist()])
    assert np.array_equal(batch["tokens"].numpy(), expected)


def test_windows_refuse_what_cannot_be(tmp_path: Path) -> None:
    write_fields(str(tmp_path / "f"))
    write_text(str(tmp_path / "t"))
    fields, text = Dataset.open(str(tmp_path / "f")).main, Dataset.open(str(tmp_path / "t")).main
    with pytest.raises(DataError, match="8 frames is longer than the trajectories of 7"):
        FieldWindows(fields, 0, 4, frames=8)
    with pytest.raises(DataError, match=r"\[4, 4\) holds no trajectory"):
        FieldWindows(fields, 4, 4, frames=2)
    with pytest.raises(DataError, match="fewer than 101 tokens"):
        TokenWindows(text, 0, 100, length=100)
    assert TokenWindows(text, 0, 101, length=100).samples == 1


def test_one_request_to_the_store_per_batch(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fields(memory)
    reader = fields_reader(memory)
    calls: list[Any] = []
    original = Store.read_ranges

    def counted(self: Store, requests: Any, *given: Any) -> list[bytes]:
        calls.append(requests)
        return original(self, requests, *given)

    monkeypatch.setattr(Store, "read_ranges", counted)
    batch = reader.batch(np.arange(24))
    assert np.array_equal(batch["fields"][:, 0].numpy(), field_values(10, 7)[:8, [0, 2, 4]].reshape(24, 2, 4, 4))
    assert len(calls) == 1
    assert len(calls[0]) == 3  # the windows of a shard overlap: one range each
    assert reader.metrics.fetched == 8 * 7 * (2 * 4 * 4 * 4 + 4)  # each frame of the split once, with its checksum
    assert reader.metrics.used == batch["fields"].nbytes


def piece(path: str, start: int, stop: int) -> tuple[Piece, int]:
    return Piece(path, start, stop, 1, 0, 1, 0), start


def test_coalesce_merges_neighbours_of_one_object() -> None:
    blocks = coalesce([piece("b", 0, 10), piece("a", 30, 40), piece("a", 0, 10), piece("a", 10, 20)], gap=0)
    assert [block[:3] for block in blocks] == [("a", 0, 20), ("a", 30, 40), ("b", 0, 10)]
    assert [len(block.members) for block in blocks] == [2, 1, 1]
    assert [b[:3] for b in coalesce([piece("a", 0, 60), piece("a", 68, 80)], gap=8)] == [("a", 0, 80)]
    assert len(coalesce([piece("a", 0, 10), piece("a", 18, 20)], gap=8)) == 2  # would drop 8 bytes of 20
    assert len(coalesce([piece("a", 0, MAX_BLOCK), piece("a", MAX_BLOCK, MAX_BLOCK + 1)], gap=0)) == 2
    assert [b[:3] for b in coalesce([piece("a", 0, 9), piece("a", 2, 5)], gap=0)] == [("a", 0, 9)]
    assert coalesce([], gap=0) == []


def test_windows_protocol(tmp_path: Path) -> None:
    write_fields(str(tmp_path / "f"))
    write_text(str(tmp_path / "t"), tokens=5000, per_shard=1024)
    fields, text = Dataset.open(str(tmp_path / "f")), Dataset.open(str(tmp_path / "t"))
    cases: list[tuple[Windows, int]] = [
        (FieldWindows(fields.main, 0, 8, 3, 2), 9),  # 3 trajectories of 3 windows in a shard
        (TokenWindows(text.main, 0, 4000, 100), 10),
        (TokenWindows(text.main, 0, 4000, 3000), 1),
    ]
    for windows, group in cases:
        assert windows.group == group
        # A group lies in one shard (of text, whose windows cross shards, in two): so the order bounds the shards in use.
        order, array = Order(windows.samples, windows.group, 1, 0), windows.array
        ids = order(0, np.arange(windows.samples))
        at = windows.locate(ids)
        shards = (at.lead if array.window_axis else at.start) // array.shard_length
        starts = [0, *(np.flatnonzero(np.diff(ids // group)) + 1), len(ids)]
        assert len(starts) - 1 == order.groups
        for a, b in itertools.pairwise(starts):
            assert len(np.unique(shards[a:b])) <= (1 if array.window_axis else 2)


def test_pinned_memory_is_read_into_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fields(str(tmp_path))
    reader, pinned, real = fields_reader(str(tmp_path)), [], torch.empty

    def empty(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        memory = real(*shape, **options)
        if pin_memory:
            pinned.append(memory)
        return memory

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    monkeypatch.setattr(Pool, "take", None)  # memory that is not pinned
    batch = reader.batch(np.arange(24))
    assert [memory.data_ptr() for memory in pinned] == [batch["fields"].data_ptr()]
    assert np.array_equal(batch["fields"][:, 0].numpy(), field_values(10, 7)[:8, [0, 2, 4]].reshape(24, 2, 4, 4))


def first_batch(reader: Reader) -> dict[str, torch.Tensor]:
    stream = Stream(reader, Order(reader.windows.samples, reader.windows.group, 2, 0, shuffle=False), Share(4))
    try:
        return next(iter(stream))
    finally:
        stream.close()


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "truncated":
        data = data[:100]
    else:
        data[5] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("how", ["corrupt", "truncated", "missing"])
def test_a_damaged_local_shard_is_named(tmp_path: Path, how: str) -> None:
    write_fields(str(tmp_path))
    damage(shard_file(str(tmp_path)), how)
    with pytest.raises(DataError, match=r"fields/c/0/0/0/0/0") as caught:
        first_batch(fields_reader(str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_a_damaged_remote_shard_is_read_twice_then_named(memory: str, tmp_path: Path) -> None:
    write_fields(memory)
    path = Dataset.open(memory).main.shard_path(0)
    data = bytearray(Store(memory).read(path))
    data[5] ^= 4
    Store(memory).write(path, bytes(data))
    for cache in (None, ShardCache(str(tmp_path), 1 << 20)):
        reader = fields_reader(memory, cache)
        with pytest.raises(DataError, match=r"fields/c/0/0/0/0/0.*corrupt"):
            first_batch(reader)


@pytest.mark.parametrize("cache", [None, ShardCache, RangeCache])
@pytest.mark.parametrize(("size", "told"), [(None, "not found"), (100, "truncated")])
def test_a_remote_shard_that_is_not_whole_is_named(
    memory: str, tmp_path: Path, cache: Any, size: int | None, told: str
) -> None:
    write_fields(memory)
    reader = fields_reader(memory, cache and cache(str(tmp_path), 1 << 20))
    path = reader.windows.array.shard_path(0)
    if size is None:
        Store(memory).delete(path)
    else:
        Store(memory).write(path, Store(memory).read(path)[:size])
    for wait in (False, True):
        with pytest.raises(
            DataError, match=rf"^{memory}/{path}: {told}.* but the manifest lists it; .*keel data check"
        ):
            reader.batch(np.arange(4), wait)
    assert torch.isfinite(reader.batch(np.arange(9, 12))["fields"]).all()  # of the next shard


def test_one_bad_answer_is_read_again(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fields(memory)
    reader, faults = fields_reader(memory), [1]
    original = Store.read_ranges

    def flaky(self: Store, requests: Any, sinks: Any, tags: Any) -> list[bytes]:
        if faults.pop() if faults else False:
            sinks = [flipping(sinks[0], requests[0][2] - requests[0][1] - 1), *sinks[1:]]
        return original(self, requests, sinks, tags)

    monkeypatch.setattr(Store, "read_ranges", flaky)
    batch = reader.batch(np.arange(4))
    assert np.array_equal(batch["fields"][0].numpy(), field_values(10, 7)[0, :3])
    assert faults == []


def test_a_cached_copy_that_rots_is_fetched_again(memory: str, tmp_path: Path) -> None:
    write_fields(memory)
    expected = fields_reader(memory).batch(np.arange(24))["fields"]
    cache = ShardCache(str(tmp_path), 1 << 20)
    reader = fields_reader(memory, cache)
    assert torch.equal(reader.batch(np.arange(24))["fields"], expected)
    assert reader.metrics.misses == 3
    copies = [p for p in tmp_path.rglob("fields*") if p.is_file()]
    assert len(copies) == 3
    damage(copies[0], "corrupt")
    before = reader.metrics.misses
    reader = fields_reader(memory, cache)
    assert torch.equal(reader.batch(np.arange(24))["fields"], expected)
    assert (reader.metrics.misses, before) == (1, 3)


def test_a_cache_with_no_room_reads_ranges(memory: str, tmp_path: Path) -> None:
    write_fields(memory)
    reader = fields_reader(memory, ShardCache(str(tmp_path), 10))
    assert torch.equal(reader.batch(np.arange(24))["fields"], fields_reader(memory).batch(np.arange(24))["fields"])
    assert reader.metrics.misses == 0 and reader.metrics.fetched > 0


def test_a_batch_gets_its_memory_when_its_shards_are_there(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_fields(memory)
    expected = fields_reader(memory).batch(np.arange(24))["fields"]
    happened: list[str] = []
    target, open_shard = Reader.target, ShardCache.open
    monkeypatch.setattr(Reader, "target", lambda self, rows: happened.append("memory") or target(self, rows))

    def opened(self: ShardCache, *given: Any) -> tuple[int | None, int]:
        found = open_shard(self, *given)
        happened.append(f"shard of {found[1]}")
        return found

    monkeypatch.setattr(ShardCache, "open", opened)
    reader = fields_reader(memory, ShardCache(str(tmp_path), 1 << 20))
    sizes = list(reader.shard_sizes(np.arange(24)).values())
    assert torch.equal(reader.batch(np.arange(24))["fields"], expected)
    assert happened == [*(f"shard of {size}" for size in sizes), "memory"]
    monkeypatch.setattr(files, "OPEN_SECONDS", 0.0)  # as if each download took longer
    small = fields_reader(memory, ShardCache(str(tmp_path / "small"), sum(sizes) - 1))
    assert torch.equal(small.batch(np.arange(24))["fields"], expected)
    assert small.metrics.misses == 3  # not once to have them and once more to read them


def test_shards_of_samples_are_all_that_their_windows_touch(tmp_path: Path) -> None:
    write_text(str(tmp_path), 100, 10, 5)
    dataset = Dataset.open(str(tmp_path))
    reader = Reader(dataset, TokenWindows(dataset.main, 0, 100, 34), None, Metrics())
    assert [int(path.split("/")[-1]) for path in reader.shard_sizes(np.array([1, 0]))] == [0, 1, 2, 3, 4, 5, 6]
    assert [int(path.split("/")[-1]) for path in reader.shard_sizes(np.array([0]))] == [0, 1, 2, 3]


@pytest.mark.parametrize("level", [None, 1])
def test_second_epoch_from_the_cache_fetches_nothing(memory: str, tmp_path: Path, level: int | None) -> None:
    write_fields(memory, level=level)
    cache, later = ShardCache(str(tmp_path), 1 << 20), fields_reader(memory, ShardCache(str(tmp_path), 1 << 20))
    reader = fields_reader(memory, cache)
    stream = Stream(reader, Order(24, reader.windows.group, 2, 1), Share(8, 4), read_ahead=0)
    batches = iter(stream)
    first = [next(batches) for _ in range(6)]
    fetched, objects = reader.metrics.fetched, Dataset.open(memory).objects
    assert fetched == sum(
        info.size for path, info in objects.items() if "/c/" in path and not path.endswith("c/3/0/0/0/0")
    )
    second = [next(batches) for _ in range(6)]
    assert reader.metrics.fetched == fetched
    assert sorted(torch.cat([b["index"] for b in first]).tolist()) == sorted(
        torch.cat([b["index"] for b in second]).tolist()
    )
    Store(memory).delete_tree()  # whoever comes later needs nothing but the cache
    assert torch.equal(later.batch(first[0]["index"].numpy())["fields"], first[0]["fields"])
    shards = len(later.shard_sizes(first[0]["index"].numpy()))
    assert (later.metrics.fetched, later.metrics.hits, later.metrics.misses) == (0, shards, 0)
    assert (reader.metrics.hits, reader.metrics.misses) == (0, 3)  # and kept open


def test_indices_count_as_fetched(memory: str) -> None:
    write_fields(memory, level=1)
    reader = fields_reader(memory)
    reader.batch(np.arange(9))  # one shard
    read, index = reader.metrics.fetched, reader.windows.array.spec.index_bytes
    reader.batch(np.arange(9))
    assert reader.metrics.fetched == 2 * read - index


def test_used_counts_what_is_stored(memory: str) -> None:
    write_text(memory)  # one byte a token, eight in a batch
    dataset = Dataset.open(memory)
    reader = Reader(dataset, TokenWindows(dataset.main, 0, 4000, 127), None, Metrics())
    assert reader.batch(np.arange(8))["tokens"].nbytes == 8 * 128 * 8
    assert reader.metrics.used == 8 * 128


def test_indices_of_compressed_shards_are_read_together(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fields(memory, level=1)
    reader = fields_reader(memory)
    original, together = Array._read_index, threading.Barrier(3)

    def waiting(self: Array, path: str) -> Any:
        together.wait(10)  # broken unless the indices of all three shards are on their way at once
        return original(self, path)

    monkeypatch.setattr(Array, "_read_index", waiting)
    batch = reader.batch(np.arange(24))
    assert np.array_equal(batch["fields"][:, 0].numpy(), field_values(10, 7)[:8, [0, 2, 4]].reshape(24, 2, 4, 4))

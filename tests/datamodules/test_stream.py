"""Streams: one global order, shared out exactly among any number of ranks, at any point."""

from __future__ import annotations

import gc
import itertools
import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.format import DataError
from datamodules.stream import state as stream_state
from datamodules.stream.metrics import Metrics
from datamodules.stream.order import Order
from datamodules.stream.stream import FiniteStream, Share, Stream, even_batches, spread

from .samples import fields_reader, stream_threads, write_fields


@settings(max_examples=80, deadline=None)
@given(
    world=st.sampled_from([1, 2, 3, 4, 8]),
    per_micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    start=st.integers(0, 10**12),
    steps=st.integers(1, 5),
)
def test_ranks_partition_each_global_batch(
    world: int, per_micro: int, accumulation: int, start: int, steps: int
) -> None:
    batch = world * per_micro * accumulation
    parts = [Share(batch, per_micro, world, rank).positions(start, steps) for rank in range(world)]
    assert all(part.shape == (steps * accumulation, per_micro) for part in parts)
    together = np.concatenate([part.reshape(steps, -1) for part in parts], axis=1)
    assert np.array_equal(together.reshape(-1), start + np.arange(steps * batch))


def test_share_names_valid_numbers() -> None:
    with pytest.raises(ValueError, match=r"global_batch=16 .* world_size=3 .* 15 or 18"):
        Share(16, 0, 3, 0)
    with pytest.raises(ValueError, match=r"global_batch=2 .* world_size=3 .* 3$"):
        Share(2, 0, 3, 0)
    with pytest.raises(ValueError, match=r"micro_batch=3 does not divide the 8 .* valid: 1, 2, 4, 8"):
        Share(16, 3, 2, 0)
    with pytest.raises(ValueError, match="rank=2"):
        Share(4, 0, 2, 2)
    assert Share(16, 0, 2, 1).micro == 8 and Share(16, 2, 2, 1).accumulation == 4


class Recorder:
    """Stands in for a reader: gives back what was asked for."""

    def __init__(self, samples: int, group: int) -> None:
        self.metrics, self.sample_bytes, self.caches, self.joins = Metrics(), 8, 0, True
        self.windows = type("W", (), {"samples": samples, "group": group})()

    def batch(self, ids: np.ndarray, wait: bool = True) -> dict[str, torch.Tensor]:
        return {"index": torch.from_numpy(np.array(ids))}


def consumed(order: Order, world: int, batch: int, micro: int, start: int, steps: int) -> list[int]:
    """Sample ids that all ranks of a run read in ``steps`` global batches from ``start``, in global order."""
    rows = []
    for rank in range(world):
        share = Share(batch, micro, world, rank)
        stream = Stream(Recorder(order.n, order.group), order, share, lambda: start, read_ahead=2)  # type: ignore[arg-type]
        taken = list(itertools.islice(stream, steps * share.accumulation))
        rows.append(torch.cat([b["index"] for b in taken]).reshape(steps, share.local))
        stream.close()
    return torch.cat(rows, dim=1).reshape(-1).tolist()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(5, 90),
    group=st.integers(1, 20),
    window=st.integers(1, 5),
    seed=st.integers(0, 1 << 30),
    data=st.data(),
)
def test_any_resume_on_any_world_size_continues_exactly(
    n: int, group: int, window: int, seed: int, data: st.DataObject
) -> None:
    """Nothing lost, nothing repeated, one global order, whatever the sequence of world sizes."""
    order, batch, position = Order(n, group, window, seed), 24, 0
    read: list[int] = []
    for _ in range(data.draw(st.integers(1, 4))):
        world = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
        micro = data.draw(st.sampled_from([m for m in (0, 1, 3, 12) if m == 0 or 24 // world % m == 0]))
        steps = data.draw(st.integers(1, 4))
        position = stream_state.restore(stream_state.save("f", order, position), "f", order)
        read += consumed(order, world, batch, micro, position, steps)
        position += steps * batch
    assert read == order.at(np.arange(position)).tolist()
    for epoch in range(len(read) // n):
        assert sorted(read[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_state_is_small_and_refuses_another_order() -> None:
    order = Order(100, 10, 3, 7)
    state = stream_state.save("abc", order, 1234)
    assert (state["epoch"], state["position"], state["fingerprint"], state["seed"]) == (12, 34, "abc", 7)
    assert stream_state.restore(state, "abc", order) == 1234
    with pytest.raises(DataError, match="fingerprint is other, but the saved state has abc"):
        stream_state.restore(state, "other", order)
    for other, name in (
        (Order(100, 10, 3, 8), "seed"),
        (Order(101, 10, 3, 7), "samples"),
        (Order(100, 5, 3, 7), "group"),
        (Order(100, 10, 4, 7), "window"),
    ):
        with pytest.raises(DataError, match=f"{name} is"):
            stream_state.restore(state, "abc", other)
    with pytest.raises(DataError, match="no 'seed'"):
        stream_state.restore({k: v for k, v in state.items() if k != "seed"}, "abc", order)
    with pytest.raises(DataError, match="damaged"):
        stream_state.restore({**state, "position": 100}, "abc", order)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(1, 200), batch=st.integers(1, 20), world=st.sampled_from([1, 2, 3, 4, 8]), limit=st.integers(0, 60)
)
def test_even_batches_hold_every_id_once(n: int, batch: int, world: int, limit: int) -> None:
    ids = spread(n, limit)
    assert len(ids) == (min(n, limit) if limit else n) and len(set(ids.tolist())) == len(ids)
    if len(ids) < world:
        with pytest.raises(ValueError, match=f"{len(ids)} samples are fewer than the {world} ranks"):
            even_batches(ids, batch, world, 0)
        return
    parts = [even_batches(ids, batch, world, rank) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    sizes = [len(b) for part in parts for b in part]
    assert min(sizes) >= 1 and max(sizes) <= max(batch, 2)
    assert [i for part in parts for b in part for i in b] == ids.tolist()


def test_spread_reaches_over_the_whole_split() -> None:
    assert spread(100, 4).tolist() == [0, 25, 50, 75]
    assert spread(3, 0).tolist() == [0, 1, 2] == spread(3, 9).tolist()


def test_threads_end_when_the_consumer_forgets(tmp_path: Path) -> None:
    write_fields(str(tmp_path))
    reader = fields_reader(str(tmp_path))
    order = Order(reader.windows.samples, reader.windows.group, 2, 0)
    stream = Stream(reader, order, Share(4))
    iterator = iter(stream)
    next(iterator)
    assert stream_threads() > 0
    del iterator
    gc.collect()
    assert stream_threads() == 0
    for _ in stream:
        break
    iterator = iter(stream)
    next(iterator)
    stream.close()
    assert stream_threads() == 0
    copy = pickle.loads(pickle.dumps(stream))
    assert torch.equal(next(iter(copy))["fields"], next(iter(stream))["fields"])
    copy.close()
    stream.close()


def test_read_ahead_changes_nothing_but_time(tmp_path: Path) -> None:
    write_fields(str(tmp_path))
    rows = []
    for options in ({"read_ahead": 0}, {"read_ahead": 5, "threads": 3}, {"read_ahead": 9, "read_ahead_bytes": 1}):
        reader = fields_reader(str(tmp_path))
        order = Order(reader.windows.samples, reader.windows.group, 2, 5)
        batches = list(itertools.islice(Stream(reader, order, Share(8, 4), **options), 14))  # type: ignore[arg-type]
        rows.append((torch.cat([b["index"] for b in batches]), torch.cat([b["fields"] for b in batches])))
        assert reader.metrics.samples >= 56 and reader.metrics.wait > 0
    for index, fields in rows[1:]:
        assert torch.equal(index, rows[0][0]) and torch.equal(fields, rows[0][1])
    assert sorted(rows[0][0][:24].tolist()) == list(range(24))  # an epoch, in batches that straddle its end


class Slow(Recorder):
    """Counts the samples that it gave, and takes some time."""

    given, lock, seconds = 0, threading.Lock(), 0.01

    def batch(self, ids: np.ndarray, wait: bool = True) -> dict[str, torch.Tensor]:
        time.sleep(self.seconds)
        with self.lock:
            self.given += len(ids)
        return super().batch(ids, wait)


@pytest.mark.parametrize(
    ("fit", "joins", "most"), [(5, True, 5), (5, False, 5), (1, True, 1), (1000, True, 9 * 16 + 15)]
)
def test_micro_batches_held_ahead_are_bounded_in_bytes(fit: int, joins: bool, most: int) -> None:
    source = Slow(240, 24)
    source.joins = joins
    options = {"read_ahead": 9, "read_ahead_bytes": fit * 4 * source.sample_bytes}
    stream = Stream(source, Order(240, 24, 2, 5), Share(8, 4), **options)  # type: ignore[arg-type]
    held, expected = [], Order(240, 24, 2, 5).at(np.arange(60 * 4)).reshape(60, 4)
    for taken, batch in enumerate(itertools.islice(stream, 60)):
        assert batch["index"].tolist() == expected[taken].tolist()
        before = -1
        while taken in (1, 4, 17) and before != source.given:  # until no more is read
            before = source.given
            time.sleep(0.08)
        held.append(source.given // 4 - taken - 1)
    stream.close()
    assert max(held) == most
    assert source.metrics.batches >= 60


@pytest.mark.parametrize("threads", [0, 2])
def test_waiting_is_what_the_consumer_waits(threads: int) -> None:
    """All of the reading without threads, and next to nothing for a consumer that takes longer than it."""
    source = Slow(64, 8)
    source.joins, source.seconds = False, 0.03
    stream = Stream(source, Order(64, 8, 2, 5), Share(4), read_ahead=2 if threads else 0, threads=threads)  # type: ignore[arg-type]
    batches = iter(stream)
    next(batches)
    before = source.metrics.wait
    for _ in range(8):
        time.sleep(0.06 if threads else 0)
        next(batches)
    waited = source.metrics.wait - before
    stream.close()
    assert waited < 0.15 if threads else waited >= 0.24


def test_micro_batches_of_one_read_may_be_changed_in_place(tmp_path: Path) -> None:
    """Also by what is differentiated, and without a trace in the others."""
    write_fields(str(tmp_path))
    reader, plain = fields_reader(str(tmp_path)), fields_reader(str(tmp_path))
    stream = Stream(reader, Order(24, reader.windows.group, 2, 5), Share(4), read_ahead=4)
    batches = list(itertools.islice(stream, 4))
    stream.close()
    assert batches[1]["fields"].untyped_storage().data_ptr() == batches[2]["fields"].untyped_storage().data_ptr()
    scale = torch.tensor(2.0, requires_grad=True)
    kept = batches[1]["fields"].clone()
    loss = (scale * batches[1]["fields"]).sum()
    batches[2]["fields"] *= scale
    loss.backward()
    assert scale.grad is not None and torch.isclose(scale.grad, kept.sum())
    assert torch.equal(batches[1]["fields"], kept)
    assert torch.equal(batches[3]["fields"], plain.batch(batches[3]["index"].numpy())["fields"])


def test_finite_stream_has_a_length_and_ends(tmp_path: Path) -> None:
    write_fields(str(tmp_path))
    reader = fields_reader(str(tmp_path))
    stream = FiniteStream(reader, even_batches(spread(24, 10), 4, 1, 0))
    assert len(stream) == 3
    for _ in range(2):
        assert torch.cat([b["index"] for b in stream]).tolist() == spread(24, 10).tolist()

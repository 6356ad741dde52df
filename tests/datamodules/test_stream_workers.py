"""One order for any number of ranks and of worker processes, and resumption from each to any other."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from datamodules.data import FieldsConfig, FieldsData, TextConfig, TextData
from datamodules.loader import StreamingDataset
from datamodules.mixture import MixtureConfig, MixtureData
from datamodules.module import StreamingDataModule
from datamodules.store import Store
from datamodules.stream.metrics import Metrics

from .samples import field_values, token_values, write_fields, write_text

BATCH = 24
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
WORLDS = [1, 2, 3, 4, 8]


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("fields"))
    write_fields(url, trajectories=13, per_shard=4, splits={"train": [0, 10], "validation": [10, 13]})
    return url


def fields_data(url: str, world: int, rank: int, micro: int = 0, **config: Any) -> FieldsData:
    given = {"url": url, "frames": 3, "window_shards": 2, **config}
    data = FieldsData(FieldsConfig(**given), global_batch=BATCH, micro_batch=micro, seed=3)
    data.configure(world, rank)
    return data


def taken(stream: Any, workers: int, count: int, how: str = "fork") -> list[dict[str, torch.Tensor]]:
    options: dict[str, Any] = {"multiprocessing_context": how} if workers else {}
    loader = iter(DataLoader(stream, batch_size=None, num_workers=workers, **options))
    found = list(itertools.islice(loader, count))
    del loader
    stream.close()
    return found


class Kind(NamedTuple):
    """What is streamed, and the samples that it has by id, as the batches' entry `name`."""

    url: str
    config: dict[str, Any]
    samples: np.ndarray
    name: str = "fields"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Kind]]]:
    """Several kinds of samples, on disk and in memory, the simplest remote store."""
    memory = Store("memory://keel-tests/workers")
    memory.delete_tree()
    splits = {"train": [0, 10], "validation": [10, 13]}
    values = field_values(13, 7)
    windows = np.stack([values[i // 5, i % 5 : i % 5 + 3] for i in range(50)])
    apart = [(i, i + lead) for lead in range(1, 7) for i in range(7 - lead)]
    pairs = np.stack([values[t, list(pair)] for t in range(10) for pair in apart])
    sequences = np.lib.stride_tricks.sliding_window_view(token_values(1200)[:960], 33)[::32].astype(np.int64)
    found: dict[str, list[Kind]] = {}
    for place, base in (("local", str(tmp_path_factory.mktemp("kinds"))), ("remote", memory.url)):
        plain, packed = f"{base}/plain", f"{base}/packed"
        write_fields(plain, trajectories=13, per_shard=4, splits=splits)
        write_fields(packed, trajectories=13, per_shard=4, splits=splits, level=1)
        text = f"{base}/text"
        write_text(text, tokens=1200, per_shard=256, chunk=64, separator=7)
        sources = [{"url": plain, "weight": 3, "window_shards": 2}, {"url": packed, "window_shards": 2}]
        found[place] = [
            Kind(plain, {"frames": 3}, windows),
            Kind(packed, {"frames": 3}, windows),
            Kind(plain, {"pairs": True}, pairs),
            Kind("", {"sources": sources}, np.concatenate([windows, windows])),
            Kind(text, {"seq_len": 32, "documents": True}, sequences, "tokens"),
        ]
    yield found
    memory.delete_tree()


def data_of(kind: Kind, world: int, rank: int, micro: int = 0, **config: Any) -> StreamingDataModule:
    sizes: dict[str, int] = {"global_batch": BATCH, "micro_batch": micro, "seed": 3}
    data: StreamingDataModule
    if "sources" in kind.config:
        sources = [{**source, **config} for source in kind.config["sources"]]
        data = MixtureData(MixtureConfig(sources=sources), **sizes, overrides={"frames": 3})
    else:
        given = {"url": kind.url, "window_shards": 2, **kind.config, **config}
        if kind.name == "tokens":
            data = TextData(TextConfig(**given), **sizes)
            data.configure(world, rank)
            return data
        data = FieldsData(FieldsConfig(**given), **sizes)
    data.configure(world, rank)
    return data


def legs() -> st.SearchStrategy[list[tuple[int, int, int, int]]]:
    """World size, workers, micro-batch and global batches of each part of a run."""
    leg = st.tuples(st.sampled_from(WORLDS), st.integers(0, 4), st.sampled_from([0, 1, 3]), st.integers(1, 3))
    return st.lists(leg, min_size=1, max_size=3)


@settings(max_examples=18, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(legs=legs(), source=st.sampled_from(["local", "cached", "ranges"]), which=st.integers(0, 4))
@example(legs=[(2, 2, 3, 1), (4, 1, 0, 1)], source="cached", which=3)
@example(legs=[(2, 2, 1, 2), (3, 0, 1, 2)], source="ranges", which=4)
def test_any_world_and_workers_resume_from_any_other(
    kinds: dict[str, list[Kind]],
    tmp_path_factory: pytest.TempPathFactory,
    legs: list[tuple[int, int, int, int]],
    source: str,
    which: int,
) -> None:
    """The first two ranks have worker processes; the split among ranks is the same arithmetic for all."""
    kind = kinds["local" if source == "local" else "remote"][which]
    config: dict[str, Any] = {"fetch": "ranges"} if source == "ranges" else {}
    if source == "cached":
        config = {"fetch": "shards", "cache": str(tmp_path_factory.mktemp("cache"))}
    state: dict[str, Any] | None = None
    read: list[int] = []
    for world, workers, micro, steps in legs:
        rows, micro = [], micro if BATCH // world % max(1, micro) == 0 else 0
        for rank in range(world):
            data = data_of(kind, world, rank, micro, **config)
            if state:
                data.load_state_dict(state)
            batches = taken(data.train_dataloader(), workers if rank < 2 else 0, steps * data.share.accumulation)
            for batch in batches:
                samples = kind.samples[batch["index"].numpy()]
                assert np.array_equal(batch[kind.name].numpy(), samples)
                if kind.name == "tokens":
                    documents = np.cumsum(samples[:, :-1] == 7, 1)
                    assert np.array_equal(batch["document"].numpy()[:, 1:], documents)
            rows.append(torch.cat([b["index"] for b in batches]).reshape(steps, -1))
            data.advance(BATCH * steps)
            last = data.state_dict()
        state = last
        read += torch.cat(rows, dim=1).reshape(-1).tolist()
    assert read == data_of(kind, 1, 0).order.at(np.arange(len(read))).tolist()


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_workers_bring_the_same_batches(fields: str, workers: int) -> None:
    values = field_values(13, 7)
    data = fields_data(fields, 1, 0, micro=8)
    found = taken(data.train_dataloader(), workers, 13)
    for batch in found:
        for row, i in zip(batch["fields"].numpy(), batch["index"].tolist(), strict=True):
            assert np.array_equal(row, values[i // 5, i % 5 : i % 5 + 3])
    assert torch.cat([b["index"] for b in found]).tolist() == data.order.at(np.arange(13 * 8)).tolist()
    held_out = DataLoader(data.val_dataloader(), batch_size=None, num_workers=workers)
    assert torch.cat([b["index"] for b in held_out]).tolist() == list(range(15))
    data.teardown()


def named_shared_memory(processes: list[int]) -> set[str]:
    """Names below /dev/shm that these processes have open or mapped: what would stay behind if all were killed now."""
    found: set[str] = set()
    for process in processes:
        with suppress(FileNotFoundError, ProcessLookupError):  # gone meanwhile
            found |= {
                line.split(None, 5)[-1].strip() for line in Path(f"/proc/{process}/maps").read_text().splitlines()
            }
            for entry in Path(f"/proc/{process}/fd").iterdir():
                with suppress(FileNotFoundError):
                    found.add(os.readlink(entry))
    return {name for name in found if name.startswith("/dev/shm/") and not name.endswith(" (deleted)")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_shared_with_workers_has_no_name_that_a_kill_could_leave(fields: str) -> None:
    """Batches of worker processes pass through memory without a name, so that no kill can leave any behind."""
    data = fields_data(fields, 1, 0, micro=8)
    loader = iter(DataLoader(data.train_dataloader(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    held = [next(loader) for _ in range(3)]
    assert all(batch["fields"].is_shared() for batch in held)
    processes = [os.getpid(), *(worker.pid for worker in loader._workers)]  # type: ignore[attr-defined]
    assert named_shared_memory(processes) == set()
    del loader
    assert named_shared_memory([os.getpid()]) == set()
    data.teardown()


def test_forked_workers_after_the_parent_has_read(s3: Any, tmp_path: Any) -> None:
    """A client, a lock or a file inherited over the fork would stall or corrupt; each process makes its own."""
    url = s3.url("data")
    write_fields(url, trajectories=13)
    for how, config in (("fork", {"cache": str(tmp_path)}), ("spawn", {"fetch": "ranges"})):
        data = fields_data(url, 1, 0, micro=8, **config)
        stream = data.train_dataloader()
        running = iter(stream)
        first = next(running)  # its threads go on reading while the workers fork
        found = taken(stream, 2, 6, how)
        assert torch.equal(found[0]["fields"], first["fields"])
        assert torch.cat([b["index"] for b in found]).tolist() == data.order.at(np.arange(48)).tolist()
        data.teardown()
    assert not multiprocessing.active_children()


def test_plain_iterable(fields: str) -> None:
    stream = StreamingDataset(fields, global_batch=BATCH, world_size=2, rank=1, seed=3, frames=3, window_shards=2)
    order = fields_data(fields, 1, 0).order
    for batch in itertools.islice(DataLoader(stream, batch_size=None, num_workers=2), 2):
        assert batch["fields"].shape == (12, 3, 2, 4, 4)
        stream.advance()
    state = stream.state_dict()
    assert (state["epoch"], state["position"]) == (0, 48)
    again = StreamingDataset(fields, global_batch=BATCH, seed=3, frames=3, window_shards=2)
    again.load_state_dict(state)
    assert next(iter(again))["index"].tolist() == order.at(48 + np.arange(BATCH)).tolist()
    assert len(list(again.validation(batch=4))) == 4
    again.close()
    stream.close()
    with pytest.raises(ValueError, match="frame: no such field of FieldsConfig"):
        StreamingDataset(fields, global_batch=4, frame=3)
    assert Store(fields).is_local


def test_plain_iterable_of_a_mixture(fields: str) -> None:
    sources = [{"url": fields, "frames": 3}, {"url": fields, "frames": 3, "weight": 3.0}]
    stream = StreamingDataset(kind="mixture", sources=sources, global_batch=8, seed=3)
    taken_from = torch.cat([batch["source"] for batch in itertools.islice(stream, 4)])
    assert taken_from.bincount().tolist() == [8, 24]
    stream.close()
    with pytest.raises(ValueError, match="url"):
        StreamingDataset(global_batch=8)
    with pytest.raises(ValueError, match="url: no such field of MixtureConfig"):
        StreamingDataset(fields, kind="mixture", sources=sources, global_batch=8)


def test_a_lock_held_at_the_fork_stalls_no_worker(fields: str) -> None:
    data = fields_data(fields, 1, 0)
    with data.metrics._lock:  # as by a thread that is counting
        copied: list[Any] = []
        copy = threading.Thread(target=lambda: copied.append(pickle.loads(pickle.dumps(data.metrics))), daemon=True)
        copy.start()
        copy.join(20)
        assert not copy.is_alive() and copied[0].snapshot()["batches"] == 0
        loader = DataLoader(data.train_dataloader(), batch_size=None, num_workers=1, timeout=20)
        assert next(iter(loader))["index"].tolist() == data.order.at(np.arange(BATCH)).tolist()
    data.teardown()


@pytest.mark.parametrize(("workers", "how"), [(0, ""), (3, "fork"), (1, "spawn")])
def test_metrics_count_what_workers_read(fields: str, workers: int, how: str) -> None:
    data = fields_data(fields, 1, 0, micro=8)
    taken(data.val_dataloader(), workers, 99, how)  # reads the two batches that there are and no more
    found = data.metrics.snapshot()
    assert (found["batches"], found["samples"]) == (2, 15)
    assert found["used"] == 15 * 3 * 2 * 16 * 4 and found["fetched"] == 15 * 3 * (2 * 16 * 4 + 4)
    taken(data.val_dataloader(), 0, 99)
    assert data.metrics.snapshot()["samples"] == 30 == data.metrics.samples


def test_metrics_that_nobody_asks_for_wait(fields: str) -> None:
    """A pipe that is full stalls no worker, and what did not fit comes later."""
    parent, child = Metrics(), Metrics()
    child.report_to(parent)
    for _ in range(3000):
        child.add(samples=2, fetched=1 << 40)
    held = parent.snapshot()["samples"]
    assert 0 < held < 6000
    child.add(batches=1)
    assert parent.snapshot() == {**child.snapshot(), "wait": 0.0} and parent.fetched == 3000 << 40
    del parent
    child.add(samples=1)
    assert child.snapshot()["samples"] == 6001

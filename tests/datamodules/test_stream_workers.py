"""One order for any number of ranks and of worker processes, and resumption from each to any other."""

from __future__ import annotations

import itertools
import multiprocessing
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from datamodules.data import FieldsConfig, FieldsData
from datamodules.loader import StreamingDataset
from datamodules.store import Store

from .samples import field_values, write_fields

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


def legs() -> st.SearchStrategy[list[tuple[int, int, int, int]]]:
    """World size, workers, micro-batch and global batches of each part of a run."""
    leg = st.tuples(st.sampled_from(WORLDS), st.integers(0, 4), st.sampled_from([0, 1, 3]), st.integers(1, 3))
    return st.lists(leg, min_size=1, max_size=3)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(legs=legs())
def test_any_world_and_workers_resume_from_any_other(fields: str, legs: list[tuple[int, int, int, int]]) -> None:
    """Worker processes are started on one rank, drawn by the leg; the split among ranks is the same arithmetic for all."""
    state: dict[str, Any] | None = None
    read: list[int] = []
    for world, workers, micro, steps in legs:
        rows, micro = [], micro if BATCH // world % max(1, micro) == 0 else 0
        for rank in range(world):
            data = fields_data(fields, world, rank, micro)
            if state:
                data.load_state_dict(state)
            used = workers if rank == (workers + steps) % world else 0
            batches = taken(data.train_dataloader(), used, steps * data.share.accumulation)
            rows.append(torch.cat([b["index"] for b in batches]).reshape(steps, -1))
            data.advance(BATCH * steps)
            last = data.state_dict()
        state = last
        read += torch.cat(rows, dim=1).reshape(-1).tolist()
    assert read == fields_data(fields, 1, 0).order.at(np.arange(len(read))).tolist()


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

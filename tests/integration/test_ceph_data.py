"""Data sets on Ceph: made, checked, streamed as from a local disk, and trained on."""

from __future__ import annotations

import itertools
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from fsspec.config import conf

from datamodules.data import FieldsConfig, FieldsData, TextConfig, TextData
from datamodules.format import DataError, Dataset
from datamodules.format.verify import verify
from datamodules.store import Store
from tests.conftest import CephServer
from tests.datamodules.samples import fields_reader, replace_shard, write_fields, write_text
from tests.helpers.runs import fno_config, tiny_fields


def batches(url: str, kind: str, count: int, **config: object) -> list[tuple[list[int], bytes]]:
    """The first samples of the stream: their ids and bytes."""
    common = {"url": url, "window_shards": 2, **config}
    data = (
        FieldsData(FieldsConfig(**common, frames=3), global_batch=4, seed=3)
        if kind == "fields"
        else TextData(TextConfig(**common, seq_len=50), global_batch=4, seed=3)
    )
    try:
        found = list(itertools.islice(data.train_dataloader(), count))
        key = "fields" if kind == "fields" else "tokens"
        return [(batch["index"].tolist(), batch[key].numpy().tobytes()) for batch in found]
    finally:
        data.teardown()


@pytest.mark.parametrize("kind", ["fields", "text"])
def test_streamed_as_from_the_local_disk(ceph: CephServer, tmp_path: Path, kind: str) -> None:
    write = write_fields if kind == "fields" else write_text
    here, there = str(tmp_path / "data"), ceph.url("data")
    assert write(here) == write(there)  # fingerprints
    assert verify(there) == []
    expected = batches(here, kind, 20)
    assert batches(there, kind, 20, cache=str(tmp_path / "cache")) == expected
    assert batches(there, kind, 20, cache=str(tmp_path / "cache")) == expected  # out of the cache
    assert batches(there, kind, 20, cache_bytes=0) == expected  # byte ranges


def test_damage_is_named(ceph: CephServer) -> None:
    url = ceph.url("damaged")
    write_fields(url)
    store = Store(url)
    path = Dataset.open(url).main.shard_path(1)
    content = bytearray(store.read(path))
    content[100] ^= 1
    store.write(path, bytes(content))
    assert [line for line in verify(url) if f"{url}/{path}: corrupt" in line and "chunk 0" in line]
    store.delete(path)
    assert verify(url) == [f"{url}/{path}: missing"]


@pytest.mark.parametrize("direct", [True, False])
def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(ceph: CephServer, monkeypatch, direct: bool) -> None:
    monkeypatch.setitem(conf, "keel", {"direct": direct})
    url = ceph.url("replaced")
    write_fields(url)
    reader = fields_reader(url)
    reader.batch(np.array([0]))
    path = replace_shard(url, 0)
    with pytest.raises(DataError, match=f"{url}/{path}: was replaced by another object while it was read"):
        reader.batch(np.array([1]))


def _child(url: str, queue: multiprocessing.Queue) -> None:
    queue.put(batches(url, "fields", 6, cache_bytes=0))


def test_processes_forked_after_the_store_was_used(ceph: CephServer) -> None:
    """Each opens a client and connections of its own: with those of its parent it would read answers meant for others."""
    url = ceph.url("forked")
    write_fields(url)
    expected = batches(url, "fields", 6, cache_bytes=0)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_child, args=(url, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert batches(url, "fields", 6, cache_bytes=0) == expected  # the parent reads on meanwhile
    assert [queue.get(timeout=60) for _ in children] == [expected] * 3
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_a_run_with_everything_in_the_bucket_equals_a_local_one(
    ceph: CephServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer import config as configs
    from trainer.checkpoint import committed_steps
    from trainer.lifecycle import prepare_new
    from trainer.records import read_metrics, read_record
    from trainer.run import fit

    monkeypatch.setenv("KEEL_CACHE", str(tmp_path / "cache"))
    losses = []
    for place in (str(tmp_path / "local"), ceph.url("runs")):
        data = tiny_fields(f"{place}/data", trajectories=8)
        config = configs.load(
            fno_config(f"{place}/run", data, max_steps=4) | {"strategy": {"name": "ddp"}, "checkpoint": {"every": 4}}
        )
        prepare_new(config)
        fit(config)
        store = Store(f"{place}/run")
        assert read_record(store)["status"] == "ok"
        assert committed_steps(store.sub("checkpoints"))[-1] == 4
        losses.append([row["loss"] for row in read_metrics(store) if "loss" in row])
    assert losses[0] and losses[0] == losses[1] and np.isfinite(losses[0]).all()

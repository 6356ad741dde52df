"""The data modules: specs, splits, loaders for any world size, exact resumption, and use on S3."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from datamodules import registry
from datamodules.data import FieldsConfig, FieldsData, StreamingDataModule, TextConfig, TextData
from datamodules.format import DataError, Dataset
from datamodules.store import NotFound, Store
from datamodules.stream.splits import Split

from .samples import field_values, token_values, write_fields, write_text


@pytest.fixture(scope="module")
def fields(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("fields"))
    write_fields(
        url, trajectories=13, frames=7, per_shard=4, splits={"train": [0, 10], "validation": [10, 13], "none": [13, 13]}
    )
    return url


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("text"))
    write_text(url)
    return url


def fields_data(
    url: str, world: int = 1, rank: int = 0, *, batch: int = 24, micro: int = 0, seed: int = 3, **config: Any
) -> FieldsData:
    settings = {"url": url, "frames": 3, "window_shards": 2, **config}
    data = FieldsData(FieldsConfig(**settings), global_batch=batch, micro_batch=micro, seed=seed)
    data.configure(world, rank)
    return data


def take(data: StreamingDataModule, batches: int) -> list[torch.Tensor]:
    stream = data.train_dataloader()
    found = [b["index"] for b in itertools.islice(stream, batches)]
    stream.close()
    return found


# What the data module says.


def test_spec_of_fields(fields: str) -> None:
    spec = fields_data(fields).spec()
    values = field_values(13, 7)[:10].astype(np.float64)
    assert (
        spec["kind"] == "fields" and spec["channels"] == ["c0", "c1"] and spec["space"] == [4, 4] and spec["dt"] == 0.5
    )
    np.testing.assert_allclose(spec["mean"], values.mean((0, 1, 3, 4)), rtol=1e-6)
    np.testing.assert_allclose(spec["std"], values.std((0, 1, 3, 4)), rtol=1e-5)
    assert spec["samples"] == 10 * 5 and spec["frames"] == 3
    assert spec["fingerprint"] == Dataset.open(fields).fingerprint
    assert spec["attributes"]["kind"] == "fields"


def test_spec_of_text(text: str) -> None:
    spec = TextData(TextConfig(url=text, seq_len=100), global_batch=4).spec()
    assert (spec["kind"], spec["vocab_size"], spec["seq_len"], spec["samples"]) == ("text", 256, 100, 39)


def test_registered_under_their_names() -> None:
    assert registry.lookup("data", "fields") == (FieldsConfig, FieldsData)
    assert registry.lookup("data", "text") == (TextConfig, TextData)


def test_configs_are_structured_and_strict() -> None:
    node = OmegaConf.merge(OmegaConf.structured(FieldsConfig), {"url": "x", "frames": 4})
    assert OmegaConf.to_object(node) == FieldsConfig(url="x", frames=4)
    for bad in (
        {"window_shards": 0},
        {"frames": 0},
        {"stride": 0},
        {"cache_bytes": -1},
        {"threads": -1},
        {"read_ahead": -1},
    ):
        name, value = next(iter(bad.items()))
        with pytest.raises(ValueError, match=f"{name}={value}: must be at least"):
            FieldsConfig(**{"url": "x", **bad})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="url"):
        TextConfig()
    with pytest.raises(ValueError, match="seq_len=0"):
        TextConfig(url="x", seq_len=0)


# Splits and refusals.


def test_splits_by_name_and_by_range(fields: str) -> None:
    data = fields_data(fields)
    assert data.split("train") == Split(0, 10) and data.split("2:5") == Split(2, 5)
    assert data.split("11:") == Split(11, 13) and data.split(":4") == Split(0, 4)
    for bad, message in (
        ("valid", r"no split 'valid'; it has none, train, validation"),
        ("none", "'none' is empty"),
        ("5:5", "split 5:5 is empty"),
        ("5:99", "exceeds the 13 entries"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            data.split(bad)
        assert fields in str(caught.value)


def test_refusals_are_one_clear_line(fields: str, text: str, tmp_path: Path) -> None:
    def fails(error: type[Exception], match: str, make: Any) -> None:
        with pytest.raises(error, match=match) as caught:
            make()
        assert "\n" not in str(caught.value)

    fails(
        DataError,
        f"{fields}: fields: a window of 8 frames is longer",
        lambda: fields_data(fields, frames=8).train_dataloader(),
    )
    fails(DataError, f"{text}: holds text, not fields", lambda: fields_data(text).spec())
    fails(DataError, "not a Keel data set", lambda: fields_data(str(tmp_path / "absent")).spec())
    fails(DataError, "no variable 'p'; it has fields", lambda: fields_data(fields, variable="p").spec())
    fails(ValueError, "global_batch=16 .* world_size=3 .* 15 or 18", lambda: fields_data(fields, 3, batch=16))
    fails(ValueError, "micro_batch=5 does not divide", lambda: fields_data(fields, batch=16, micro=5))
    fails(ValueError, "takes a FieldsConfig, got TextConfig", lambda: FieldsData(TextConfig(url="x"), global_batch=1))
    fails(
        ValueError,
        "frame: no such field of FieldsConfig",
        lambda: FieldsData(FieldsConfig(url="x"), global_batch=1, overrides={"frame": 2}),
    )
    fails(
        DataError,
        "'validation': 2 samples are fewer than the 8 ranks",
        lambda: fields_data(fields, 8, val_samples=2).val_dataloader(),
    )
    fails(ValueError, "samples=-1", lambda: fields_data(fields).advance(-1))
    fails(
        DataError,
        "cache_bytes=100: the shards of 2 groups in use and of as many that are read ahead need",
        lambda: _in_memory(cache_bytes=100, fetch="shards").train_dataloader(),
    )


def _in_memory(**config: Any) -> FieldsData:
    store = Store("memory://keel-data-tests")
    store.delete_tree()
    write_fields(store.url, trajectories=13)
    return fields_data(store.url, **config)


# Training order over ranks and time.


def test_batches_hold_what_their_index_says(fields: str) -> None:
    values = field_values(13, 7)
    for batch in itertools.islice(fields_data(fields, micro=8).train_dataloader(), 7):
        assert batch["fields"].shape == (8, 3, 2, 4, 4)
        for row, i in zip(batch["fields"].numpy(), batch["index"].tolist(), strict=True):
            assert np.array_equal(row, values[i // 5, i % 5 : i % 5 + 3])


def test_text_batches(text: str) -> None:
    data = TextData(TextConfig(url=text, seq_len=64), global_batch=8, seed=1)
    tokens = token_values(5000)
    for batch in itertools.islice(data.train_dataloader(), 9):
        for row, i in zip(batch["tokens"].numpy(), batch["index"].tolist(), strict=True):
            assert np.array_equal(row, tokens[64 * i : 64 * i + 65])
    data.teardown()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    worlds=st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4), steps=st.integers(1, 4), data=st.data()
)
def test_resuming_on_another_world_size_continues_exactly(
    fields: str, worlds: list[int], steps: int, data: st.DataObject
) -> None:
    state: dict[str, Any] | None = None
    read: list[int] = []
    for world in worlds:
        micro = data.draw(st.sampled_from([m for m in (0, 1, 3) if not m or 24 // world % m == 0]))
        modules = [fields_data(fields, world, rank, micro=micro) for rank in range(world)]
        rows = []
        for module in modules:
            if state:
                module.load_state_dict(state)
            rows.append(torch.cat(take(module, steps * module.share.accumulation)).reshape(steps, -1))
            for _ in range(steps):
                module.advance(24)
        states = [module.state_dict() for module in modules]
        assert all(s == states[0] for s in states)
        state = states[0]
        read += torch.cat(rows, dim=1).reshape(-1).tolist()
    assert state is not None and state["epoch"] * 50 + state["position"] == len(read)
    assert read == fields_data(fields).order.at(np.arange(len(read))).tolist()
    for epoch in range(len(read) // 50):
        assert sorted(read[50 * epoch : 50 * epoch + 50]) == list(range(50))


def test_a_loader_made_before_follows_the_position(fields: str) -> None:
    data = fields_data(fields)
    stream = data.train_dataloader()
    first = next(iter(stream))["index"]
    data.advance(24)
    second = next(iter(stream))["index"]
    assert torch.cat([first, second]).tolist() == data.order.at(np.arange(48)).tolist()
    data.load_state_dict({**data.state_dict(), "epoch": 0, "position": 0})
    assert torch.equal(next(iter(stream))["index"], first)
    data.teardown()


def test_state_of_another_run_is_refused(fields: str, text: str) -> None:
    state = fields_data(fields).state_dict()
    with pytest.raises(DataError, match="seed is 4, but the saved state has 3"):
        fields_data(fields, seed=4).load_state_dict(state)
    with pytest.raises(DataError, match="fingerprint"):
        TextData(TextConfig(url=text), global_batch=4, seed=3).load_state_dict(state)
    with pytest.raises(DataError, match="samples is 40"):
        fields_data(fields, frames=4).load_state_dict(state)
    with pytest.raises(DataError, match="window is 1"):
        fields_data(fields, window_shards=1).load_state_dict(state)


def test_seeds_and_epochs_differ(fields: str) -> None:
    a, b = (torch.cat(take(fields_data(fields, seed=seed, batch=50), 2)) for seed in (3, 4))
    assert not torch.equal(a, b) and not torch.equal(a[:50], a[50:])
    assert torch.equal(a, torch.cat(take(fields_data(fields, seed=3, batch=50), 2)))


# Validation and evaluation.


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("limit", [0, 11])
def test_validation_does_not_depend_on_the_world(fields: str, world: int, limit: int) -> None:
    loaders = [fields_data(fields, world, rank, micro=1, val_samples=limit).val_dataloader() for rank in range(world)]
    assert len({len(loader) for loader in loaders}) == 1
    ids = [i for loader in loaders for batch in loader for i in batch["index"].tolist()]
    assert ids == [k * 15 // (limit or 15) for k in range(limit or 15)]
    values = field_values(13, 7)
    first = next(iter(loaders[0]))
    assert np.array_equal(first["fields"][0].numpy(), values[10, 0:3])
    for loader in loaders:
        loader.close()


def test_evaluation_loader(fields: str) -> None:
    data = fields_data(fields)
    loader = data.evaluation_loader("validation", {"frames": 7}, batch=2)
    batches = list(loader)
    assert [b["fields"].shape[0] for b in batches] == [2, 1] and len(loader) == 2
    assert np.array_equal(torch.cat([b["fields"] for b in batches]).numpy(), field_values(13, 7)[10:13])
    assert torch.cat([b["index"] for b in data.evaluation_loader("0:10", {}, batch=4, limit=5)]).tolist() == [
        0,
        10,
        20,
        30,
        40,
    ]
    assert data.position == 0 and data.config.frames == 3


# On S3.


def test_s3_second_epoch_comes_from_the_cache(s3: Any, tmp_path: Path) -> None:
    url = s3.url("data")
    write_fields(url, trajectories=13)
    data = fields_data(url, batch=11, cache=str(tmp_path), train="0:11")
    values, stream = field_values(13, 7), iter(data.train_dataloader())
    for _ in range(5):  # 55 samples: one epoch
        batch = next(stream)
        for row, i in zip(batch["fields"].numpy(), batch["index"].tolist(), strict=True):
            assert np.array_equal(row, values[i // 5, i % 5 : i % 5 + 3])
    seen = torch.cat([next(stream)["index"] for _ in range(5)])
    assert sorted(seen.tolist()) == list(range(55))
    data.teardown()  # first: a thread that reads ahead may not have counted its download yet
    shards = [o.size for p, o in data.dataset.objects.items() if "/c/" in p and "/c/4/" not in p]
    assert data.metrics.misses == len(shards)
    # The first batches do not wait for whole shards, so what they need may come twice.
    assert sum(shards) <= data.metrics.fetched <= sum(shards) + 4 * 11 * 3 * (2 * 4 * 4 * 4 + 4)
    again = fields_data(url, batch=11, cache=str(tmp_path), train="0:11")
    assert torch.equal(torch.cat(take(again, 10)[5:]), seen)
    assert (again.metrics.fetched, again.metrics.misses) == (0, 0)

    without = fields_data(url, batch=11, cache_bytes=0, train="0:11")
    assert torch.equal(torch.cat(take(without, 10)[5:]), seen)
    assert without.metrics.fetched > 0 == without.metrics.misses


def test_s3_missing_bucket_is_told(s3: Any) -> None:
    with pytest.raises(NotFound, match="no-such-bucket"):
        fields_data("s3://no-such-bucket-here/data").spec()

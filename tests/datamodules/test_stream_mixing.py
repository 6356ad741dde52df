"""Mixtures: exact proportions, one global order for any world, and refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import registry
from datamodules.data import FieldsConfig, FieldsData
from datamodules.format import ArraySpec, DataError, write_dataset
from datamodules.mixture import MixtureConfig, MixtureData
from datamodules.stream.mixing import LONGEST, Mixture, proportions
from datamodules.stream.order import Order

from .samples import field_values, write_fields, write_text

weights_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=5)


def test_proportions_are_exact_for_decimals() -> None:
    assert proportions([0.7, 0.3]) == [7, 3] and proportions([2, 2, 4]) == [1, 1, 2]
    assert proportions([1.37, 2.91, 0.5]) == [137, 291, 50]
    assert proportions([1 / 3, 2 / 3]) == [1, 2]
    odd = proportions([0.1234567, 1.0, 3**0.5])
    shares = np.array([0.1234567, 1.0, 3**0.5]) / (1.1234567 + 3**0.5)
    assert sum(odd) == LONGEST and np.abs(np.array(odd) / LONGEST - shares).max() < 1 / LONGEST
    tiny = proportions([1e-9, 1 / 3])
    assert tiny[0] == 1 and sum(tiny) == LONGEST
    with pytest.raises(ValueError, match="weight=0"):
        proportions([1, 0])


@settings(max_examples=60, deadline=None)
@given(weights=weights_strategy, unit=st.sampled_from([1, 6]), seed=st.integers(0, 99), data=st.data())
def test_every_source_keeps_its_own_order_and_its_share(
    weights: list[int], unit: int, seed: int, data: st.DataObject
) -> None:
    """Any prefix has each source within one unit of its share times the sources, blocks exactly; each source's samples
    come in its own order, with nothing lost or repeated; and positions can be asked in any order (O(1), no history)."""
    orders = [Order(data.draw(st.integers(3, 40)), 5, 2, seed + i) for i in range(len(weights))]
    mixture = Mixture(orders, weights, unit)
    length = int(mixture.counts.sum())
    ids = mixture.at(np.arange(3 * length * unit))
    source = np.searchsorted(mixture.bases, ids, side="right") - 1
    for s, order in enumerate(orders):
        own = ids[source == s] - mixture.bases[s]
        assert np.array_equal(own, order.at(np.arange(len(own))))
        counted = np.cumsum(source[::unit] == s)
        due = np.arange(1, len(counted) + 1) * weights[s] / sum(weights)
        assert np.abs(counted - due).max() <= max(1, len(weights) - 1)
        assert np.allclose(counted[length - 1 :: length], due[length - 1 :: length])
    assert (source.reshape(-1, unit) == source.reshape(-1, unit)[:, :1]).all()
    far = data.draw(st.integers(0, 10**12))
    assert np.array_equal(mixture.at(far + np.arange(50))[::-1], mixture.at((far + np.arange(50))[::-1]))


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    found = [str(tmp_path_factory.mktemp("mix") / name) for name in "abc"]
    write_fields(found[0], trajectories=10)
    write_fields(found[1], trajectories=7, per_shard=2)
    write_fields(found[2], trajectories=5, side=8)
    return found


def mixed(
    urls: list[str], world: int = 1, rank: int = 0, batch: int = 24, unit: str = "sample", **more: Any
) -> MixtureData:
    sources = [{"url": url, "weight": w, "window_shards": 2} for url, w in zip(urls, (3, 1), strict=False)]
    data = MixtureData(
        MixtureConfig(sources=sources, unit=unit, **more), global_batch=batch, seed=5, overrides={"frames": 3}
    )
    data.configure(world, rank)
    return data


def values_of(urls: list[str], data: MixtureData, i: int) -> np.ndarray:
    base = [0, 8 * 5][i >= 40]
    values = [field_values(10, 7), field_values(7, 7)][i >= 40]
    return values[(i - base) // 5, (i - base) % 5 : (i - base) % 5 + 3]


def test_batches_hold_what_index_and_source_say(urls: list[str]) -> None:
    data = mixed(urls[:2])
    assert registry.lookup("data", "mixture") == (MixtureConfig, MixtureData)
    for batch in itertools.islice(data.train_dataloader(), 4):
        assert batch["source"].bincount().tolist() == [18, 6]  # 3 : 1 of 24
        for row, i, s in zip(batch["fields"].numpy(), batch["index"].tolist(), batch["source"].tolist(), strict=True):
            assert s == int(i >= 40) and np.array_equal(row, values_of(urls, data, i))
    data.teardown()


def test_resuming_on_other_worlds_continues_exactly(urls: list[str]) -> None:
    state, read = None, []
    for world, steps in ((1, 2), (3, 1), (8, 2), (2, 1)):
        modules = [mixed(urls[:2], world, rank) for rank in range(world)]
        rows = []
        for module in modules:
            if state:
                module.load_state_dict(state)
            stream = module.train_dataloader()
            rows.append(torch.stack([b["index"] for b in itertools.islice(stream, steps)]))
            stream.close()
            module.advance(24 * steps)
        state = modules[-1].state_dict()
        read += torch.cat(rows, dim=1).reshape(-1).tolist()
    assert read == mixed(urls[:2]).order.at(np.arange(len(read))).tolist()
    assert state is not None
    other = MixtureConfig(sources=[{"url": url, "window_shards": 2} for url in urls[:2]])
    with pytest.raises(DataError, match=r"mixture is .* weights"):
        MixtureData(other, global_batch=24, seed=5, overrides={"frames": 3}).load_state_dict(state)
    with pytest.raises(DataError, match="fingerprint"):
        mixed(urls[1::-1]).load_state_dict(state)


def test_whole_batches_of_one_source_may_differ_in_shape(urls: list[str]) -> None:
    data = mixed(urls[::2], unit="batch", batch=4)
    shapes = [tuple(b["fields"].shape) for b in itertools.islice(data.train_dataloader(), 8)]
    data.teardown()
    assert sorted(shapes) == [(4, 3, 2, 4, 4)] * 6 + [(4, 3, 2, 8, 8)] * 2
    with pytest.raises(DataError, match=r"\[3, 2, 8, 8\].*unit=batch"):
        mixed(urls[::2]).train_dataloader()


def test_validation_visits_each_source(urls: list[str]) -> None:
    for world in (1, 2):
        loaders = [mixed(urls[:2], world, rank, batch=4).val_dataloader() for rank in range(world)]
        batches = [b for loader in loaders for b in loader]
        assert sorted(torch.cat([b["index"] for b in batches]).tolist()) == list(range(10))
        assert len({len(loader) for loader in loaders}) == 1
        assert all(len(b["source"].unique()) == 1 for b in batches)
    found = [b["source"].tolist() for b in mixed(urls[:2]).evaluation_loader("test", {"frames": 7}, batch=8)]
    assert found == [[0], [1]]


def test_statistics_are_of_the_mixture(urls: list[str]) -> None:
    spec, parts = mixed(urls[:2]).spec(), [FieldsData(FieldsConfig(url=u), global_batch=1).spec() for u in urls[:2]]
    draws = [np.random.default_rng(s).normal(p["mean"][0], p["std"][0], n) for s, (p, n) in enumerate(zip(parts, (300000, 100000), strict=True))]  # fmt: skip
    together = np.concatenate(draws)
    assert spec["mean"][0] == pytest.approx(together.mean(), rel=1e-2)
    assert spec["std"][0] == pytest.approx(together.std(), rel=1e-2)
    assert spec["samples"] == 40 + 25 and spec["kind"] == "fields"


def test_refusals(urls: list[str], tmp_path: Path) -> None:
    for sources, message in (
        ([], "sources: is empty"),
        ([{"url": "x", "weight": 0}], r"sources\[0\].weight=0"),
        ([{"url": "x", "strid": 2}], r"sources\[0\].strid: no such field; did you mean 'stride'"),
        ([{"url": "x", "threads": 2}], r"sources\[0\].threads: is of the whole stream"),
        ([{"url": "x", "stride": "two"}], r"sources\[0\].stride"),
        ([{"name": "mixture"}], "do not nest"),
        ([{"weight": 1}], r"sources\[0\].url: required"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            MixtureConfig(sources=sources)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="unit='batches': unknown; use batch"):
        MixtureConfig(sources=[{"url": "x"}], unit="batches")
    write_text(str(tmp_path))
    both = MixtureConfig(sources=[{"url": urls[0]}, {"url": str(tmp_path), "name": "text"}])
    with pytest.raises(DataError, match="kind is text, but the first source has fields"):
        MixtureData(both, global_batch=4).spec()


def write_as(url: Path, dtype: str, chunk: int = 1, **parameters: str) -> str:
    """Fields 0, 1, 2, ... and parameters of given types, one number for each trajectory."""
    values: dict[str, np.ndarray] = {"fields": np.arange(6 * 4 * 2).reshape(6, 4, 1, 2) % 200}
    specs = {
        "fields": ArraySpec((6, 4, 1, 2), dtype, ("trajectory", "time", "channel", "x"), 3, chunk),
        **{name: ArraySpec((6,), kind, ("trajectory",), 6, 6) for name, kind in parameters.items()},
    }
    stored = {name: np.arange(6) + 0.5 for name in parameters} | values
    kinds = {name: spec.dtype.replace("bfloat16", "float32") for name, spec in specs.items()}
    attributes = {"kind": "fields", "array": "fields", "channels": ["u"], "splits": {"train": [0, 6]}}
    write_dataset(str(url), specs, {name: stored[name].astype(kinds[name]) for name in specs}, attributes)
    return str(url)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 2, 0, 1, 3), (1, 0, 3, 2, 4)])
def test_sources_of_other_types_and_chunks_give_the_same_numbers(tmp_path: Path, order: tuple[int, ...]) -> None:
    stored = [("float32", 1), ("int32", 1), ("bfloat16", 1), ("float32", 2), ("uint8", 4)]
    urls = [write_as(tmp_path / str(i), *stored[i]) for i in order]
    sources = [{"url": url, "weight": 1, "window_shards": 2} for url in urls]
    data = MixtureData(MixtureConfig(sources=sources), global_batch=20, seed=1, overrides={"frames": 2})
    expected = (np.arange(6 * 4 * 2).reshape(6, 4, 1, 2) % 200).astype(np.float32)
    for batch in itertools.islice(data.train_dataloader(), 6):
        assert batch["source"].bincount().tolist() == [4] * 5
        for row, i in zip(batch["fields"].numpy(), (batch["index"] % 18).tolist(), strict=True):
            assert np.array_equal(row, expected[i // 3, i % 3 : i % 3 + 2])
    data.teardown()


@pytest.mark.parametrize("unit", ["sample", "batch"])
def test_sources_must_give_the_same_entries(tmp_path: Path, unit: str) -> None:
    url = write_as(tmp_path / "a", "float32", mu="float64")
    other = write_as(tmp_path / "b", "float32", mu="float32")
    bundled = {"input_frames": 1, "output_frames": 3}
    for first, second, said in (
        (
            {"parameters": ["mu"]},
            {},
            r"has samples fields float32 \[2, 1, 2\], the first source has .*, mu float64 \[\]",
        ),
        ({}, {"parameters": ["mu"]}, r"mu float64 \[\], the first"),
        ({"pairs": True}, {}, r"lead int64"),
        (
            {"input_frames": 1},
            {"frames": 2},
            r"has samples fields .*, the first source has input float32 \[1, 1, 2\], target",
        ),
        (bundled, {"input_frames": 2, "output_frames": 2}, r"input float32 \[2, 1, 2\]"),
        ({"parameters": ["mu"]}, {"url": other, "parameters": ["mu"]}, r"mu float32 \[\], the first .* mu float64"),
    ):
        sources = [{"url": url, **first}, {"url": url, **second}]
        data = MixtureData(MixtureConfig(sources=sources, unit=unit), global_batch=2)
        with pytest.raises(DataError, match=said) as caught:
            data.train_dataloader()
        assert "\n" not in str(caught.value) and "the same inputs, pairs, parameters" in str(caught.value)
    same = [{"url": url, "parameters": ["mu"]}, {"url": url, "parameters": ["mu"]}]
    data = MixtureData(MixtureConfig(sources=same, unit=unit), global_batch=6)
    for batch in itertools.islice(data.train_dataloader(), 4):
        assert np.array_equal(batch["mu"].numpy(), batch["index"].numpy() % 18 // 3 + 0.5)
    data.teardown()


def test_documents_must_be_separated_alike(tmp_path: Path) -> None:
    for name, separator in (("a", 0), ("b", 7)):
        write_text(str(tmp_path / name), tokens=300, separator=separator)
    sources = [{"url": str(tmp_path / name), "name": "text", "seq_len": 16, "documents": True} for name in "ab"]
    with pytest.raises(DataError, match=r"mask bool \[16\] separated by 7, the first source has .* separated by 0"):
        MixtureData(MixtureConfig(sources=sources), global_batch=4).train_dataloader()

"""What a sample is: spacing, pairs, bundles, and splits by trajectory, parameter and time."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.data import FieldsConfig, FieldsData
from datamodules.format import ArraySpec, DataError, Dataset, write_dataset
from datamodules.stream import normalisation
from datamodules.stream.cache import ShardCache
from datamodules.stream.direct import Direct
from datamodules.stream.fetch import Reader
from datamodules.stream.metrics import Metrics
from datamodules.stream.splits import select
from datamodules.stream.windows import FieldWindows, Located

from .samples import field_values

N, T = 12, 9
VISCOSITY = np.array([1e-4, 5e-3, 1e-3, 2e-4, 1e-2, 3e-4, 1e-3, 9e-4, 2e-3, 1e-4, 4e-3, 1e-3])


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(str(tmp_path_factory.mktemp("parameters")))


def write(url: str, chunk: int = 1, dtype: str = "float32") -> str:
    fields = ArraySpec((N, T, 2, 4, 4), dtype, ("trajectory", "time", "channel", "y", "x"), 5, chunk)
    values = {
        "fields": field_values(N, T).astype(np.float16 if dtype != "float32" else np.float32),
        "viscosity": VISCOSITY,
        "constants": np.stack([np.arange(N), VISCOSITY], 1),
    }
    specs = {
        "fields": fields,
        "viscosity": ArraySpec((N,), "float64", ("trajectory",), 5, 5),
        "constants": ArraySpec((N, 2), "float64", ("trajectory", "column"), 5, 5, {"columns": ["k", "nu"]}),
    }
    splits = {"train": [0, 8], "validation": [8, 10], "test": [10, 12]}
    write_dataset(url, specs, values, {"kind": "fields", "array": "fields", "channels": ["a", "b"], "splits": splits})
    return url


def module(url: str, **config: Any) -> FieldsData:
    return FieldsData(FieldsConfig(**{"url": url, "window_shards": 2, **config}), global_batch=6, seed=1)


def epoch(data: FieldsData, split: str = "train") -> dict[str, torch.Tensor]:
    batches = list(data.evaluation_loader(split, batch=5))
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def test_spaced_windows_hold_every_second_frame(url: str) -> None:
    found = epoch(module(url, frames=3, dt_stride=2, stride=3))
    expected = [field_values(N, T)[t, s : s + 5 : 2] for t in range(8) for s in (0, 3)]
    assert np.array_equal(found["fields"].numpy(), np.stack(expected))


def test_pairs_are_all_pairs_once_with_their_lead(url: str) -> None:
    values = field_values(N, T)
    found = epoch(module(url, pairs=True))
    assert len(found["index"]) == 8 * T * (T - 1) // 2
    seen = set()
    for pair, lead in zip(found["fields"].numpy(), found["lead"].tolist(), strict=True):
        trajectory, i = divmod(int(pair[0].min()) // 32, T)  # values count up: 32 in a frame
        assert np.array_equal(pair[0], values[trajectory, i]) and np.array_equal(pair[1], values[trajectory, i + lead])
        seen.add((trajectory, i, i + lead))
    assert seen == {(t, i, j) for t in range(8) for i, j in itertools.combinations(range(T), 2)}
    short = epoch(module(url, pairs=True, max_lead=2))
    assert short["lead"].bincount().tolist() == [0, 8 * 8, 8 * 7]
    # An evaluation with its own window has plain rollouts.
    rollout = next(iter(module(url, pairs=True).evaluation_loader("test", {"frames": 9}, batch=2)))
    assert np.array_equal(rollout["fields"].numpy(), values[10:]) and "lead" not in rollout


def test_bundles_and_rollouts_split_into_input_and_target(url: str) -> None:
    found = epoch(module(url, input_frames=2, output_frames=3, rollout=2))
    assert found["input"].shape == (16, 2, 2, 4, 4) and found["target"].shape == (16, 6, 2, 4, 4)
    assert np.array_equal(torch.cat([found["input"], found["target"]], 1)[1].numpy(), field_values(N, T)[0, 1:9])
    assert "fields" not in found


def test_parameters_come_along(url: str) -> None:
    found = epoch(module(url, parameters=["viscosity", "constants"]))
    trajectory = found["index"].numpy() // 8
    assert np.array_equal(found["viscosity"].numpy(), VISCOSITY[trajectory])
    assert found["constants"].shape == (64, 2) and np.array_equal(found["constants"][:, 0].numpy(), trajectory)


def test_splits_combine_trajectories_parameters_and_time(url: str) -> None:
    dataset = Dataset.open(url)

    def chosen(text: str) -> list[int]:
        split = select(dataset, dataset.main, text)
        return list(range(split.first, split.last)) if split.only is None else split.only.tolist()

    assert chosen("viscosity<1e-3") == [0, 3, 5, 7, 9]
    assert chosen("train, viscosity < 1e-3") == [0, 3, 5, 7] and chosen("6:,viscosity==1e-3") == [6, 11]
    assert chosen("train, viscosity>=1e-3, viscosity<5e-3, constants.k!=2") == [6]
    data = module(url, train="train, viscosity<1e-3, frames=2:6", validation="train, frames=6:", frames=2)
    found, values = epoch(data), field_values(N, T)
    expected = [values[t, s : s + 2] for t in (0, 3, 5, 7) for s in (2, 3, 4)]
    assert np.array_equal(found["fields"].numpy(), np.stack(expected))
    assert np.array_equal(epoch(data, "validation")["fields"][0].numpy(), values[0, 6:8])
    batch = next(iter(data.train_dataloader()))
    data.teardown()
    assert np.array_equal(batch["fields"].numpy(), np.stack([expected[i] for i in batch["index"].tolist()]))


def test_refusals_name_what_is_wrong(url: str) -> None:
    for text, message in (
        ("viscosity<1e-9", "is empty: no trajectory of 0:12"),
        ("viscous<1", "no array 'viscous' .* it has constants, viscosity"),
        ("viscosity<low", "'low' in 'viscosity<low' is not a number"),
        ("constants<1", "name a column, such as constants.k"),
        ("constants.z<1", "no column 'z'; it has k, nu"),
        ("train, test", "'test' is a second name or range"),
        ("train, frames=5:5", "'frames=5:5' is empty"),
        ("frames=0:99", "exceeds the 9 frames"),
        ("trian", "no split 'trian'"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            module(url, train=text).train_dataloader()
        assert "\n" not in str(caught.value) and url in str(caught.value)
    with pytest.raises(
        DataError, match=r"window of 4 frames, 2 apart, is longer than the trajectories of 6 \(frames 0:6\)"
    ):
        module(url, train="frames=0:6", frames=4, dt_stride=2).train_dataloader()
    with pytest.raises(DataError, match="has axes trajectory; windows need"):
        module(url, variable="viscosity", train="0:4").train_dataloader()
    for config, message in (
        ({"pairs": True, "stride": 2}, "stride=2: has no effect on pairs"),
        ({"max_lead": 2}, "pairs=true only"),
        ({"rollout": 2}, "rollout=2: has an effect with input_frames > 0 only"),
        ({"input_frames": 1, "frames": 5}, "make 2"),
        ({"dt_stride": 0}, "dt_stride=0"),
    ):
        with pytest.raises(ValueError, match=message):
            FieldsConfig(url="x", **config)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="pairs have two frames, not 3"):
        module(url, pairs=True, frames=3).train_dataloader()


def test_a_changed_selection_is_noticed_on_resume(url: str) -> None:
    """As many samples, the same shards, but other ones: only what the ids mean tells them apart."""
    state = module(url, train="0:8, viscosity<1e-3").state_dict()
    with pytest.raises(DataError, match=r"sampling is .* split, window, spacing or pairs changed"):
        module(url, train="0:8, constants.k!=0, constants.k!=3, constants.k!=5, constants.k!=7").load_state_dict(state)
    spaced = module(url, frames=2, dt_stride=2, stride=9).state_dict()
    with pytest.raises(DataError, match="sampling"):
        module(url, frames=2, dt_stride=3, stride=9).load_state_dict(spaced)


def test_share_is_the_part_of_the_bytes_in_use(url: str) -> None:
    main = Dataset.open(url).main
    assert FieldWindows(main, 0, 10, 3).share == 1.0
    assert FieldWindows(main, 0, 10, 3, stride=9).share == pytest.approx(1 / 3)
    assert FieldWindows(main, 0, 10, 2, spacing=4, stride=9).share == pytest.approx(2 / 9)
    assert FieldWindows(main, 0, 10, 2, pairs=True, begin=3, only=np.array([1, 7])).share == pytest.approx(6 / 9 / 5)


@pytest.mark.parametrize("chunk", [1, 3, 9])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_direct_path_equals_the_general_one(tmp_path: Path, chunk: int, dtype: str) -> None:
    dataset = Dataset.open(write(str(tmp_path), chunk, dtype))
    for windows in (
        FieldWindows(dataset.main, 1, 12, 3),
        FieldWindows(dataset.main, 1, 12, 9),
        FieldWindows(dataset.main, 0, 12, 3, spacing=2, stride=2),
        FieldWindows(dataset.main, 0, 12, 2, pairs=True, only=np.array([2, 5, 11])),
    ):
        direct, general = (Reader(dataset, windows, None, Metrics()) for _ in range(2))
        assert direct._direct is not None
        general._direct = None
        ids = np.random.default_rng(0).permutation(windows.samples)[:17]
        for _ in range(2):  # the second time nothing is verified any more
            a, b = direct.batch(ids)["fields"], general.batch(ids)["fields"]
            assert a.dtype == torch.float32 and torch.equal(a, b)
        rows = np.array([4, 0, 2])
        target = direct.target(6)
        direct.fill(ids[:3], lambda target=target: target, rows)
        assert torch.equal(target.data[rows], b[:3])


def test_direct_reads_hit_the_limits_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset.open(write(str(tmp_path)))
    reader = Reader(dataset, FieldWindows(dataset.main, 0, 12, 9), None, Metrics())
    assert reader._direct is not None
    reader._direct.longest = 4
    assert np.array_equal(reader.batch(np.arange(12))["fields"].numpy(), field_values(N, T))
    at = Located(np.array([11]), np.array([5]), np.array([1]))
    slab, _ = reader._pool.take(1, 9, reader._direct.payload)
    assert not Direct(dataset.main, 9).read_whole(at, lambda: slab, lambda k: None)


def square(url: str) -> str:
    """As many trajectories as frames, grid points and channels; no train split, so no statistics."""
    axes = ("trajectory", "time", "channel", "x")
    specs = {
        "u": ArraySpec((4, 4, 4, 4), "float32", axes, 2),
        "p": ArraySpec((4, 4, 2, 4), "float32", ("trajectory", "time", "channel_2", "x"), 2),
        **{name: ArraySpec((4,), "float64", (name,), 4, 4) for name in ("time", "x")},
        "mu": ArraySpec((4,), "float64", ("trajectory",), 4, 4),
    }
    values = {name: np.random.default_rng(i).normal(i, 2.0, spec.shape) for i, (name, spec) in enumerate(specs.items())}
    values = {name: value.astype(specs[name].dtype) for name, value in values.items()} | {"time": np.arange(4.0)}
    attributes = {"kind": "fields", "array": "u", "channels": list("abcd"), "splits": {"test": [0, 3]}}
    write_dataset(url, specs, values, attributes)
    return url


def test_only_arrays_over_trajectories_select_them(tmp_path: Path) -> None:
    url = square(str(tmp_path))
    assert select(Dataset.open(url), Dataset.open(url).main, "mu<99").only is not None
    for text in ("time<2", "x<1"):
        with pytest.raises(DataError, match=r"no array '\w+' with one entry for each of 4 trajectories; it has mu$"):
            module(url, train=text).train_dataloader()
    with pytest.raises(DataError, match="no array 'time'"):
        module(url, train="0:4", parameters=["time"]).train_dataloader()


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    axes = tuple(i for i in range(values.ndim) if i != 2)
    return values.astype(np.float64).mean(axes), values.astype(np.float64).std(axes)


def test_statistics_are_of_what_is_trained_on(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = field_values(N, T)
    viscous = np.flatnonzero(VISCOSITY[:8] >= 1e-3)
    for train, expected in (
        ("train", values[:8]),
        ("0:8", values[:8]),
        ("0:3", values[:3]),
        ("test", values[10:]),
        ("train, frames=2:5", values[:8, 2:5]),
        ("train, viscosity>=1e-3", values[viscous]),
    ):
        spec, (mean, std) = module(url, train=train).spec(), moments(expected)
        np.testing.assert_allclose(spec["mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(spec["std"], std, rtol=1e-12)
    monkeypatch.setattr(normalisation, "LIMIT", 6 * 4 * values[0, 0].nbytes)  # then evenly spaced frames
    (mean, _), found = (
        moments(values[:3, :].reshape(1, 27, 2, 4, 4)[:, np.arange(24) * 27 // 24]),
        module(url, train=":3"),
    )
    np.testing.assert_allclose(found.spec()["mean"], mean, rtol=1e-12)

    other = square(str(tmp_path))
    held = Dataset.open(other)
    data = np.stack([held.arrays["u"].read((i,), 0, 4) for i in range(3)])
    spec = module(other, train="test").spec()
    assert spec["channels"] == list("abcd")
    np.testing.assert_allclose((spec["mean"], spec["std"]), moments(data), rtol=1e-12)
    data = np.stack([held.arrays["p"].read((i,), 0, 4) for i in range(3)])
    spec = module(other, train="test", variable="p").spec()
    assert spec["channels"] == ["p_0", "p_1"]
    np.testing.assert_allclose((spec["mean"], spec["std"]), moments(data), rtol=1e-12)


def test_statistics_of_remote_data_are_read_once(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(memory)
    found = module(memory, train="0:3", cache=str(tmp_path)).spec()
    np.testing.assert_allclose(found["mean"], moments(field_values(N, T)[:3])[0], rtol=1e-12)
    cache = ShardCache(str(tmp_path), 1 << 20)
    assert 0 < cache.used() < 1000
    monkeypatch.setattr(normalisation, "_read", None)
    again = module(memory, train="0:3", cache=str(tmp_path)).spec()
    assert (again["mean"], again["std"]) == (found["mean"], found["std"])


@pytest.mark.parametrize(
    "axes",
    [
        ("trajectory", "time", "y", "x", "channel"),
        ("channel", "time", "trajectory", "y", "x"),
        ("time", "trajectory", "channel", "y", "x"),
        ("trajectory", "time"),
        ("trajectory", "time_2", "channel"),
    ],
)
def test_axes_in_another_order_are_refused(tmp_path: Path, axes: tuple[str, ...]) -> None:
    shape = (4, 6, 3, 2, 5)[: len(axes)]
    spec = ArraySpec(shape, "float32", axes, 2)
    attributes = {"kind": "fields", "array": "u", "channels": ["a"], "splits": {"train": [0, 4]}}
    write_dataset(str(tmp_path), {"u": spec}, {"u": np.zeros(shape, np.float32)}, attributes)
    with pytest.raises(
        DataError, match=f"has axes {', '.join(axes)}; windows need trajectory, time, channel and space"
    ):
        module(str(tmp_path)).train_dataloader()


def test_channels_must_have_names(tmp_path: Path) -> None:
    specs = {"u": ArraySpec((2, 3, 2, 4), "float32", ("trajectory", "time", "channel", "x"), 2)}
    attributes = {"kind": "fields", "array": "u", "splits": {"train": [0, 2]}}
    write_dataset(str(tmp_path), specs, {"u": np.zeros((2, 3, 2, 4), np.float32)}, attributes)
    with pytest.raises(DataError, match="names 0 channels, but u has 2; make or import") as caught:
        module(str(tmp_path)).spec()
    assert "\n" not in str(caught.value)

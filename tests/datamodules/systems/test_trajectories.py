"""What all systems without space have in common: bits, shards, streams, splits, parameters, and their YAML files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray

from datamodules.data import FieldsConfig, FieldsData
from datamodules.format import Dataset, verify
from datamodules.make import generator_of, load
from datamodules.make import make as make_dataset
from datamodules.registry import lookup
from datamodules.simulators.lorenz63 import Lorenz63
from datamodules.simulators.lorenz96 import Lorenz96
from datamodules.simulators.rossler import Rossler

from .helpers import make

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
SYSTEMS = [
    "lorenz63", "lorenz96", "rossler", "double_pendulum", "skew_product", "chialvo_ring_star", "chialvo_rulkov",
    "dyadic_shell",
]  # fmt: skip
QUICK = [name for name in SYSTEMS if name != "skew_product"]
SMALL = {"dyadic_shell": {"burn_in": 0.1, "dt_save": 0.01}, "double_pendulum": {}, "chialvo_rulkov": {"burn_in": 10}}


def series(name: str, seed: int = 0, shard_bytes: int = 10**6, **config) -> np.ndarray:
    """All of `fields` of a small data set."""
    cls = lookup("generator", name)[1]
    chosen = {"burn_in": 1} if "chialvo" in name else {"burn_in": 0.1}
    g = make(cls, seed, shard_bytes, **{**chosen, **SMALL.get(name, {}), "train": 5, "batch": 3, **config})
    return np.concatenate([g.values("fields", k) for k in range(g.specs()["fields"].shards)])


@pytest.mark.parametrize("name", QUICK)
def test_bits_do_not_depend_on_shards_threads_or_count(name):
    whole = series(name)
    assert whole.dtype == np.float32 and whole.shape[:2] == (9, 20) and np.isfinite(whole).all()
    np.testing.assert_array_equal(series(name, shard_bytes=1), whole)
    np.testing.assert_array_equal(series(name, train=1), whole[:5])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        np.testing.assert_array_equal(series(name), whole)
    finally:
        torch.set_num_threads(threads)
    assert (whole[0] != whole[1]).any()
    both = np.concatenate([whole, series(name, seed=1), series(name, seed=3)])
    assert len(np.unique(both[:, 0].round(3), axis=0)) == 27  # data sets of other seeds share no trajectory


@pytest.mark.parametrize("name", SYSTEMS)
def test_each_yaml_makes_a_whole_data_set_that_streams(name, tmp_path):
    config = load(str(CONFIGS / f"{name}.yaml"), [f"url={tmp_path}/d", "workers=0"])
    dataset = Dataset.open(make_dataset(config))
    assert verify(dataset.url) == []
    generator, fields = generator_of(config)[1], dataset.main
    assert fields.dimensions == ("trajectory", "time", "channel")
    assert fields.frame_shape == (len(generator.channels),) == (len(dataset.attributes["channels"]),)
    assert dataset.attributes["kind"] == "fields" and dataset.attributes["equation"]
    with xarray.open_zarr(dataset.url) as opened:
        assert opened["fields"].dims == ("trajectory", "time", "channel")
        np.testing.assert_allclose(opened["time"].diff("time"), dataset.attributes["dt"])
        values = opened["fields"].values
    statistics = dataset.attributes["statistics"]
    train = values[slice(*dataset.splits["train"])].astype("f8")
    np.testing.assert_allclose(statistics["mean"], train.mean((0, 1)), rtol=1e-6, atol=1e-9)
    assert min(statistics["std"]) > 0
    data = FieldsData(FieldsConfig(url=dataset.url, frames=9, stride=4, read_ahead=0), global_batch=4)
    batch = next(iter(data.train_dataloader()))
    found, index = batch["fields"], batch["index"]
    starts = (fields.shape[1] - 9) // 4 + 1
    assert found.shape == (4, 9, len(generator.channels))
    for sample, window in zip(index.tolist(), found, strict=True):
        trajectory, start = divmod(sample, starts)
        np.testing.assert_array_equal(window, values[trajectory, 4 * start : 4 * start + 9])


def test_a_chunk_holds_many_frames():
    """Frames of 12 bytes one by one would be mostly checksums; a chunk divides the frames and stays below 4 KiB."""
    lengths = {frames: make(Lorenz63, frames=frames).specs()["fields"].chunk_length for frames in (512, 20, 509, 682)}
    assert lengths == {512: 256, 20: 20, 509: 1 if 509 * 12 > 4096 else 509, 682: 341}
    assert make(Lorenz96, frames=100).specs()["fields"].chunk_length == 25


def test_frames_begin_after_the_burn_in():
    late = series("lorenz63", burn_in=0.2)
    np.testing.assert_allclose(late[:, :18], series("lorenz63", burn_in=0.16)[:, 2:], rtol=0, atol=1e-4)


def test_saving_less_often_changes_nothing_else():
    np.testing.assert_array_equal(
        series("rossler", dt_save=0.2)[:, :10], series("rossler", dt_save=0.1)[:, : 20 : 2]
    )  # fmt: skip


@pytest.mark.parametrize("name", ["lorenz63", "lorenz96", "rossler", "double_pendulum"])
def test_schemes_agree(name):
    fixed = series(name, dt=0.0025, dt_save=0.05, burn_in=0.0)
    np.testing.assert_allclose(series(name, scheme="dopri5", dt_save=0.05, burn_in=0.0), fixed, rtol=2e-4, atol=2e-4)


def test_drawn_parameters_are_stored_and_used():
    g = make(Lorenz63, rho=[20.0, 30.0], train=6, burn_in=0.0)
    rho, fields = g.values("rho", 0), g.values("fields", 0)
    assert rho.shape == (10,) and len(set(rho)) == 10 and rho.min() >= 20 and rho.max() <= 30
    for i in (0, 7):
        single = make(Lorenz63, rho=[rho[i], rho[i]], burn_in=0.0)
        alone = single.solve(g.seeds(i, i + 1)).numpy()[0]
        np.testing.assert_allclose(fields[i], alone, rtol=1e-5, atol=1e-5)
    assert g.attributes()["per_trajectory"]["rho"] == [20.0, 30.0]


@pytest.mark.parametrize(
    "cls,change,message",
    [
        (Lorenz63, {"scheme": "euler"}, "scheme='euler': unknown; use one of rk4, dopri5"),
        (Lorenz63, {"dt_save": 0.015}, "dt_save=0.015: must be a whole number of steps dt=0.01"),
        (Lorenz63, {"burn_in": -1.0}, "burn_in=-1.0"),
        (Lorenz63, {"scheme": "dopri5", "burn_in": -1.0}, "burn_in=-1.0: must be >= 0"),
        (Lorenz63, {"rho": [30.0, 20.0]}, r"rho=\[30.0, 20.0\]"),
        (Lorenz96, {"sites": 3}, "sites=3"),
        (Lorenz96, {"fast": -1}, "fast=-1"),
        (Rossler, {"rtol": 0.0}, "rtol=0.0"),
    ],
)
def test_impossible_configs_are_refused(cls, change, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **change)


def test_a_step_that_is_too_large_is_told():
    with pytest.raises(ValueError, match=r"dt=0\.5: .*smaller time step"):
        make(Lorenz63, dt=0.5, dt_save=1.0, burn_in=20.0).group(0)

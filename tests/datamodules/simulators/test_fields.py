"""What all simulations owe: the arrays they declare, bits that depend on (config, seed) alone, and clear refusals."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

from datamodules import make as make_module
from datamodules.format import Dataset
from datamodules.make import MakeConfig, generator_of, load, make
from datamodules.registry import GENERATORS, lookup
from datamodules.simulators import base
from datamodules.simulators.compressible_flow_2d import IdealGas
from datamodules.simulators.darcy_2d import DarcySolver
from datamodules.simulators.fields import Simulation
from datamodules.simulators.finite_volume import LIMITERS, FiniteVolumes
from datamodules.simulators.shallow_water_2d import ShallowWater
from datamodules.simulators.trajectories import Trajectories

CONFIGS = Path(__file__).parents[3] / "configs" / "data"
CLASSES = {name: lookup("generator", name)[1] for name in GENERATORS}
SIMULATIONS = [n for n, made in CLASSES.items() if issubclass(made, Simulation) and not issubclass(made, Trajectories)]
DATA_DEPENDENT = {"compressible_flow_2d", "darcy_2d", "shallow_water_2d"}  # how long they run depends on values
every_simulation = pytest.mark.parametrize("name", SIMULATIONS)


def tiny(name: str, seed: int = 0, **changes) -> Simulation:
    """The shipped config of a simulation with at most three frames of six trajectories, in groups of two."""
    path = next(p for p in sorted(CONFIGS.glob("*.yaml")) if yaml.safe_load(p.read_text())["generator"]["name"] == name)
    given = load(str(path)).generator
    given |= {"train": 4, "validation": 1, "test": 1, "batch": 2, **changes}
    if "frames" in given:
        given["frames"] = min(given["frames"], 3)
    if "burn_in" in given:
        given["burn_in"] = min(given["burn_in"], 10.0)
    if "dt" not in given and given.get("dt_save"):
        given["dt_save"] /= 4
    generator = generator_of(MakeConfig(generator=given, seed=seed))[1]
    assert isinstance(generator, Simulation)
    return generator


def shards(generator: Simulation, name: str) -> np.ndarray:
    return np.concatenate([generator.values(name, k) for k in range(generator.specs()[name].shards)])


@every_simulation
def test_every_array_is_as_declared(name):
    generator = tiny(name)
    for array, spec in generator.specs().items():
        values = shards(generator, array)
        assert values.shape == spec.shape and np.isfinite(values).all(), array
    fields = shards(generator, "fields")
    assert fields.shape[2] == len(generator.attributes()["channels"])
    assert all(fields[:, :, i].std() > 0 for i in range(fields.shape[2]))
    assert all(np.std(shards(generator, array)) > 0 for array in generator.static)


@every_simulation
def test_attributes_describe_the_equation(name):
    attributes = json.loads(json.dumps(tiny(name).attributes()))
    for key in ("equation", "parameters", "units", "domain", "boundary_conditions", "dt", "solver", "per_trajectory"):
        assert key in attributes, key
    assert set(attributes["domain"]) == set(attributes["boundary_conditions"]) == set(tiny(name).coordinates())
    assert set(attributes["channels"]) <= set(attributes["units"])


@every_simulation
def test_a_trajectory_depends_on_its_seed_alone(name):
    generator = tiny(name)
    whole = shards(generator, "fields")
    assert len(np.unique(whole[:, -1].reshape(6, -1), axis=0)) == 6
    small = type(generator)(replace(generator.config, train=2), 0, 1)  # one trajectory per shard, fewer of them
    assert small.shard_length == 1
    np.testing.assert_array_equal(small.values("fields", 3)[0], whole[3])
    single = replace(generator.config, batch=1)
    fixed = {field for field, (low, high) in ((f, getattr(single, f)) for f in single.drawn) if low == high}
    for array in {"fields", *generator.static, *generator.config.drawn} - fixed:
        if generator.config.drawn.get(array) != "integer":  # two data sets, twelve trajectories
            both = np.concatenate([shards(type(generator)(single, seed, 1), array) for seed in (1, 2)])
            assert len(np.unique(both.reshape(12, -1), axis=0)) == 12, array
    np.testing.assert_allclose(shards(type(generator)(single, 0, 1), "fields"), whole, rtol=1e-4, atol=1e-5)


@every_simulation
def test_drawn_parameters_keep_to_their_range(name):
    generator = tiny(name)
    for field in generator.config.drawn:
        low, high = getattr(generator.config, field)
        values = shards(generator, field)
        assert values.dtype == np.float64 and (values >= low).all() and (values <= high).all()
        if generator.config.drawn[field] != "integer":
            assert len(np.unique(values)) == (1 if low == high else 6)
        with pytest.raises(ValueError, match=rf"{field}=\[2.0, 1.0\]: must be a range"):
            replace(generator.config, **{field: [2.0, 1.0]})
        with pytest.raises(ValueError, match=rf"{field}=\[1.0\]: must be a range"):
            replace(generator.config, **{field: [1.0]})


def test_laws_of_drawn_parameters():
    """Uniform in the value, or in its logarithm, or among whole numbers."""
    advection, burgers = tiny("advection_1d", speed=[1.0, 3.0]), tiny("burgers_1d", viscosity=[1e-3, 1e-1])
    speeds = np.array([advection.draw("speed", seed) for seed in range(400)])
    logarithms = np.log10([burgers.draw("viscosity", seed) for seed in range(400)])
    for values, middle, width in ((speeds, 2.0, 2.0), (logarithms, -2.0, 2.0)):
        assert abs(values.mean() - middle) < 4 * width / np.sqrt(12 * 400)
        assert abs(values.std() - width / np.sqrt(12)) < 0.05 * width
    spirals = tiny("reaction_diffusion_2d", arms=[1, 3])
    counts = np.bincount([int(spirals.draw("arms", seed)) for seed in range(600)])
    assert len(counts) == 4 and (np.abs(counts[1:] - 200) < 50).all()


def test_a_data_set_with_arrays_of_mixed_rank(tmp_path):
    url = make(load(str(CONFIGS / "wave_1d.yaml"), [f"url={tmp_path}/wave", "shard_bytes=60000"]))
    dataset = Dataset.open(url)
    assert dataset.main.shape == (24, 21, 2, 64) and dataset.main.shards > 1
    assert dataset.arrays["speed"].shape == (24, 64)
    assert len(dataset.attributes["statistics"]["mean"]) == 2
    url = make(load(str(CONFIGS / "advection_1d.yaml"), [f"url={tmp_path}/advection"]))
    assert Dataset.open(url).arrays["speed"].shape == (24,)


def gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    "device", ["gpu", "", "mps", "xpu", "meta", "cpu:1", "cuda:", "cuda:-1", "cuda:07", "cuda:300"]
)
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match=rf"device='{device}': simulators run on cpu, cuda or cuda:<index> only$"):
        tiny("burgers_1d", device=device)


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    gpus(monkeypatch, 0)
    with pytest.raises(ValueError, match=r"^device='cuda': torch finds no GPU here; use device: cpu$"):
        tiny("burgers_1d", device="cuda").values("fields", 0)
    gpus(monkeypatch, 2)
    assert tiny("burgers_1d", device="cuda:1").device == torch.device("cuda:1")
    config = load(str(CONFIGS / "burgers_1d.yaml"), [f"url={tmp_path}/d", "generator.device=cuda:7"])
    with pytest.raises(ValueError, match=r"^device='cuda:7': the last GPU here is cuda:1; use device: cuda for any$"):
        make(config)
    assert not any(tmp_path.iterdir())


def test_workers_take_the_gpus_in_turn(monkeypatch):
    gpus(monkeypatch, 2)
    monkeypatch.setattr(base, "_worker", None)
    monkeypatch.setattr(make_module, "_worker", None)
    monkeypatch.setattr(make_module, "ctypes", Mock())  # this process is to outlive its parent
    generator, fixed = tiny("burgers_1d", device="cuda"), tiny("burgers_1d", device="cuda:1")
    assert generator.device == torch.device("cuda")
    started, found = multiprocessing.get_context("spawn").Value("i", 0), []
    for _ in range(3):
        make_module._start_worker(Mock(), generator, started)
        found.append((str(generator.device), str(fixed.device)))
    assert found == [("cuda:0", "cuda:1"), ("cuda:1", "cuda:1"), ("cuda:0", "cuda:1")]


def fails(error: Exception) -> Callable[..., torch.Tensor]:
    def solve(*_: object) -> torch.Tensor:
        raise error

    return solve


@pytest.mark.parametrize(
    "solve",
    [
        lambda *_: torch.empty(2**60),  # what torch itself says of the CPU
        fails(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.\nGPU 0 has ...")),
        fails(RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED")),
        fails(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        fails(MemoryError()),
    ],
)
def test_too_little_memory_is_told_in_one_line(solve, monkeypatch):
    generator = tiny("burgers_1d")
    monkeypatch.setattr(generator, "solve", solve)
    told = "^batch=2: 2 trajectories do not fit into the memory of cpu; use a smaller batch or fewer workers$"
    with pytest.raises(ValueError, match=told):
        generator.values("fields", 0)


def test_other_errors_are_left_as_they_are(monkeypatch):
    generator = tiny("burgers_1d")
    monkeypatch.setattr(generator, "solve", fails(RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        generator.values("fields", 0)


@pytest.mark.parametrize("name", [name for name in SIMULATIONS if name not in DATA_DEPENDENT])
def test_nothing_is_left_on_the_cpu(name, monkeypatch):
    """Tensors of `meta` have no data and mix with those of no other device: what runs on them runs on a GPU."""
    monkeypatch.setattr(Simulation, "device", torch.device("meta"))
    generator = tiny(name)
    assert generator.solve([0, 1]).device.type == "meta"


def test_nothing_is_left_on_the_cpu_in_solvers_that_look_at_their_data():
    one = torch.ones(2, 4, 8, 8, dtype=torch.float64, device="meta")
    viscosity = torch.ones(2, 1, 1, dtype=torch.float64, device="meta")
    for law, q in ((ShallowWater(1.0), one[:, :3]), (IdealGas(1.4, viscosity), one)):
        for limiter in LIMITERS:
            volumes = FiniteVolumes(law, (0.1, 0.1), "periodic", limiter, 0.4)
            assert volumes.tendency(q).device == law.rate(q, (0.1, 0.1)).device == one.device
    darcy = DarcySolver(one[:, 0])
    assert darcy.precondition(darcy.apply(one[:, 0, 1:-1, 1:-1])).device == one.device


def test_numbers_that_blow_up_are_refused_in_one_line():
    with pytest.raises(
        ValueError, match=r"dt=10\.0: the solution became non-finite; use a smaller time step"
    ) as caught:
        tiny("burgers_1d", viscosity=[1e-6, 1e-6], sigma=2500.0, dt=10.0, dt_save=1000.0).values("fields", 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name,change,message",
    [
        ("advection_1d", {"resolution": 9}, "resolution=9"),
        ("advection_1d", {"modes": 32}, "modes=32"),
        ("burgers_1d", {"viscosity": [0.0, 0.1]}, "viscosity=.*logarithm"),
        ("burgers_1d", {"viscosity": [0.0, 0.0]}, "viscosity=.*must be positive"),
        ("burgers_1d", {"solver_resolution": 100}, "solver_resolution=100: must be a multiple"),
        ("burgers_1d", {"dt": 0.3}, "dt_save=1.0: must be a whole number of steps"),
        ("burgers_1d", {"frames": 1}, "frames=1"),
        ("burgers_1d", {"train": 0}, "train=0"),
        ("burgers_1d", {"batch": 0}, "batch=0"),
        ("burgers_1d", {"dt_save": 0.0}, "dt_save=0.0"),
        ("kuramoto_sivashinsky_1d", {"length": -1.0}, "length=-1.0"),
        ("kuramoto_sivashinsky_1d", {"burn_in": 0.1}, "burn_in=0.1"),
        ("korteweg_de_vries_1d", {"modes": 60}, "modes=60"),
        ("wave_1d", {"boundary": "open"}, "boundary='open'"),
        ("wave_1d", {"contrast": -1.0}, "contrast=-1.0"),
        ("wave_1d", {"dt": 0.25}, "dt=0.25: unstable .* use at most 0.04"),
    ],
)
def test_impossible_configs_are_refused(name, change, message):
    config = tiny(name).config
    with pytest.raises(ValueError, match=message):
        replace(config, **change)

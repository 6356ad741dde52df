"""HDF5 of The Well and PDEBench in one, two and three dimensions, and what of their shapes and axes is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray

from datamodules.format import DataError, Dataset, verify
from datamodules.importers.run import ImportConfig, import_data

from .layouts import flow, gas, values

N, T = 3, 5
SPACE = {"x": 4, "y": 6, "z": 3}
RANKS = [1, 2, 3]


def extents(rank: int) -> tuple[int, ...]:
    return tuple(SPACE.values())[:rank]


def axes(rank: int) -> tuple[str, ...]:
    return tuple(SPACE)[:rank]


def run(tmp_path: Path, name: str) -> Dataset:
    url = import_data(ImportConfig(str(tmp_path / "out"), [str(tmp_path / name)]))
    assert verify(url) == []
    return Dataset.open(url)


def whole(dataset: Dataset, name: str = "fields") -> np.ndarray:
    return xarray.open_zarr(dataset.url)[name].values


def write(path: Path, **held: Any) -> None:
    """An HDF5 file of PDEBench; coordinates as `x`, `y`, `z`, `t`."""
    with h5py.File(path, "w") as f:
        for name, data in held.items():
            f[f"{name}-coordinate" if len(name) == 1 else name] = data


def coordinates(rank: int, frames: int = T + 1) -> dict[str, np.ndarray]:
    """PDEBench's files have one time too many."""
    return {name: np.arange(SPACE[name]) / 4 for name in axes(rank)} | {"t": 0.5 * np.arange(frames)}


# The Well


def well(path: Path, rank: int, times: np.ndarray) -> dict[str, np.ndarray]:
    """`velocity` and `stress` everywhere, `profile` along the last axis alone; times [T] or [trajectory, T]."""
    space = extents(rank)
    written = {
        "density": values((N, T, *space)),
        "profile": values((N, T, space[-1]), 1),
        "velocity": values((N, T, *space, rank), 2),
        "stress": values((N, T, *space, rank, rank), 3),
        "porosity": values((N, *space), 4),
    }
    with h5py.File(path, "w") as f:
        f.attrs["n_trajectories"] = N
        f["dimensions/time"] = times
        f["dimensions"].attrs["spatial_dims"] = axes(rank)
        for name in axes(rank):
            f[f"dimensions/{name}"] = np.arange(SPACE[name], dtype="f4")
        groups = {"density": 0, "profile": 0, "velocity": 1, "stress": 2, "porosity": 0}
        for name, order in groups.items():
            data = f.create_dataset(f"t{order}_fields/{name}", data=written[name])
            along = [name != "profile" or axis == axes(rank)[-1] for axis in axes(rank)]
            data.attrs.update({"sample_varying": True, "time_varying": name != "porosity", "dim_varying": along})
    return written


@pytest.mark.parametrize("rank", RANKS)
def test_the_well(tmp_path: Path, rank: int) -> None:
    written = well(tmp_path / "a.hdf5", rank, np.linspace(0, 1, T))
    dataset, names = run(tmp_path, "a.hdf5"), axes(rank)
    assert dataset.main.dimensions == ("trajectory", "time", "channel", *names)
    assert dataset.main.shape == (N, T, 2 + rank + rank**2, *extents(rank))
    vectors = [f"velocity_{a}" for a in names]
    tensors = [f"stress_{a}{b}" for a in names for b in names]
    assert dataset.attributes["channels"] == ["density", "profile", *vectors, *tensors]
    fields = whole(dataset)
    np.testing.assert_array_equal(fields[:, :, 0], written["density"])
    profile = written["profile"].reshape(N, T, *(1,) * (rank - 1), -1)
    np.testing.assert_array_equal(fields[:, :, 1], np.broadcast_to(profile, fields[:, :, 1].shape))
    np.testing.assert_array_equal(fields[:, :, 2 : 2 + rank], np.moveaxis(written["velocity"], -1, 2))
    for i in range(rank):
        for j in range(rank):
            np.testing.assert_array_equal(fields[:, :, 2 + rank + rank * i + j], written["stress"][..., i, j])
    np.testing.assert_array_equal(whole(dataset, "porosity"), written["porosity"])
    assert dataset.attributes["dt"] == 0.25
    assert dataset.attributes["domain"] == {name: [0, SPACE[name] - 1] for name in names}


@pytest.mark.parametrize("steps", [(0.5, 0.5, 0.5), (0.5, 0.5, 0.25)])
def test_times_of_each_trajectory_of_the_well(tmp_path: Path, steps: tuple[float, ...]) -> None:
    times = np.array(steps)[:, None] * np.arange(T) + np.arange(N)[:, None]
    well(tmp_path / "a.hdf5", 1, times)
    dataset = run(tmp_path, "a.hdf5")
    assert "time" not in dataset.arrays and dataset.arrays["times"].dimensions == ("trajectory", "time")
    np.testing.assert_array_equal(whole(dataset, "times"), times)
    assert dataset.attributes.get("dt") == (0.5 if len(set(steps)) == 1 else None)  # one that holds for all, or none


# PDEBench


@pytest.mark.parametrize("rank", RANKS)
def test_gas(tmp_path: Path, rank: int) -> None:
    names = ["density", "pressure", "Vx", "Vy", "Vz"][: 2 + rank]
    written = {name: values((N, T, *extents(rank)), i) for i, name in enumerate(names)}
    write(tmp_path / "a.hdf5", **written, **coordinates(rank))
    dataset = run(tmp_path, "a.hdf5")
    assert dataset.main.dimensions[3:] == axes(rank) and dataset.attributes["channels"] == names
    np.testing.assert_array_equal(whole(dataset), np.stack(list(written.values()), 2))
    np.testing.assert_array_equal(whole(dataset, "time"), 0.5 * np.arange(T))
    for name in axes(rank):
        np.testing.assert_array_equal(whole(dataset, name), np.arange(SPACE[name]) / 4)
    assert dataset.attributes["dt"] == 0.5


@pytest.mark.parametrize("rank", RANKS)
def test_groups(tmp_path: Path, rank: int) -> None:
    data = values((N, T, *extents(rank), 2))
    held: dict[str, Any] = {f"{i:04d}/data": data[i] for i in range(N)}
    grids = {f"{i:04d}/grid/{name}": at for i in range(N) for name, at in coordinates(rank, T).items()}
    write(tmp_path / "a.h5", **held, **grids)
    dataset = run(tmp_path, "a.h5")
    assert dataset.main.dimensions[3:] == axes(rank)
    np.testing.assert_array_equal(whole(dataset), np.moveaxis(data, -1, 2))
    assert dataset.attributes["dt"] == 0.5 and set(dataset.arrays) == {"fields", "time", *axes(rank)}


@pytest.mark.parametrize("rank", RANKS)
def test_flow(tmp_path: Path, rank: int) -> None:
    velocity, particles = values((N, T, *extents(rank), rank)), values((N, T, *extents(rank), 1), 1)
    force = values((N, *extents(rank), rank), 2)
    write(tmp_path / "a.h5", velocity=velocity, particles=particles, force=force)
    dataset = run(tmp_path, "a.h5")
    assert dataset.attributes["channels"] == [*(f"velocity_{a}" for a in axes(rank)), "particles"]
    np.testing.assert_array_equal(whole(dataset), np.moveaxis(np.concatenate([velocity, particles], -1), -1, 2))
    for i, name in enumerate(axes(rank)):
        np.testing.assert_array_equal(whole(dataset, f"force_{name}"), force[..., i])


def test_times_of_each_trajectory_of_a_flow(tmp_path: Path) -> None:
    flow(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as f:
        f["t"][1] *= 2
        times = f["t"][()]
    dataset = run(tmp_path, "a.h5")
    np.testing.assert_array_equal(whole(dataset, "times"), times)
    assert "dt" not in dataset.attributes  # it is not the same for all


# Refused


def changed(path: Path, name: str, shape: tuple[int, ...] | None) -> None:
    """Another array of that shape (None: a coordinate, taken away) in its place."""
    with h5py.File(path, "a") as f:
        del f[name]
        if shape is not None:
            f[name] = values(shape)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("Vx", (4, 5, 6, 9), r"Vx has shape \(4, 5, 6, 9\) but density has \(4, 5, 6, 8\): mixed shapes"),
        ("Vy", (3, 5, 6, 8), r"Vy has shape \(3, 5, 6, 8\) but density .*: mixed shapes"),
        ("pressure", (4, 5, 6), r"pressure has shape \(4, 5, 6\) but density .*: mixed shapes"),
    ],
)
def test_mixed_shapes_of_a_gas(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    gas(tmp_path / "a.hdf5")
    changed(tmp_path / "a.hdf5", name, shape)
    with pytest.raises(DataError, match=message):
        run(tmp_path, "a.hdf5")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("particles", (3, 5, 6, 9, 1), r"particles has shape \(3, 5, 6, 9, 1\) but velocity \(3, 5, 6, 8, 2\): mixed"),
        ("force", (3, 8, 6, 2), r"force has shape \(3, 8, 6, 2\) where \(trajectory=3, x=6, y=8, component=2\) is due"),
        ("force", (3, 6, 8), r"force has shape \(3, 6, 8\) where"),
        ("t", (3, 6), r"t has shape \(3, 6\) but velocity \(3, 5, 6, 8, 2\) has 3 trajectories of 5 frames; the order"),
        ("velocity", (3, 2, 5, 6, 8), r"velocity has 8 components on 2 axes"),
        (
            "velocity",
            (3, 6, 8, 5, 2),
            r"t has shape \(3, 5\) but .* of 6 frames; .*\(trajectory, time, x, y, component\)",
        ),
    ],
)
def test_mixed_shapes_and_wrong_axes_of_a_flow(tmp_path: Path, name: str, shape: tuple[int, ...], message: str) -> None:
    flow(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as f:
        if name == "velocity":
            del f["particles"], f["force"]
    changed(tmp_path / "a.h5", name, shape)
    with pytest.raises(DataError, match=message) as caught:
        run(tmp_path, "a.h5")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", RANKS)
def test_wrong_axes_are_told_by_the_coordinates(tmp_path: Path, rank: int) -> None:
    shape, order = (N, T, *extents(rank)), ", ".join(("trajectory", "time", *axes(rank)))
    turned = (N, *extents(rank), T)  # time last
    write(tmp_path / "gas.h5", density=values(turned), Vx=values(turned), **coordinates(rank))
    with pytest.raises(DataError, match=rf"-coordinate has . entries but axis .*\({order}\): wrong axis order\?"):
        run(tmp_path, "gas.h5")
    grids = {f"0000/grid/{name}": at for name, at in coordinates(rank, T).items()}
    write(tmp_path / "groups.h5", **{"0000/data": values((*turned[1:], 2))}, **grids)
    with pytest.raises(
        DataError, match=r"0000/data has shape .*grid/t has 5 entries where .* needs 4: wrong axis order"
    ):
        run(tmp_path, "groups.h5")
    well(tmp_path / "well.h5", rank, np.arange(T))
    changed(tmp_path / "well.h5", "t0_fields/density", turned)
    with h5py.File(tmp_path / "well.h5", "a") as f:
        f["t0_fields/density"].attrs.update(
            {"sample_varying": True, "time_varying": True, "dim_varying": [True] * rank}
        )
    with pytest.raises(DataError, match=r"density has shape .* where its attributes say .*; wrong axis order"):
        run(tmp_path, "well.h5")
    assert shape != turned

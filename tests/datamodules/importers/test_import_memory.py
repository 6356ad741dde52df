"""Imports hold a shard and a few blocks, whatever the layout: no file, no variable and no trajectory is loaded whole."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray
import zarr

from datamodules.format import Dataset
from datamodules.importers import files
from datamodules.importers.run import ImportConfig, import_data
from datamodules.store import Store

MiB = 2**20
N, T, SIDE = 2, 256, 64  # float32: 4 MiB a trajectory and channel
BLOCK = MiB // 4
AXES = ("trajectory", "time", "channel", "y", "x")


def trajectory(i: int) -> np.ndarray:
    """float32 [T, SIDE, SIDE], constant in each frame."""
    return np.broadcast_to(np.float32(1000 * i + np.arange(T))[:, None, None], (T, SIDE, SIDE))


def fill(array: Any, pick: Callable[[int], Any] = lambda i: i) -> None:
    for i in range(N):
        array[pick(i)] = trajectory(i)


def pdebench(path: Path) -> str:
    with h5py.File(path / "a.hdf5", "w") as f:
        fill(f.create_dataset("tensor", (N, T, SIDE, SIDE), "f4", chunks=(1, 4, SIDE, SIDE)))
    return "a.hdf5"


def gas(path: Path) -> str:
    with h5py.File(path / "a.hdf5", "w") as f:
        for name in ("density", "Vx"):
            fill(f.create_dataset(name, (N, T, SIDE, SIDE), "f4", chunks=(1, 4, SIDE, SIDE)))
    return "a.hdf5"


def groups(path: Path) -> str:
    with h5py.File(path / "a.hdf5", "w") as f:
        for i in range(N):
            f.create_dataset(f"{i:04d}/data", data=trajectory(i)[..., None], chunks=(4, SIDE, SIDE, 1))
    return "a.hdf5"


def flow(path: Path) -> str:
    with h5py.File(path / "a.hdf5", "w") as f:
        velocity = f.create_dataset("velocity", (N, T, SIDE, SIDE, 2), "f4", chunks=(1, 4, SIDE, SIDE, 2))
        for i in range(N):
            velocity[i] = trajectory(i)[..., None]
    return "a.hdf5"


def well(path: Path) -> str:
    with h5py.File(path / "a.hdf5", "w") as f:
        f.attrs.update({"n_trajectories": N, "n_spatial_dims": 2})
        for name, count in (("time", T), ("y", SIDE), ("x", SIDE)):
            f[f"dimensions/{name}"] = np.arange(count, dtype="f4")
        f["dimensions"].attrs["spatial_dims"] = ["y", "x"]
        described = {"sample_varying": True, "time_varying": True, "dim_varying": np.array([True, True])}
        density = f.create_dataset("t0_fields/density", (N, T, SIDE, SIDE), "f4", chunks=(1, 4, SIDE, SIDE))
        fill(density)
        density.attrs.update(described)
    return "a.hdf5"


def netcdf(path: Path) -> str:
    held = np.stack([trajectory(i) for i in range(N)])
    data = xarray.Dataset({"u": (("trajectory", "time", "y", "x"), held)})
    data.to_netcdf(path / "a.nc", engine="h5netcdf", encoding={"u": {"chunksizes": (1, 4, SIDE, SIDE)}})
    return "a.nc"


def zarr_group(path: Path, names: tuple[str, ...] | None = AXES) -> str:
    shape, cut = (N, T, 1, SIDE, SIDE), (1, 4, 1, SIDE, SIDE)
    group = zarr.create_group(str(path / "a.zarr"))
    array = group.create_array(
        "u", shape=shape, dtype="f4", chunks=cut, shards=(1, 32, 1, SIDE, SIDE), dimension_names=names
    )
    fill(array, lambda i: (i, slice(None), 0))
    return "a.zarr"


def zarr_array(path: Path) -> str:
    return zarr_group(path, None)


def npy(path: Path, axes: tuple[int, ...] = (0, 1, 2, 3, 4)) -> str:
    held = np.stack([trajectory(i) for i in range(N)])[:, :, None]
    np.save(path / "a.npy", np.ascontiguousarray(np.transpose(held, axes)))
    return "a.npy"


LAYOUTS: dict[str, tuple[Callable[[Path], str], dict[str, str]]] = {
    "pdebench": (pdebench, {}),
    "gas": (gas, {}),
    "groups": (groups, {}),
    "flow": (flow, {}),
    "well": (well, {}),
    "netcdf": (netcdf, {}),
    "zarr": (zarr_group, {}),
    "zarr_without_names": (zarr_array, {"axes": ",".join(AXES)}),
    "npy": (npy, {}),
    "npy_time_first": (lambda path: npy(path, (1, 0, 2, 3, 4)), {"axes": "time,trajectory,channel,y,x"}),
    "npy_time_last": (lambda path: npy(path, (3, 4, 2, 0, 1)), {"axes": "y,x,channel,trajectory,time"}),
}


def check(tmp_path: Path, source: str, options: dict[str, str]) -> None:
    """Import, compare some values; memory must stay at a shard (here: a trajectory) and a few blocks more."""
    config = ImportConfig(str(tmp_path / "out"), [source], options=options, shard_bytes=MiB, block_bytes=BLOCK)
    tracemalloc.start()
    try:
        dataset = Dataset.open(import_data(config))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    shape = dataset.main.shape
    assert shape[:2] == (N, T) and shape[3:] == (SIDE, SIDE) and dataset.main.shard_length == 1
    for i, frame in ((0, 3), (1, 137), (1, T - 1)):
        np.testing.assert_array_equal(
            dataset.main.read((i,), frame, frame + 1), np.full((1, *shape[2:]), 1000 * i + frame)
        )
    assert dataset.attributes["statistics"]["max"] == [1000 * (N - 1) + T - 1] * shape[2]
    assert peak < math.prod(shape[1:]) * 4 + 12 * BLOCK


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_is_loaded_whole(tmp_path: Path, layout: str) -> None:
    write, options = LAYOUTS[layout]
    check(tmp_path, str(tmp_path / write(tmp_path)), options)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if "zarr" not in layout])
def test_nor_is_a_remote_file(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(files, "BLOCKS", 4)
    write, options = LAYOUTS[layout]
    name = write(tmp_path)
    Store(memory).write(name, (tmp_path / name).read_bytes())
    check(tmp_path, f"{memory}/{name}", options)

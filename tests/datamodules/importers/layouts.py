"""Small source files in the layouts that are imported, written with h5py and xarray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

Y, X, T = 6, 8, 5


def values(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def well(path: Path, n: int = 3, seed: int = 0, viscosity: float = 0.1, **change: Any) -> dict[str, np.ndarray]:
    """A file of The Well with every kind of field; returns what was written by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames, y, x = change.get("frames", T), change.get("y", Y), change.get("x", X)
    written = {
        "density": values((n, frames, y, x), seed),
        "velocity": values((n, frames, y, x, 2), seed + 1),
        "stress": values((n, frames, y, x, 2, 2), seed + 2),
        "profile": values((n, frames, y), seed + 3),
        "depth": values((n, y, x), seed + 4),
        "mask": values((y, x), 99),
        "heat": values((n,), seed + 5),
        "drive": values((n, frames), seed + 6),
    }
    with h5py.File(path, "w") as f:
        f.attrs.update({
            "simulation_parameters": ["viscosity"], "viscosity": viscosity, "dataset_name": "tiny", "grid_type": "cartesian",
            "n_spatial_dims": 2, "n_trajectories": n,
        })  # fmt: skip
        dimensions = f.create_group("dimensions")
        dimensions.attrs["spatial_dims"] = ["x", "y"] if change.get("swap") else ["y", "x"]
        for name, count in (("time", frames), ("y", y), ("x", x)):
            axis = dimensions.create_dataset(name, data=np.linspace(0, 1, count, dtype=np.float32))
            axis.attrs.update({"sample_varying": False, "time_varying": False})
        wall = f.create_group("boundary_conditions").create_group("x_periodic")
        wall.attrs.update({"associated_dims": ["x"], "bc_type": "PERIODIC", "associated_fields": []})
        kinds = {
            "t0_fields": {
                "density": (1, 1, [1, 1]),
                "profile": (1, 1, [1, 0]),
                "depth": (1, 0, [1, 1]),
                "mask": (0, 0, [1, 1]),
            },
            "t1_fields": {"velocity": (1, 1, [1, 1])},
            "t2_fields": {"stress": (1, 1, [1, 1])},
        }
        for group, members in kinds.items():
            held = f.create_group(group)
            held.attrs["field_names"] = list(members)
            for name, (sample, timed, varying) in members.items():
                data = held.create_dataset(name, data=written[name], chunks=True, compression="gzip")
                data.attrs.update({
                    "sample_varying": bool(sample), "time_varying": bool(timed), "dim_varying": np.array(varying, bool),
                })  # fmt: skip
        scalars = f.create_group("scalars")
        scalars.attrs["field_names"] = ["heat", "drive", "gamma"]
        for name, data, sample, timed in (
            ("heat", written["heat"], True, False), ("drive", written["drive"], True, True), ("gamma", np.float32(1.5), False, False),
        ):  # fmt: skip
            scalars.create_dataset(name, data=data).attrs.update({"sample_varying": sample, "time_varying": timed})
    return written


def tensor(path: Path, n: int = 6, seed: int = 0, **attributes: float) -> np.ndarray:
    """PDEBench, 1D: `tensor` [N, T, X] with one time too many."""
    data = values((n, T, X), seed)
    with h5py.File(path, "w") as f:
        f["tensor"] = data
        f["x-coordinate"] = np.linspace(0, 1, X, dtype=np.float32)
        f["t-coordinate"] = 0.25 * np.arange(T + 1, dtype=np.float32)
        f.attrs.update(attributes)
    return data


def darcy(path: Path, n: int = 4) -> dict[str, np.ndarray]:
    written = {"tensor": values((n, 1, Y, X)), "nu": values((n, Y, X), 1)}
    with h5py.File(path, "w") as f:
        for name, data in written.items():
            f[name] = data
        f["x-coordinate"], f["y-coordinate"] = np.arange(Y) / Y, np.arange(X) / X
        f.attrs["beta"] = 1.0
    return written


def gas(path: Path, n: int = 4) -> dict[str, np.ndarray]:
    written = {name: values((n, T, Y, X), i) for i, name in enumerate(("density", "pressure", "Vx", "Vy"))}
    with h5py.File(path, "w") as f:
        for name, data in written.items():
            f[name] = data
        f["x-coordinate"], f["y-coordinate"], f["t-coordinate"] = np.arange(Y) / Y, np.arange(X) / X, 0.1 * np.arange(T)
        f.attrs.update({"eta": 0.01, "zeta": 0.01, "M": 0.1})
    return written


def groups(path: Path, n: int = 4, channels: int = 2) -> np.ndarray:
    data = values((n, T, Y, X, channels))
    with h5py.File(path, "w") as f:
        for i in range(n):
            f[f"{i:04d}/data"] = data[i]
            for name, count in (("t", T), ("x", Y), ("y", X)):
                f[f"{i:04d}/grid/{name}"] = np.linspace(0, 1, count, dtype=np.float32)
    return data


def flow(path: Path, n: int = 3) -> dict[str, np.ndarray]:
    written = {
        "velocity": values((n, T, Y, X, 2)),
        "particles": values((n, T, Y, X, 1), 1),
        "force": values((n, Y, X, 2), 2),
        "t": np.tile(0.5 * np.arange(T, dtype=np.float32), (n, 1)),
    }
    with h5py.File(path, "w") as f:
        for name, data in written.items():
            f[name] = data
        f.attrs["latestIndex"] = T - 1
    return written

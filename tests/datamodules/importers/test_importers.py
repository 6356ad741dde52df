"""Each layout, written with h5py, xarray or NumPy, comes out of a data set of Keel's value for value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray

from datamodules.format import DataError, Dataset, verify
from datamodules.importers import files
from datamodules.importers.run import ImportConfig, import_data

from .layouts import T, X, Y, darcy, flow, gas, groups, tensor, values, well


def imported(tmp_path: Path, *sources: object, **config: object) -> Dataset:
    url = str(tmp_path / "out")
    import_data(ImportConfig(url, [str(source) for source in sources], **config))
    assert verify(url) == []
    return Dataset.open(url)


def whole(dataset: Dataset, name: str = "fields") -> np.ndarray:
    """All of an array, by plain xarray."""
    return xarray.open_zarr(dataset.url)[name].values


def test_the_well(tmp_path: Path) -> None:
    written = well(tmp_path / "a.hdf5")
    dataset = imported(tmp_path, tmp_path / "a.hdf5")
    fields = whole(dataset)
    assert dataset.main.dimensions == ("trajectory", "time", "channel", "y", "x")
    channels = ["density", "profile", "velocity_y", "velocity_x", "stress_yy", "stress_yx", "stress_xy", "stress_xx"]
    assert dataset.attributes["channels"] == channels
    np.testing.assert_array_equal(fields[:, :, 0], written["density"])
    np.testing.assert_array_equal(fields[:, :, 1], np.broadcast_to(written["profile"][..., None], (3, T, Y, X)))
    np.testing.assert_array_equal(fields[:, :, 2:4], np.moveaxis(written["velocity"], -1, 2))
    np.testing.assert_array_equal(fields[:, :, 5], written["stress"][..., 0, 1])
    for name in ("depth", "mask", "heat", "drive"):
        np.testing.assert_array_equal(whole(dataset, name), written[name])
    np.testing.assert_array_equal(whole(dataset, "viscosity"), np.full(3, 0.1))
    np.testing.assert_array_equal(whole(dataset, "gamma"), np.full(3, 1.5))
    np.testing.assert_allclose(whole(dataset, "time"), np.linspace(0, 1, T), rtol=1e-7)
    assert dataset.attributes["dt"] == 0.25
    assert dataset.attributes["boundary_conditions"] == {"x": "periodic"}
    assert dataset.attributes["source"] == {"layout": "well", "version": 3, "files": ["a.hdf5"]}
    expected = fields.astype(np.float64)
    np.testing.assert_allclose(dataset.attributes["statistics"]["mean"], expected.mean((0, 1, 3, 4)), atol=1e-14)
    np.testing.assert_allclose(dataset.attributes["statistics"]["std"], expected.std((0, 1, 3, 4)), rtol=1e-12)


def test_a_folder_of_the_well_has_its_splits(tmp_path: Path) -> None:
    parts = {}
    for i, (folder, names) in enumerate((("train", "ab"), ("valid", "c"), ("test", "d"))):
        for name in names:
            file = tmp_path / "tiny/data" / folder / f"{name}.hdf5"
            parts[name] = well(file, n=2, seed=10 * (i + 1) + ord(name), viscosity=0.1 * (1 + i))["density"]
    dataset = imported(tmp_path, tmp_path / "tiny")
    assert dataset.splits == {"train": (0, 4), "validation": (4, 6), "test": (6, 8)}
    np.testing.assert_array_equal(whole(dataset)[:, :, 0], np.concatenate([parts[name] for name in "abcd"]))
    np.testing.assert_allclose(whole(dataset, "viscosity"), [0.1] * 4 + [0.2] * 2 + [0.3] * 2)


def test_pdebench_tensors_of_two_parameters(tmp_path: Path) -> None:
    a = tensor(tmp_path / "beta0.1.hdf5", n=6, beta=0.1)
    b = tensor(tmp_path / "beta0.4.hdf5", n=4, seed=1, beta=0.4)
    dataset = imported(tmp_path, tmp_path / "*.hdf5", fractions={"train": 0.5, "validation": 0.3, "test": 0.2})
    assert dataset.splits == {"train": (0, 5), "validation": (5, 8), "test": (8, 10)}
    order = [a[:3], b[:2], a[3:5], b[2:3], a[5:], b[3:]]  # each file takes part in each split
    np.testing.assert_array_equal(whole(dataset)[:, :, 0], np.concatenate(order))
    np.testing.assert_array_equal(whole(dataset, "beta"), [0.1] * 3 + [0.4] * 2 + [0.1] * 2 + [0.4, 0.1, 0.4])
    assert dataset.attributes["dt"] == 0.25 and dataset.attributes["channels"] == ["u"]


@pytest.mark.parametrize(
    ("files", "each", "expected"),
    [
        (10, 1, {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}),
        (40, 3, {"train": (0, 96), "validation": (96, 108), "test": (108, 120)}),
    ],
)
def test_shares_are_exact_over_files_of_few_trajectories(
    tmp_path: Path, files: int, each: int, expected: dict[str, tuple[int, int]]
) -> None:
    for i in range(files):
        tensor(tmp_path / f"{i:02d}.hdf5", n=each, seed=i)
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    dataset = imported(tmp_path, tmp_path / "*.hdf5", fractions=shares)
    assert dataset.splits == expected
    assert len({trajectory.tobytes() for trajectory in whole(dataset)}) == files * each


def test_a_share_without_a_trajectory_is_refused(tmp_path: Path) -> None:
    tensor(tmp_path / "a.hdf5", n=2)
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    with pytest.raises(DataError, match=r"split validation=0\.1: gets none of the 2 trajectories"):
        imported(tmp_path, tmp_path / "a.hdf5", fractions=shares)


def test_pdebench_darcy(tmp_path: Path) -> None:
    written = darcy(tmp_path / "darcy.hdf5")
    dataset = imported(tmp_path, tmp_path / "darcy.hdf5", options={"channels": "pressure"})
    np.testing.assert_array_equal(whole(dataset)[:, :, 0], written["tensor"])
    np.testing.assert_array_equal(whole(dataset, "nu"), written["nu"])
    assert dataset.attributes["channels"] == ["pressure"] and "dt" not in dataset.attributes


def test_pdebench_gas(tmp_path: Path) -> None:
    written = gas(tmp_path / "cfd.hdf5")
    dataset = imported(tmp_path, tmp_path / "cfd.hdf5", level=1)
    np.testing.assert_array_equal(whole(dataset), np.stack(list(written.values()), 2))
    assert dataset.attributes["channels"] == list(written) and dataset.attributes["dt"] == 0.1
    np.testing.assert_array_equal(whole(dataset, "M"), np.full(4, 0.1))
    assert dataset.main.spec.level == 1


def test_pdebench_groups(tmp_path: Path) -> None:
    data = groups(tmp_path / "react.h5")
    dataset = imported(tmp_path, tmp_path / "react.h5")
    np.testing.assert_array_equal(whole(dataset), np.moveaxis(data, -1, 2))
    assert dataset.attributes["channels"] == ["u_0", "u_1"]


def test_pdebench_flow(tmp_path: Path) -> None:
    written = flow(tmp_path / "ns.h5")
    dataset = imported(tmp_path, tmp_path / "ns.h5")
    both = np.concatenate([written["velocity"], written["particles"]], -1)
    np.testing.assert_array_equal(whole(dataset), np.moveaxis(both, -1, 2))
    assert dataset.attributes["channels"] == ["velocity_x", "velocity_y", "particles"]
    np.testing.assert_array_equal(whole(dataset, "force_y"), written["force"][..., 1])
    np.testing.assert_array_equal(whole(dataset, "times"), written["t"])
    assert dataset.attributes["dt"] == 0.5


def netcdf(axes: tuple[str, ...]) -> xarray.Dataset:
    sizes = {"time": T, "member": 3, "lat": Y, "lon": X}
    shape = tuple(sizes[axis] for axis in axes)
    return xarray.Dataset(
        {
            "h": (axes, values(shape), {"units": "m"}),
            "u": (axes, values(shape, 1), {"units": "m/s"}),
            "land": (("lat", "lon"), values((Y, X), 2) > 0),
            "drag": (("member",), values((3,), 3)),
        },
        coords={
            "time": ("time", 6.0 * np.arange(T), {"units": "hours since 2000-01-01"}),
            "lat": np.linspace(-80, 80, Y),
        },
        attrs={"title": "tiny", "institution": "none"},
    )


@pytest.mark.parametrize("axes", [("member", "time", "lat", "lon"), ("time", "lat", "lon", "member")])
@pytest.mark.parametrize("kind", ["nc", "zarr"])
def test_xarray_in_any_order_of_axes(tmp_path: Path, axes: tuple[str, ...], kind: str) -> None:
    data = netcdf(axes)
    if kind == "nc":
        data.to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    else:
        data.to_zarr(tmp_path / "a.zarr", zarr_format=2)
    dataset = imported(tmp_path, tmp_path / f"a.{kind}", options={"space": "lat,lon"})
    expected = np.stack([data[name].transpose("member", "time", "lat", "lon").values for name in ("h", "u")], 2)
    np.testing.assert_array_equal(whole(dataset), expected)
    assert dataset.main.dimensions == ("trajectory", "time", "channel", "lat", "lon")
    assert dataset.attributes["units"] == {"h": "m", "u": "m/s", "time": "hours since 2000-01-01"}
    assert dataset.attributes["dt"] == 6.0 and dataset.attributes["source_attributes"]["title"] == "tiny"
    np.testing.assert_array_equal(whole(dataset, "drag"), data["drag"].values)
    np.testing.assert_array_equal(whole(dataset, "land").astype(bool), data["land"].values)


def test_netcdf_of_one_trajectory_a_file_with_a_channel_axis(tmp_path: Path) -> None:
    parts = []
    for i in range(4):
        data = values((T, Y, X, 2), i)
        xarray.Dataset({"w": (("t", "y", "x", "channel"), data)}, coords={"channel": ["a", "b"]}).to_netcdf(
            tmp_path / f"{i}.nc", engine="h5netcdf"
        )
        parts.append(np.moveaxis(data, -1, 1))
    dataset = imported(tmp_path, tmp_path, fractions={"train": 0.75, "test": 0.25})
    assert dataset.attributes["channels"] == ["a", "b"] and dataset.splits == {"train": (0, 3), "test": (3, 4)}
    found = sorted(whole(dataset).tobytes()[i * parts[0].nbytes : (i + 1) * parts[0].nbytes] for i in range(4))
    assert found == sorted(part.tobytes() for part in parts)


@pytest.mark.parametrize(
    "axes", ["trajectory,time,channel,y,x", "time,trajectory,y,channel,x", "y,x,channel,time,trajectory"]
)
@pytest.mark.parametrize("remote", [0, 8, 100, files.BLOCK_BYTES])  # bytes of a block; 0: local
def test_npy_in_any_order_of_axes(
    tmp_path: Path, axes: str, remote: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datamodules.store import Store

    monkeypatch.setattr(files, "BLOCK_BYTES", remote or files.BLOCK_BYTES)
    names = axes.split(",")
    sizes = {"trajectory": 3, "time": T, "channel": 2, "y": Y, "x": X}
    data = values(tuple(sizes[name] for name in names))
    np.save(tmp_path / "a.npy", data)
    source = str(tmp_path / "a.npy")
    if remote:
        Store(memory).write("a.npy", (tmp_path / "a.npy").read_bytes())
        source = f"{memory}/a.npy"
    dataset = imported(tmp_path, source, options={"axes": axes, "dt": "0.5", "channels": "p,q"})
    wanted = [names.index(name) for name in ("trajectory", "time", "channel", "y", "x")]
    np.testing.assert_array_equal(whole(dataset), np.transpose(data, wanted))
    assert dataset.attributes["channels"] == ["p", "q"] and dataset.attributes["dt"] == 0.5


def test_from_s3_to_s3(tmp_path: Path, s3) -> None:
    from datamodules.store import Store

    written = well(tmp_path / "a.hdf5")
    Store(s3.url("raw")).write("data/train/a.hdf5", (tmp_path / "a.hdf5").read_bytes())
    bucket = s3.url("raw")
    Store(bucket).write("data/train/a.hdf5", (tmp_path / "a.hdf5").read_bytes())
    url = import_data(ImportConfig(f"{bucket}/out", [f"{bucket}/data"], dtype="bfloat16"))
    dataset = Dataset.open(url)
    np.testing.assert_allclose(dataset.main.read((1,), 0, T)[:, 0], written["density"][1], rtol=2**-8)
    assert dataset.main.spec.dtype == "bfloat16" and verify(url) == []


def staggered(path: Path) -> xarray.Dataset:
    """Velocities on the faces of cells, a name without numbers, and a number for the whole file."""
    data = xarray.Dataset(
        {
            "u": (("time", "y", "xu"), values((T, Y, X + 1))),
            "v": (("time", "yv", "x"), values((T, Y + 1, X), 1)),
            "station": (("y",), np.array(["a"] * Y)),
            "nu": ((), 0.25),
            "time_bounds": (("time", "edge"), values((T, 2), 2)),
        },
        coords={"time": ("time", np.arange(T), {"bounds": "time_bounds"})},
    )
    data.to_netcdf(path, engine="h5netcdf")
    return data


def test_variables_that_fit_nowhere_are_named_or_left_out_on_purpose(tmp_path: Path) -> None:
    data = staggered(tmp_path / "a.nc")
    with pytest.raises(
        DataError, match=r"a\.nc: fits nowhere: v \(time, yv, x\) float32; station \(y\) .*-o variables=u"
    ):
        imported(tmp_path, tmp_path / "a.nc")
    dataset = imported(tmp_path, tmp_path / "a.nc", options={"variables": "u"})
    assert sorted(dataset.arrays) == ["fields", "nu", "time"]  # bounds describe the times: no data
    np.testing.assert_array_equal(whole(dataset)[0, :, 0], data["u"].values)
    np.testing.assert_array_equal(whole(dataset, "nu"), [0.25])


def test_units_given_are_added_to_those_of_the_files(tmp_path: Path) -> None:
    axes = ("member", "time", "lat", "lon")
    netcdf(axes).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    dataset = imported(
        tmp_path, tmp_path / "a.nc", options={"space": "lat,lon"}, attributes={"units": {"u": "km/h", "drag": "1"}}
    )
    units = {"h": "m", "u": "km/h", "drag": "1", "time": "hours since 2000-01-01"}
    assert dataset.attributes["units"] == units

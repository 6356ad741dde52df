"""Zarr v3 groups with the sharding codec, as zarr-python and xarray write them, come out of an import value for value."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr

from datamodules.data import FieldsConfig, FieldsData
from datamodules.format import DataError, Dataset, verify
from datamodules.importers.run import ImportConfig, import_data
from datamodules.store import Store

from ..samples import write_fields
from .layouts import T, X, Y, values

AXES = ("trajectory", "time", "channel", "y", "x")
DATA = values((3, T, 2, Y, X))
CUT: dict[str, Any] = {
    "chunks": (1, 2, 1, 3, 4),
    "shards": (2, 4, 2, 6, 4),
}  # shards across channels, at ends cut short


def sharded(place: str, names: tuple[str, ...] | None, name: str | None = None, **options: Any) -> None:
    array = zarr.create_array(
        place, name=name, shape=DATA.shape, dtype="float32", dimension_names=names, fill_value=0, **CUT, **options
    )
    array[:] = DATA


def imported(tmp_path: Path, source: object, **options: str) -> Dataset:
    url = str(tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_data(ImportConfig(url, [str(source)], options=options))
    assert verify(url) == []
    return Dataset.open(url)


def whole(dataset: Dataset) -> np.ndarray:
    return np.stack([dataset.main.read((i,), 0, T) for i in range(dataset.main.shape[0])])


@pytest.mark.parametrize("name", ["a.zarr", "runs"])  # a group is known by what is in it
def test_a_group_of_zarr_python(tmp_path: Path, name: str) -> None:
    place = str(tmp_path / name)
    zarr.create_group(place, attributes={"title": "tiny"})
    sharded(place, AXES, "w", compressors=zarr.codecs.BloscCodec())
    zarr.create_array(place, name="drag", data=np.arange(3.0), shards=(2,), chunks=(1,), dimension_names=["trajectory"])
    dataset = imported(tmp_path, place)
    np.testing.assert_array_equal(whole(dataset), DATA)
    np.testing.assert_array_equal(dataset.arrays["drag"].read((), 0, 3), np.arange(3.0))
    assert dataset.attributes["channels"] == ["w_0", "w_1"]
    assert dataset.attributes["source_attributes"] == {"title": "tiny"}


@pytest.mark.parametrize("kind", ["group", "array"])
def test_axes_without_names_are_named_by_an_option(tmp_path: Path, kind: str) -> None:
    place = str(tmp_path / "a.zarr")
    sharded(place, None, "u" if kind == "group" else None)
    with pytest.raises(DataError, match=r"u has shape \(3, 5, 2, 6, 8\) and no names for its axes; .*-o axes=\.\.\."):
        imported(tmp_path, place)
    with pytest.raises(DataError, match=r"no names for its axes; axes=time,x names 2"):
        imported(tmp_path, place, axes="time,x")
    order = "channel,time,trajectory,y,x"  # the option's word counts, not the place
    dataset = imported(tmp_path, place, axes=order)
    np.testing.assert_array_equal(
        np.stack([dataset.main.read((i,), 0, T) for i in range(2)]), np.transpose(DATA, (2, 1, 0, 3, 4))
    )
    assert dataset.attributes["channels"] == ["u_0", "u_1", "u_2"]


@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")  # zarr's, of what it writes itself
def test_a_group_of_xarray_streams_after_import(tmp_path: Path, consolidated: bool) -> None:
    data = xarray.Dataset(
        {"u": (("member", "time", "y", "x"), DATA[:, :, 0], {"units": "m/s"}), "nu": (("member",), [0.1, 0.2, 0.3])},
        coords={"time": ("time", 0.5 * np.arange(T))},
    )
    encoding = {"u": {"chunks": (1, 2, 3, 4), "shards": (2, 4, 6, 4)}}
    data.to_zarr(tmp_path / "a.zarr", zarr_format=3, encoding=encoding, consolidated=consolidated)
    metadata = zarr.open_array(str(tmp_path / "a.zarr"), path="u", mode="r").metadata.to_dict()
    assert metadata["zarr_format"] == 3 and metadata["codecs"][0]["name"] == "sharding_indexed"
    dataset = imported(tmp_path, tmp_path / "a.zarr")
    np.testing.assert_array_equal(whole(dataset)[:, :, 0], DATA[:, :, 0])
    assert dataset.attributes["dt"] == 0.5 and dataset.attributes["units"] == {"u": "m/s"}
    module = FieldsData(FieldsConfig(url=dataset.url, frames=T, parameters=["nu"]), global_batch=3)
    module.configure(1, 0)
    batch = next(iter(stream := module.train_dataloader()))
    stream.close()
    order = batch["index"].argsort()
    np.testing.assert_array_equal(batch["fields"][order][:, :, 0].numpy(), DATA[:, :, 0])
    np.testing.assert_allclose(batch["nu"][order].numpy(), [0.1, 0.2, 0.3])


def test_from_an_object_store(tmp_path: Path, s3: Any) -> None:
    sharded(str(tmp_path / "a.zarr"), AXES, "u")
    bucket, here = Store(s3.url("raw")), Store(str(tmp_path))
    for path in here.list("a.zarr"):
        bucket.write(path, here.read(path))
    np.testing.assert_array_equal(whole(imported(tmp_path, f"{bucket.url}/a.zarr")), DATA)


def test_refusals_are_one_clear_line(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w").create_group("below")
    sharded(str(tmp_path / "a.zarr"), AXES, "below/u")
    with pytest.raises(DataError, match=r"a\.zarr: has no arrays; give the group below it that has"):
        imported(tmp_path, tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=r"option axes=t,x: has no effect, the arrays of .*below name their axes"):
        imported(tmp_path, tmp_path / "a.zarr" / "below", axes="t,x")
    write_fields(str(tmp_path / "keel"))
    with pytest.raises(DataError, match="is a data set of Keel's already"):
        imported(tmp_path, tmp_path / "keel")
    with pytest.raises(DataError, match=r"none\.zarr: cannot be opened as a Zarr group"):
        imported(tmp_path, tmp_path / "none.zarr")
    xarray.Dataset({"u": (("time", "x"), DATA[0, :, 0, 0])}).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="option axes=time,x: has no effect on NetCDF"):
        imported(tmp_path, tmp_path / "a.nc", axes="time,x")


@pytest.mark.parametrize("names", [("time", "x"), None], ids=["named", "unnamed"])
def test_arrays_that_do_not_fit_together_are_one_clear_line(tmp_path: Path, names: tuple[str, str] | None) -> None:
    place = str(tmp_path / "a.zarr")
    zarr.create_group(place)
    for name, extent in (("u", 4), ("v", 5)):
        zarr.create_array(place, name=name, data=np.zeros((3, extent)), dimension_names=names)
    options = {} if names else {"axes": "time,x"}
    with pytest.raises(DataError, match=r"a\.zarr: cannot be opened as a Zarr group \(.*conflicting sizes") as caught:
        imported(tmp_path, place, **options)
    assert "\n" not in str(caught.value)


def test_other_values_at_an_import_are_noticed(tmp_path: Path) -> None:
    sharded(str(tmp_path / "a.zarr"), AXES, "u")
    imported(tmp_path, tmp_path / "a.zarr")
    zarr.open_array(str(tmp_path / "a.zarr"), path="u")[:] = DATA + 1
    with pytest.raises(DataError, match="made from another config"):
        imported(tmp_path, tmp_path / "a.zarr")

"""Imports that stop, are restarted, must not fill memory, or are given what cannot be imported."""

from __future__ import annotations

import builtins
import importlib
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray

from datamodules.format import DataError, Dataset, Writer, verify
from datamodules.importers.base import Variable
from datamodules.importers.files import BLOCK_BYTES, BLOCKS, RangeFile, SourceFile
from datamodules.importers.pdebench import PDEBench
from datamodules.importers.run import ImportConfig, import_data
from datamodules.registry import names
from datamodules.store import Store

from .layouts import T, X, Y, darcy, gas, groups, tensor, values, well

MiB = 2**20


def run(tmp_path: Path, *sources: object, **config: object) -> Dataset:
    url = str(tmp_path / "out")
    return Dataset.open(import_data(ImportConfig(url, [str(source) for source in sources], **config)))


def files(url: Path) -> dict[str, bytes]:
    return {str(path.relative_to(url)): path.read_bytes() for path in sorted(url.rglob("*")) if path.is_file()}


# Memory


@pytest.mark.parametrize("level", [None, 1])
def test_memory_is_bounded_and_no_read_is_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int | None
) -> None:
    """24 MiB of file (12 trajectories) in blocks of 512 KiB: no read exceeds a block, and memory stays far below."""
    with h5py.File(tmp_path / "big.hdf5", "w") as f:
        f.create_dataset("tensor", (12, 128, 64, 64), "f4", chunks=(1, 4, 64, 64))
        for i in range(12):
            f["tensor"][i] = np.float32(i)
    read: list[int] = []
    real = Variable.__init__

    def tracked(self: Variable, dimensions, shape, dtype, inner, units="") -> None:
        def counted(i: int, a: int, b: int) -> np.ndarray:
            block = inner(i, a, b)
            read.append(block.nbytes)
            return block

        real(self, dimensions, shape, dtype, counted, units)

    monkeypatch.setattr(Variable, "__init__", tracked)
    size = (tmp_path / "big.hdf5").stat().st_size
    tracemalloc.start()
    try:
        dataset = run(tmp_path, tmp_path / "big.hdf5", shard_bytes=2 * MiB, block_bytes=MiB // 2, level=level)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 24 * MiB and sum(read) >= 24 * MiB
    assert max(read) <= MiB // 2
    assert peak < 10 * MiB  # a shard of 2 MiB, blocks of 0.5 MiB and their float64 moments
    assert dataset.main.shards == 12
    np.testing.assert_array_equal(dataset.main.read((7,), 100, 101), np.full((1, 1, 64, 64), 7, np.float32))
    np.testing.assert_allclose(dataset.attributes["statistics"]["mean"], [5.5])


@pytest.mark.parametrize("level", [None, 1])
def test_a_file_of_one_long_trajectory_does_not_fill_memory_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int | None
) -> None:
    monkeypatch.setattr("datamodules.format.shard.SPILL_BYTES", MiB)
    with h5py.File(tmp_path / "long.hdf5", "w") as f:
        f.create_dataset("tensor", (1, 1024, 64, 64), "f4", chunks=(1, 8, 64, 64))
        for a in range(0, 1024, 64):
            f["tensor"][0, a : a + 64] = np.random.default_rng(a).standard_normal((64, 64, 64))
        expected = f["tensor"][0, 1000]
    tracemalloc.start()
    try:
        dataset = run(tmp_path, tmp_path / "long.hdf5", block_bytes=MiB // 2, level=level)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dataset.objects[dataset.main.shard_path(0)].size > 12 * MiB
    assert peak < 6 * MiB
    np.testing.assert_array_equal(dataset.main.read((0,), 1000, 1001)[0, 0], expected)
    assert verify(dataset.url) == []


def test_a_remote_file_is_read_in_blocks(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = np.random.default_rng(0).integers(0, 256, 3 * BLOCK_BYTES + 77, dtype=np.uint8).tobytes()
    store = Store(memory)
    store.write("f", content)
    ranges: list[tuple[int, int]] = []
    real = Store.read_range
    monkeypatch.setattr(Store, "read_range", lambda self, p, a, b: ranges.append((a, b)) or real(self, p, a, b))
    with SourceFile(store, "f").handle() as file:
        for at, count in (
            (0, 10),
            (BLOCK_BYTES - 5, 10),
            (len(content) - 7, 100),
            (5, 3),
            (2 * BLOCK_BYTES, BLOCK_BYTES),
        ):
            file.seek(at)
            assert file.read(count) == content[at : at + count]
    assert max(b - a for a, b in ranges) <= BLOCK_BYTES and len(ranges) == len(set(ranges))
    raw = RangeFile(store, "f")
    monkeypatch.setattr("datamodules.importers.files.BLOCKS", 2)
    raw.readall()
    assert len(raw._blocks) <= 2 < BLOCKS


# Restart


def test_an_interrupted_import_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gas(tmp_path / "a.hdf5", n=6)
    config = ImportConfig(str(tmp_path / "out"), [str(tmp_path / "a.hdf5")], shard_bytes=T * 4 * X * Y * 4)
    import_data(ImportConfig(str(tmp_path / "whole"), config.sources, shard_bytes=config.shard_bytes))
    real, written = Writer.write_bytes, []

    def failing(self: Writer, name: str, k: int, *rest: object) -> object:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append((name, k))
        return real(self, name, k, *rest)

    monkeypatch.setattr(Writer, "write_bytes", failing)
    with pytest.raises(KeyboardInterrupt):
        import_data(config)
    with pytest.raises(DataError, match="unfinished"):
        Dataset.open(config.url)
    kept = set(written)
    monkeypatch.setattr(Writer, "write_bytes", lambda self, *a: written.append(a[:2]) or real(self, *a))
    import_data(config)
    assert len(written) == len(set(written)) and kept < set(written)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    import_data(config)  # finished: nothing to do
    assert len(written) == len(set(written))


def test_other_files_at_an_unfinished_import_are_refused(tmp_path: Path) -> None:
    tensor(tmp_path / "a.hdf5")
    run(tmp_path, tmp_path / "a.hdf5")
    tensor(tmp_path / "a.hdf5", seed=1)
    with pytest.raises(DataError, match="made from another config"):
        run(tmp_path, tmp_path / "a.hdf5")


# Values


def test_nan_is_named_and_can_be_allowed(tmp_path: Path) -> None:
    gas(tmp_path / "good.hdf5")
    gas(tmp_path / "holes.hdf5")
    with h5py.File(tmp_path / "holes.hdf5", "a") as f:
        f["pressure"][2, 3, 1, 1] = np.nan
        f["Vx"][0, 0, 0, 0] = np.inf
        f["Vy"][:] = np.nan
        held = f["pressure"][()]
    with pytest.raises(
        DataError, match=r"holes.hdf5: fields holds inf at trajectory 0, time 0, channel Vx; .*--allow-nan"
    ):
        run(tmp_path, tmp_path / "*.hdf5")
    (tmp_path / "good.hdf5").unlink()
    with pytest.raises(DataError, match="made from another config"):
        run(tmp_path, tmp_path / "holes.hdf5", allow_nan=True)
    with pytest.raises(DataError, match="holds inf"):
        run(tmp_path / "b", tmp_path / "holes.hdf5")
    dataset = run(tmp_path / "b", tmp_path / "holes.hdf5", allow_nan=True)  # goes on where it stopped
    assert np.isnan(dataset.main.read((2,), 3, 4)[0, 1, 1, 1])
    found = dataset.attributes["statistics"]
    np.testing.assert_allclose([found[k][1] for k in ("mean", "std", "min", "max")],
                               [np.nanmean(held, dtype="f8"), np.nanstd(held, dtype="f8"), np.nanmin(held), np.nanmax(held)])  # fmt: skip
    assert np.isfinite([value for values in found.values() for value in values]).all()


def test_values_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    data = tensor(tmp_path / "a.hdf5")
    data[1, 2, 3] = 1e6
    with h5py.File(tmp_path / "a.hdf5", "a") as f:
        f["tensor"][()] = data
    with pytest.raises(DataError, match=r"1000000.0 at trajectory 1, time 2, channel u, which float16 cannot hold"):
        run(tmp_path, tmp_path / "a.hdf5", dtype="float16")
    assert run(tmp_path / "other", tmp_path / "a.hdf5", dtype="bfloat16").main.spec.dtype == "bfloat16"


# Shapes and layouts


def test_wrong_axis_order_is_told_with_the_axes(tmp_path: Path) -> None:
    well(tmp_path / "well.hdf5", swap=True)
    with pytest.raises(
        DataError, match=r"density has shape \(3, 5, 6, 8\).*\(trajectory=3, time=5, x=8, y=6\); wrong axis order"
    ):
        run(tmp_path, tmp_path / "well.hdf5")
    with h5py.File(tmp_path / "t.hdf5", "w") as f:
        f["tensor"], f["x-coordinate"], f["t-coordinate"] = values((2, X, T)), np.arange(X), np.arange(T)
    with pytest.raises(
        DataError, match=r"t-coordinate has 5 entries but axis time.*\(trajectory, time, x\): wrong axis order"
    ):
        run(tmp_path, tmp_path / "t.hdf5")
    groups(tmp_path / "g.h5")
    with h5py.File(tmp_path / "g.h5", "a") as f:
        del f["0000/grid/x"]
        f["0000/grid/x"] = np.arange(X)
    with pytest.raises(DataError, match=r"grid/x has 8 entries where \(t, x, y, channel\) needs 6: wrong axis order"):
        run(tmp_path, tmp_path / "g.h5")
    np.save(tmp_path / "a.npy", values((2, 3, 4)))
    with pytest.raises(DataError, match=r"shape \(2, 3, 4\), 3 axes, but axes=trajectory,time,channel,y,x names 5"):
        run(tmp_path, tmp_path / "a.npy")
    xarray.Dataset({"u": (("a", "b"), values((3, 4)))}).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    with pytest.raises(DataError, match=r"none of its axes \(a, b\) is time; name it with -o time=AXIS"):
        run(tmp_path, tmp_path / "a.nc")


def test_mixed_shapes_between_files(tmp_path: Path) -> None:
    well(tmp_path / "a.hdf5")
    well(tmp_path / "b.hdf5", x=10)
    with pytest.raises(DataError, match=r"b.hdf5: mixed shapes: fields is \(.*x=10\) but in .*a.hdf5 \(.*x=8\)"):
        run(tmp_path, tmp_path / "a.hdf5", tmp_path / "b.hdf5")


def test_mixed_shapes_within_a_file(tmp_path: Path) -> None:
    groups(tmp_path / "g.h5")
    with h5py.File(tmp_path / "g.h5", "a") as f:
        del f["0002/data"]
        f["0002/data"] = values((T, Y, X + 1, 2))
    with pytest.raises(DataError, match=r"0002/data has shape .* but 0000/data .*mixed shapes"):
        run(tmp_path, tmp_path / "g.h5")


def test_different_dt_or_static_arrays_do_not_mix(tmp_path: Path) -> None:
    tensor(tmp_path / "a.hdf5")
    tensor(tmp_path / "b.hdf5")
    with h5py.File(tmp_path / "b.hdf5", "a") as f:
        f["x-coordinate"][...] *= 2
    with pytest.raises(DataError, match=r"b.hdf5: x differs from that of .*a.hdf5"):
        run(tmp_path, tmp_path / "a.hdf5", tmp_path / "b.hdf5")
    with h5py.File(tmp_path / "b.hdf5", "a") as f:
        f["t-coordinate"][...] *= 2
    with pytest.raises(DataError, match=r"b.hdf5: dt=0.5 but .*a.hdf5 has 0.25"):
        run(tmp_path, tmp_path / "a.hdf5", tmp_path / "b.hdf5")


def test_unknown_layouts_and_files(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "odd.h5", "w") as f:
        f["weights"] = np.zeros(3)
    with pytest.raises(DataError, match=r"odd.h5: unknown layout; name one with --layout: netcdf, npy, pdebench, well"):
        run(tmp_path, tmp_path / "odd.h5")
    with pytest.raises(DataError, match=r"odd.h5: has weights: none of PDEBench's layouts"):
        run(tmp_path, tmp_path / "odd.h5", layout="pdebench")
    with pytest.raises(DataError, match=r"odd.h5: is not in the layout of The Well"):
        run(tmp_path, tmp_path / "odd.h5", layout="well")
    for name in ("text.h5", "text.npy", "text.nc"):
        (tmp_path / name).write_text("hello" * 100)
        with pytest.raises(DataError, match=rf"{name}: (is not|cannot be opened)"):
            run(tmp_path, tmp_path / name)
    np.save(tmp_path / "object.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match=r"object.npy: is not a plain .npy file"):
        run(tmp_path, tmp_path / "object.npy")
    for missing in ("nothing.h5", "*.hdf5", "folder/"):
        with pytest.raises(DataError, match="no such file, nor a folder of files that end in"):
            run(tmp_path, tmp_path / missing)
    with pytest.raises(ValueError, match="did you mean pdebench"):
        run(tmp_path, tmp_path / "odd.h5", layout="pdebenhc")


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor(tmp_path / "a.hdf5")
    xarray.Dataset({"u": (("time", "x"), values((3, 4)))}).to_netcdf(tmp_path / "a.nc", engine="h5netcdf")
    real = importlib.import_module

    def without(name: str, *rest: object) -> object:
        if name in ("h5py", "h5netcdf"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr("datamodules.importers.base.importlib.import_module", without)
    for file, package in (("a.hdf5", "h5py"), ("a.nc", "h5netcdf")):
        with pytest.raises(DataError, match=rf"needs the package {package}: pip install 'keel\[import\]'"):
            run(tmp_path, tmp_path / file)


def test_the_importers_need_no_extra_to_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *a, **k: (_ for _ in ()).throw(ImportError(name)) if name == "h5py" else real(name, *a, **k),
    )
    from datamodules.registry import lookup

    assert names("importer") == ["netcdf", "npy", "pdebench", "well"]
    assert lookup("importer", "pdebench")[1] is PDEBench


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fractions": {"train": 0.5}}, "add up to 1"),
        ({"fractions": {"dev": 1.0}}, "split 'dev'"),
        ({"splits": {"train": ["a"]}}, "not both"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"block_bytes": 0}, "block_bytes=0"),
    ],
)
def test_impossible_configs(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImportConfig("out", ["in"], **config)


def test_options_and_sources_are_checked(tmp_path: Path) -> None:
    darcy(tmp_path / "a.hdf5")
    with pytest.raises(ValueError, match="option axes: layout pdebench has none such; it has channels"):
        run(tmp_path, tmp_path / "a.hdf5", options={"axes": "x"})
    with pytest.raises(DataError, match="has 1 channels"):
        run(tmp_path, tmp_path / "a.hdf5", options={"channels": "a,b"})
    with pytest.raises(DataError, match="is given twice"):
        run(tmp_path, tmp_path / "a.hdf5", tmp_path / "*.hdf5")
    np.save(tmp_path / "a.npy", values((2, 3)))
    with pytest.raises(ValueError, match="option dt=fast: must be a number"):
        run(tmp_path, tmp_path / "a.npy", options={"dt": "fast", "axes": "time,x"})


def test_splits_by_their_own_sources(tmp_path: Path) -> None:
    a, b = tensor(tmp_path / "a.hdf5", n=3), tensor(tmp_path / "b.hdf5", n=2, seed=1)
    splits = {"test": [str(tmp_path / "a.hdf5")], "train": [str(tmp_path / "b.hdf5")]}
    dataset = Dataset.open(import_data(ImportConfig(str(tmp_path / "out"), splits=splits)))
    assert dataset.splits == {"train": (0, 2), "test": (2, 5)} and verify(dataset.url) == []
    np.testing.assert_array_equal(dataset.main.read((1,), 0, T)[:, 0], b[1])
    np.testing.assert_array_equal(dataset.main.read((4,), 0, T)[:, 0], a[2])

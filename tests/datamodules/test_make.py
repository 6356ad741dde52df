"""Making data sets: deterministic, restartable, and nothing half-made taken for whole."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

from datamodules import make as make_module
from datamodules.format import DataError, Dataset, verify
from datamodules.make import MakeConfig, load, make
from datamodules.store import OutOfSpace, Store, local
from datamodules.text_files import TextFiles
from tests.conftest import unavailable

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
TINY = str(CONFIGS / "tiny_navier_stokes_2d.yaml")


def tiny(url, *overrides: str) -> MakeConfig:
    return load(TINY, [f"url={url}", *overrides])


def tree(url) -> dict[str, bytes]:
    store = Store(str(url))
    return {path: store.read(path) for path in store.list()}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> str:
    return make(tiny(tmp_path_factory.mktemp("made") / "data"))


def test_a_made_data_set(made):
    dataset = Dataset.open(made)
    assert dataset.main.shape == (24, 8, 1, 16, 16) and dataset.main.shards == 6
    assert dataset.splits == {"train": (0, 16), "validation": (16, 20), "test": (20, 24)}
    assert dataset.attributes["generator"]["name"] == "navier_stokes_2d" and dataset.attributes["dt"] == 0.5
    assert dataset.attributes["generator"]["config"]["viscosity"] == 1e-3
    fields = np.stack([dataset.main.read((i,), 0, 8) for i in range(16)])
    np.testing.assert_allclose(dataset.attributes["statistics"]["std"], [fields.astype("f8").std()], rtol=1e-12)
    assert verify(made) == [] and not any(name.startswith("_parts") for name in tree(made))
    data = xarray.open_zarr(made)
    assert data["fields"].dims == ("trajectory", "time", "channel", "x", "y")
    np.testing.assert_allclose(data["time"], 0.5 * np.arange(8))


def test_workers_and_store_do_not_change_a_byte(made, tmp_path, s3):
    seen: list[tuple[int, int]] = []
    parallel = make(tiny(tmp_path / "p", "workers=2"), lambda done, total: seen.append((done, total)))
    assert tree(parallel) == tree(made)
    assert seen == [(i, 9) for i in range(10)]
    remote = make(tiny(s3.url("data")))
    assert {path: Store(remote).read(path) for path in Store(remote).list()} == tree(made)


def test_seed_changes_the_data(made, tmp_path):
    assert Dataset.open(make(tiny(tmp_path, "seed=1"))).fingerprint != Dataset.open(made).fingerprint


def count_computed(monkeypatch) -> list[tuple[str, int]]:
    computed: list[tuple[str, int]] = []
    real = make_module.Writer.write_shard

    def write_shard(self, name, k, *rest):
        computed.append((name, k))
        return real(self, name, k, *rest)

    monkeypatch.setattr(make_module.Writer, "write_shard", write_shard)
    return computed


def test_a_finished_data_set_is_left_alone(made, monkeypatch):
    computed, seen = count_computed(monkeypatch), []
    before = tree(made)
    assert make(tiny(made), lambda *counts: seen.append(counts)) == made
    assert computed == [] and seen == [(9, 9)] and tree(made) == before


def test_the_source_of_a_finished_data_set_is_not_asked(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("words " * 100)
    given = {"name": "text_files", "paths": [str(tmp_path / "a.txt")], "validation": 0.0, "test": 0.0}
    config = MakeConfig(url=str(tmp_path / "data"), generator=given)
    url, before = make(config), tree(tmp_path / "data")

    def asked(self):
        raise AssertionError("the source was asked")

    for name in ("source", "specs", "attributes"):
        monkeypatch.setattr(TextFiles, name, asked)
    assert make(config) == url and tree(url) == before
    with pytest.raises(DataError, match=r"the data set there was made from another config \(generator.seed: 0 -> 1\)"):
        make(replace(config, seed=1))


def test_an_interrupted_make_keeps_its_finished_shards(made, tmp_path, monkeypatch):
    url = str(tmp_path / "data")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tiny(url), stop)
    with pytest.raises(DataError, match="unfinished"):
        Dataset.open(url)
    shard = Path(url, "fields/c/1/0/0/0/0")  # one of the finished shards is damaged meanwhile, one is lost
    shard.write_bytes(shard.read_bytes()[:-1])
    Path(url, "fields/c/2/0/0/0/0").unlink()
    computed = count_computed(monkeypatch)
    make(tiny(url))
    assert computed == [("fields", 1), ("fields", 2), ("fields", 4), ("fields", 5), ("time", 0), ("x", 0), ("y", 0)]
    assert tree(url) == tree(made)


def test_killed_outright_and_made_again(made, tmp_path):
    url = str(tmp_path / "data")
    program = f"from datamodules.make import *; make(load({TINY!r}, ['url={url}', 'workers=1']))"
    child = subprocess.Popen(
        [sys.executable, "-c", f"if __name__ == '__main__':\n  {program}"],
        cwd=CONFIGS.parents[1],
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not Path(url, "_parts/fields").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)  # the parent alone: its workers must not live on
    child.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(child.pid, signal.SIGKILL)
        pytest.fail("workers outlived their parent")
    make(tiny(url))
    kept = {path: data for path, data in tree(url).items() if not path.endswith(local.TEMPORARY)}
    assert kept == tree(made)


def test_another_config_at_the_url_is_refused(made, tmp_path):
    with pytest.raises(DataError, match=r"made from another config \(generator.config.viscosity: 0.001 -> 0.002\)"):
        make(tiny(made, "generator.viscosity=2e-3"))
    with pytest.raises(DataError, match="shard_bytes: 40960 -> 9999"):
        make(tiny(made, "shard_bytes=9999"))
    url = str(tmp_path / "data")
    with pytest.raises(ZeroDivisionError):
        make(tiny(url), lambda done, total: done and 1 / 0)
    with pytest.raises(
        DataError, match=r"the unfinished data set there was made from another config \(generator.seed: 0 -> 5\)"
    ):
        make(tiny(url, "seed=5"))


def test_disk_full_is_one_line_and_leaves_nothing_whole(tmp_path, monkeypatch, made):
    url, real, left = str(tmp_path / "data"), os.write, 120_000

    def write(handle: int, data) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(handle, bytes(data[:left]))
        left -= done
        return done

    monkeypatch.setattr(local.os, "write", write)
    with pytest.raises(OutOfSpace, match=r"fields/c/\d/0/0/0/0: no space left") as caught:
        make(tiny(url))
    assert "\n" not in str(caught.value)
    assert not [name for _, _, names in os.walk(url) for name in names if name.endswith(local.TEMPORARY)]
    with pytest.raises(DataError, match="unfinished"):
        Dataset.open(url)
    left = 10**9
    make(tiny(url))
    assert tree(url) == tree(made)


def test_a_really_full_disk(tmp_path):
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        unavailable("a small tmpfs for the disk-full test needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        unavailable("a small tmpfs for the disk-full test cannot be mounted here")
    try:
        with pytest.raises(OutOfSpace, match="no space left"):
            make(tiny(tmp_path / "data"))
        with pytest.raises(DataError, match="unfinished"):
            Dataset.open(str(tmp_path / "data"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_makes_shards_that_zarr_and_xarray_read_alike(path, tmp_path):
    small = {
        "navier_stokes_2d": ["generator.dt=0.05", "generator.frames=2", "generator.train=1", "generator.validation=1",
                             "generator.test=0", "generator.batch=2"],
        "stdlib_text": ["generator.max_bytes=300000"],
    }  # fmt: skip
    if path.stem == "dysts" and importlib.util.find_spec("dysts") is None:
        unavailable("dysts is not installed: pip install 'keel[chaos]'")
    url = make(load(str(path), [f"url={tmp_path}/d", "workers=0", *small.get(path.stem, [])]))
    assert verify(url) == []
    dataset = Dataset.open(url)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group, data = zarr.open_group(url, mode="r"), xarray.open_zarr(url)
        assert set(group.array_keys()) == set(data.variables) == set(dataset.arrays) and dataset.arrays
        for name, array in dataset.arrays.items():
            expected, axis = np.empty(array.shape, array.dtype), array.window_axis
            for index in np.ndindex(array.shape[:axis]):
                array.read(index, 0, array.shape[axis], out=expected[index])
            assert data[name].dims == array.dimensions and data[name].dtype == group[name].dtype == array.dtype
            np.testing.assert_array_equal(group[name][...], expected)
            np.testing.assert_array_equal(data[name].values, expected)


@pytest.mark.parametrize(
    "overrides,message",
    [
        (["sead=1"], "sead: no such field; did you mean 'seed'"),
        (["generator.viscocity=1"], "generator.viscocity: no such field; did you mean 'viscosity'"),
        (["generator.name=navier_stoks"], "navier_stoks.*did you mean .*navier_stokes_2d"),
        (["generator.frames=many"], "generator.frames: .*many"),
        (["seed=x"], "seed: .*x"),
        (["workers=-1"], "workers=-1"),
        (["shard_bytes=0"], "shard_bytes=0"),
        (["url=''"], "url: is missing"),
        (["generator.dt=-1"], "dt=-1"),
    ],
)
def test_mistakes_in_a_config_are_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        make(tiny(tmp_path, *overrides))
    assert not re.search(r"\n", str(caught.value))


def test_a_config_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml"):
        load(str(tmp_path / "none.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"bad\.yaml: not a valid config"):
        load(str(tmp_path / "bad.yaml"))

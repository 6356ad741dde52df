"""Arrays of several resolutions in one data set: any of them can be streamed, with its own values, cuts and statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.data import FieldsConfig, FieldsData
from datamodules.format import ArraySpec, DataError, write_dataset
from datamodules.store import Store

N, T, C = 6, 5, 2
AXES = ("trajectory", "time", "channel")
FINE = np.random.default_rng(0).standard_normal((N, T, C, 8, 6)).astype(np.float32)
COARSE = FINE.reshape(N, T, C, 4, 2, 3, 2).mean((4, 6)).astype(np.float16)  # another type, too
THIN = FINE[:, :, :1, ::4, ::3].copy()  # fewer channels


@pytest.fixture
def url(memory: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The data set, on a local disk or on a store."""
    url = str(tmp_path / "data") if request.param == "local" else memory
    specs = {
        "fields": ArraySpec(FINE.shape, "float32", (*AXES, "y", "x"), 2),
        "coarse": ArraySpec(COARSE.shape, "float16", (*AXES, "y_4", "x_3"), 4, level=1),
        "thin": ArraySpec(THIN.shape, "float32", ("trajectory", "time", "channel_1", "y_2", "x_2"), 3),
    }
    splits = {"train": [0, 4], "validation": [4, N]}
    attributes = {"kind": "fields", "array": "fields", "channels": ["u", "v"], "dt": 0.5, "splits": splits}
    write_dataset(url, specs, {"fields": FINE, "coarse": COARSE, "thin": THIN}, attributes)
    return url


def data_of(url: str, tmp_path: Path, variable: str, **config: Any) -> FieldsData:
    given = {"url": url, "variable": variable, "frames": 2, "cache": str(tmp_path / "cache"), **config}
    data = FieldsData(FieldsConfig(**given), global_batch=4, seed=1)
    data.configure(1, 0)
    return data


@pytest.mark.parametrize("url", ["local", "store"], indirect=True)
@pytest.mark.parametrize(
    ("variable", "values", "channels"),
    [("fields", FINE, ["u", "v"]), ("coarse", COARSE, ["u", "v"]), ("thin", THIN, ["thin_0"])],
)
def test_each_resolution_streams_its_own_values(
    url: str, tmp_path: Path, variable: str, values: np.ndarray, channels: list[str]
) -> None:
    data, starts = data_of(url, tmp_path, variable), values.shape[1] - 1
    spec = data.spec()
    assert spec["space"] == list(values.shape[3:]) and spec["channels"] == channels
    assert spec["samples"] == 4 * starts
    seen, stream = set(), data.train_dataloader()
    for _, batch in zip(range(starts), stream, strict=False):  # an epoch
        for window, i in zip(batch["fields"].numpy(), batch["index"].tolist(), strict=True):
            trajectory, first = divmod(i, starts)
            np.testing.assert_array_equal(window, values[trajectory, first : first + 2].astype(np.float32))
            seen.add(i)
    stream.close()
    assert seen == set(range(4 * starts))
    held_out = [row for batch in data.val_dataloader() for row in batch["fields"].numpy()]
    expected = [values[i, a : a + 2] for i in range(4, N) for a in range(starts)]
    np.testing.assert_array_equal(held_out, np.stack(expected).astype(np.float32))
    moments = values[:4].astype(np.float64)
    np.testing.assert_allclose(spec["mean"], moments.mean((0, 1, 3, 4)), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(spec["std"], moments.std((0, 1, 3, 4)), rtol=1e-5)
    data.teardown()


@pytest.mark.parametrize("url", ["store"], indirect=True)
def test_the_others_are_not_read(url: str, tmp_path: Path) -> None:
    store = Store(url)
    for path in store.list("fields/c"):
        store.delete(path)
    data = data_of(url, tmp_path, "coarse")
    stream = data.train_dataloader()
    assert next(iter(stream))["fields"].shape == (4, 2, C, 4, 3)
    stream.close()
    data.teardown()


@pytest.mark.parametrize("url", ["local"], indirect=True)
def test_an_unknown_one_is_named(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no variable 'corse'; it has coarse, fields, thin; set data\.variable"):
        data_of(url, tmp_path, "corse").spec()

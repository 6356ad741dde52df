"""Element types, compression, arrays of mixed rank, and arrays that zarr-python and xarray have cut in their own way."""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.format import Array, ArraySpec, DataError, Dataset, verify, write_dataset
from datamodules.format.dtypes import STORABLE, from_bfloat16, to_bfloat16
from datamodules.format.shard import ShardEncoder, encode_shard
from datamodules.store import Store

AXES = ("trajectory", "time", "channel", "y", "x")
VALUES = np.random.default_rng(0).standard_normal((5, 4, 2, 6, 8)).astype(np.float32)
SMOOTH = np.round(np.sin(np.arange(VALUES.size).reshape(VALUES.shape) / 40), 2).astype(np.float32)
ATTRIBUTES = {"kind": "fields", "array": "fields", "splits": {"train": [0, 3], "test": [3, 5]}}


def typed(dtype: str, seed: int = 0) -> np.ndarray:
    """[5, 3, 2, 4] values over the whole range of a type (bits for bfloat16)."""
    rng, shape = np.random.default_rng(seed), (5, 3, 2, 4)
    if dtype == "bfloat16":
        return to_bfloat16(rng.standard_normal(shape).astype(np.float32))
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return rng.standard_normal(shape).astype(kind)
    if kind.kind == "b":
        return rng.random(shape) < 0.5
    limits = np.iinfo(kind)
    return rng.integers(limits.min, limits.max, shape, dtype=kind, endpoint=True)


@pytest.mark.parametrize("level", [None, 3])
@pytest.mark.parametrize("dtype", STORABLE)
def test_every_type_in_keel_zarr_and_xarray(tmp_path: Path, dtype: str, level: int | None) -> None:
    values, url = typed(dtype), str(tmp_path)
    spec = ArraySpec(values.shape, dtype, ("trajectory", "time", "channel", "x"), 2, level=level)
    write_dataset(url, {"fields": spec}, {"fields": values}, {**ATTRIBUTES})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = zarr.open_array(url, path="fields", mode="r")
        np.testing.assert_array_equal(stored[:], values)
        np.testing.assert_array_equal(xarray.open_zarr(url)["fields"].values, values)
    assert stored.attrs.asdict() == ({"keel_dtype": "bfloat16"} if dtype == "bfloat16" else {})
    array = Dataset.open(url).main
    read = np.stack([array.read((i,), 0, 3) for i in range(5)])
    expected = from_bfloat16(values) if dtype == "bfloat16" else values
    assert array.dtype == read.dtype == expected.dtype and array.spec.dtype == dtype
    np.testing.assert_array_equal(read, expected)
    assert verify(url) == []


def test_bfloat16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32)
    special = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x80000000, 0x00000001], np.uint32)
    values = np.concatenate([bits, special]).view(np.float32)
    ours = to_bfloat16(values)
    theirs = torch.from_numpy(values.copy()).bfloat16()
    number = ~np.isnan(values)
    np.testing.assert_array_equal(ours[number], theirs.view(torch.uint16).numpy()[number])
    assert np.isnan(from_bfloat16(ours[~number])).all()


def test_bfloat16_reads_as_a_tensor_and_from_float_values(tmp_path: Path) -> None:
    spec = ArraySpec(VALUES.shape, "bfloat16", AXES, 2)
    write_dataset(str(tmp_path), {"fields": spec}, {"fields": VALUES}, ATTRIBUTES)
    dataset = Dataset.open(str(tmp_path))
    tensor = torch.empty(3, *VALUES.shape[2:], dtype=torch.bfloat16)
    dataset.main.read((1,), 1, 4, out=tensor.view(torch.uint16).numpy())
    assert torch.equal(tensor, torch.from_numpy(VALUES[1, 1:4]).bfloat16())
    np.testing.assert_array_equal(dataset.main.read((1,), 1, 4), tensor.float().numpy())
    mean = from_bfloat16(to_bfloat16(VALUES[:3])).astype(np.float64).mean((0, 1, 3, 4))
    np.testing.assert_allclose(dataset.attributes["statistics"]["mean"], mean, atol=1e-3)


# Compression


def test_zstd_is_smaller_and_reads_back(tmp_path: Path) -> None:
    url = str(tmp_path)
    spec = ArraySpec(SMOOTH.shape, "float32", AXES, 2, level=5)
    write_dataset(url, {"fields": spec}, {"fields": SMOOTH}, ATTRIBUTES)
    dataset = pickle.loads(pickle.dumps(Dataset.open(url)))
    assert sum(info.size for path, info in dataset.objects.items() if "/c/" in path) < SMOOTH.nbytes
    for i in range(5):
        for a, b in ((0, 4), (1, 3), (3, 4)):
            np.testing.assert_array_equal(dataset.main.read((i,), a, b), SMOOTH[i, a:b])
    (piece,) = dataset.main.plan((3,), 1, 3)
    assert piece.chunks == 2 and sum(piece.lengths) == piece.stop - piece.start
    codecs = zarr.open_array(url, path="fields", mode="r").metadata.to_dict()["codecs"][0]["configuration"]["codecs"]
    assert [codec["name"] for codec in codecs] == ["bytes", "zstd", "crc32c"]


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 90), chunk=st.integers(2, 30), per_shard=st.integers(1, 4), data=st.data())
def test_any_window_of_compressed_tokens(tmp_path_factory, n: int, chunk: int, per_shard: int, data) -> None:
    values = (np.arange(n) // 3).astype(np.uint16)
    url = str(tmp_path_factory.mktemp("zstd"))
    spec = ArraySpec((n,), "uint16", ("token",), chunk * per_shard, chunk, level=1)
    write_dataset(url, {"tokens": spec}, {"tokens": values}, {"kind": "text", "array": "tokens", "splits": {}})
    a = data.draw(st.integers(0, n - 1))
    b = data.draw(st.integers(a + 1, n))
    np.testing.assert_array_equal(Dataset.open(url).main.read((), a, b), values[a:b])
    np.testing.assert_array_equal(zarr.open_array(url, path="tokens", mode="r")[:], values)


def test_indices_are_read_once_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ArraySpec(SMOOTH.shape, "float32", AXES, 1, level=3)
    write_dataset(str(tmp_path), {"fields": spec}, {"fields": SMOOTH}, ATTRIBUTES)
    array, reads = Dataset.open(str(tmp_path)).main, []
    real = Array._read_index
    monkeypatch.setattr(Array, "_read_index", lambda self, path: reads.append(path) or real(self, path))
    array.prepare(range(5))
    for _ in range(2):
        for i in range(5):
            array.plan((i,), 0, 4)
    assert sorted(reads) == [array.shard_path(k) for k in range(5)]


@pytest.mark.parametrize(
    ("at", "report"), [(3, r"\(chunk 0 at byte 0\)"), (-30, r"\(in the shard index\)")], ids=["chunk", "index"]
)
def test_damage_in_a_compressed_shard_is_named(tmp_path: Path, at: int, report: str) -> None:
    spec = ArraySpec(SMOOTH.shape, "float32", AXES, 2, level=3)
    write_dataset(str(tmp_path), {"fields": spec}, {"fields": SMOOTH}, ATTRIBUTES)
    path = tmp_path / "fields/c/1/0/0/0/0"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"fields/c/1/.*(corrupt chunk at byte 0 \(crc32c\)|shard index is damaged)"):
        Dataset.open(str(tmp_path)).main.read((2,), 0, 2)
    (line,) = verify(str(tmp_path))
    assert line.startswith(str(path))
    assert re.search(report, line)


def test_a_shard_of_another_place_is_told_from_a_corrupt_one(tmp_path: Path) -> None:
    write_dataset(
        str(tmp_path), {"fields": ArraySpec(VALUES.shape, "float32", AXES, 1)}, {"fields": VALUES}, ATTRIBUTES
    )
    (tmp_path / "fields/c/1/0/0/0/0").write_bytes((tmp_path / "fields/c/2/0/0/0/0").read_bytes())
    (line,) = verify(str(tmp_path))
    assert "fields/c/1/0/0/0/0" in line and "it is another shard" in line


@pytest.mark.parametrize("level", [None, 3])
@pytest.mark.parametrize("block", [1, 7, 48, 1000])
@pytest.mark.parametrize("spill", [False, True])
def test_a_shard_encoded_in_blocks_is_the_same(
    level: int | None, block: int, spill: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spill:
        monkeypatch.setattr("datamodules.format.shard.SPILL_BYTES", 0)
    spec = ArraySpec((3, 4, 2, 6), "float32", ("trajectory", "time", "channel", "x"), 3, level=level)
    tokens = ArraySpec((77,), "uint8", ("token",), 77, 11, level=level)
    for one, values in ((spec, VALUES[:3, :, :, 0, :6]), (tokens, np.arange(77, dtype=np.uint8))):
        encoder, flat = ShardEncoder(one, 0), values.reshape(-1)
        for i in range(0, flat.size, block):
            encoder.append(flat[i : i + block])
        assert bytes(encoder.finish()) == bytes(encode_shard(one, 0, values))
        with pytest.raises(ValueError, match="shard 0 holds"):
            encoder.append(flat[:1])
        short = ShardEncoder(one, 0)
        short.append(flat[:5])
        with pytest.raises(ValueError, match="shard 0 holds"):
            short.finish()


# Many arrays in one group


def test_mixed_rank_and_two_resolutions(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    values = {
        "fields": VALUES,
        "fields_3": VALUES[..., ::2, ::2].copy(),
        "parameters": rng.standard_normal((5, 3)),
        "energy": rng.standard_normal((5, 4)),
        "mask": rng.random((6, 8)) < 0.5,
        "kind": np.arange(5, dtype=np.int16),
        "time": np.linspace(0, 1, 4),
    }
    specs = {
        "fields": ArraySpec(VALUES.shape, "float32", AXES, 2),
        "fields_3": ArraySpec((5, 4, 2, 3, 4), "float32", (*AXES[:3], "y_3", "x_4"), 3, level=1),
        "parameters": ArraySpec((5, 3), "float64", ("trajectory", "parameter"), 5, 5),
        "energy": ArraySpec((5, 4), "float64", ("trajectory", "time"), 5, 4),
        "mask": ArraySpec((6, 8), "bool", ("y", "x"), 6, 6),
        "kind": ArraySpec((5,), "int16", ("trajectory",), 5, 5),
        "time": ArraySpec((4,), "float64", ("time",), 4, 4),
    }
    url = str(tmp_path)
    write_dataset(url, specs, values, ATTRIBUTES)
    data, group, dataset = xarray.open_zarr(url), zarr.open_group(url, mode="r"), Dataset.open(url)
    for name, expected in values.items():
        np.testing.assert_array_equal(data[name].values, expected)
        np.testing.assert_array_equal(group[name][:], expected)
    for i in range(5):
        np.testing.assert_array_equal(dataset.arrays["parameters"].read((), i, i + 1)[0], values["parameters"][i])
        np.testing.assert_array_equal(dataset.arrays["energy"].read((i,), 1, 3), values["energy"][i, 1:3])
        np.testing.assert_array_equal(dataset.arrays["fields_3"].read((i,), 1, 3), values["fields_3"][i, 1:3])
    np.testing.assert_array_equal(dataset.arrays["mask"].read((), 0, 6), values["mask"])


def test_one_axis_name_with_two_extents_is_refused(tmp_path: Path) -> None:
    specs = {
        "a": ArraySpec((5, 4), "float32", ("trajectory", "x"), 5),
        "b": ArraySpec((5, 2), "int8", ("trajectory", "x"), 5),
    }
    with pytest.raises(ValueError, match=r"axis 'x' has 4 entries in array 'a' and 2 in 'b'.*x_2"):
        write_dataset(str(tmp_path), specs, {"a": np.zeros((5, 4)), "b": np.zeros((5, 2))}, ATTRIBUTES)


@pytest.mark.parametrize(("change", "message"), [({"level": 99}, "level=99"), ({"dimensions": ("x", "x")}, "twice")])
def test_impossible_specs(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ArraySpec(**{"shape": (2, 2), "dtype": "int8", "dimensions": ("y", "x"), "shard_length": 2, **change})


# What zarr-python and xarray write


@settings(max_examples=25, deadline=None)
@given(
    chunks=st.tuples(*(st.sampled_from(c) for c in ((1, 2), (1, 2, 4), (1, 2), (1, 3, 6), (2, 8)))),
    per_shard=st.tuples(*(st.integers(1, 2) for _ in range(5))),
    location=st.sampled_from(["start", "end"]),
    compressors=st.sampled_from([(), ("crc32c",), ("zstd",), ("zstd", "crc32c"), ("crc32c", "zstd")]),
    empty=st.booleans(),
    fill=st.sampled_from([0, 1.5, float("nan")]),
    window=st.sampled_from([(0, 4), (1, 3), (3, 4)]),
)
def test_reads_whatever_zarr_python_cuts(
    tmp_path_factory, chunks, per_shard, location, compressors, empty, fill, window
) -> None:
    values = SMOOTH.copy()
    if empty:
        values[0, 1:3] = values[2:4] = fill
    made = {"zstd": zarr.codecs.ZstdCodec(level=1), "crc32c": zarr.codecs.Crc32cCodec()}
    codec = zarr.codecs.ShardingCodec(
        chunk_shape=chunks,
        codecs=[zarr.codecs.BytesCodec(), *(made[name] for name in compressors)],
        index_location=location,
    )
    shards = tuple(c * n for c, n in zip(chunks, per_shard, strict=True))
    root = str(tmp_path_factory.mktemp("foreign"))
    array = zarr.create_array(
        root, name="u", shape=values.shape, dtype="f4", chunks=shards, serializer=codec, compressors=None,
        dimension_names=AXES, fill_value=fill,
    )  # fmt: skip
    array[:] = values
    reader, (a, b) = Array.open(Store(root), "u"), window
    for i in (0, 2, 4):
        np.testing.assert_array_equal(reader.read((i,), a, b), values[i, a:b])


def test_reads_what_xarray_writes(tmp_path: Path) -> None:
    data = xarray.Dataset(
        {"u": (AXES, SMOOTH), "mask": (("y", "x"), SMOOTH[0, 0, 0] > 0)}, coords={"time": np.arange(4) * 0.5}
    )
    encoding = {
        "u": {"chunks": (1, 2, 2, 6, 4), "shards": (2, 4, 2, 6, 8)},
        "mask": {"chunks": (3, 8), "shards": (6, 8)},
    }
    data.to_zarr(tmp_path, zarr_format=3, encoding=encoding)
    reader = Array.open(Store(str(tmp_path)), "u")
    for i in range(5):
        np.testing.assert_array_equal(reader.read((i,), 1, 4), SMOOTH[i, 1:4])
    np.testing.assert_array_equal(Array.open(Store(str(tmp_path)), "mask").read((), 1, 5), data["mask"].values[1:5])


def test_a_foreign_index_that_points_outside_is_refused(tmp_path: Path) -> None:
    codec = zarr.codecs.ShardingCodec(
        chunk_shape=(2,), codecs=[zarr.codecs.BytesCodec()], index_codecs=[zarr.codecs.BytesCodec()]
    )
    array = zarr.create_array(
        str(tmp_path), name="u", shape=(8,), dtype="i4", chunks=(8,), serializer=codec, compressors=None, fill_value=0
    )
    array[:] = np.arange(1, 9)
    np.testing.assert_array_equal(Array.open(Store(str(tmp_path)), "u").read((), 0, 8), np.arange(1, 9))
    path = tmp_path / "u/c/0"
    data = bytearray(path.read_bytes())
    data[-10] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"u/c/0.*points past its"):
        Array.open(Store(str(tmp_path)), "u").read((), 0, 8)

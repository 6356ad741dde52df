"""The data format: byte for byte Zarr v3, read back exactly, and nothing damaged or unfinished taken for whole."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zlib
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.format import Array, ArraySpec, DataError, Dataset, Writer, crc32c, verify, write_dataset
from datamodules.format.crc import combine_crc32, crc32
from datamodules.format.layout import DTYPES
from datamodules.store import Store

FIELD_AXES = ("trajectory", "time", "channel", "x", "y")


def field_spec(shape: tuple[int, ...], shard_length: int, dtype: str = "float32") -> ArraySpec:
    return ArraySpec(shape, dtype, FIELD_AXES, shard_length)


def token_spec(n: int, shard_length: int, chunk: int, dtype: str = "uint8") -> ArraySpec:
    return ArraySpec((n,), dtype, ("token",), shard_length, chunk)


def some(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape) * 100
    return np.abs(values).astype(DTYPES[dtype]) if dtype.startswith("u") else values.astype(DTYPES[dtype])


FIELDS = some((5, 4, 2, 6, 8), "float32")
TOKENS = np.random.default_rng(1).integers(0, 256, 1000, dtype=np.uint8)


def build(url: str) -> str:
    specs = {"fields": field_spec(FIELDS.shape, 2), "tokens": token_spec(1000, 256, 64)}
    attributes = {"kind": "fields", "array": "fields", "splits": {"train": [0, 3], "validation": [3, 5]}, "dt": 0.1}
    return write_dataset(url, specs, {"fields": FIELDS, "tokens": TOKENS}, attributes, {"seed": 1})


@pytest.fixture
def url(tmp_path) -> str:
    build(str(tmp_path / "data"))
    return str(tmp_path / "data")


def test_crc32c_has_the_published_check_value():
    assert crc32c(b"123456789") == crc32c(memoryview(b"123456789")) == crc32c(bytearray(b"123456789")) == 0xE3069283


def test_a_shard_byte_by_byte(tmp_path):
    values = np.arange(6, dtype="<i4").reshape(3, 2, 1)
    spec = ArraySpec((3, 2, 1), "int32", ("trajectory", "time", "channel"), 2)
    write_dataset(str(tmp_path), {"u": spec}, {"u": values}, {"kind": "fields", "array": "u", "splits": {}})

    def summed(body: bytes) -> bytes:
        return body + struct.pack("<I", google_crc32c.value(body))

    chunks = [summed(struct.pack("<i", i)) for i in range(6)]
    index = [(8 * i, 8) for i in range(4)]
    full = b"".join(chunks[:4]) + summed(b"".join(struct.pack("<QQ", *entry) for entry in index))
    absent = (2**64 - 1, 2**64 - 1)
    half = b"".join(chunks[4:]) + summed(b"".join(struct.pack("<QQ", *e) for e in (*index[:2], absent, absent)))
    assert (tmp_path / "u/c/0/0/0").read_bytes() == full
    assert (tmp_path / "u/c/1/0/0").read_bytes() == half


def test_windows_read_back(url):
    dataset = Dataset.open(url)
    assert dataset.splits == {"train": (0, 3), "validation": (3, 5)} and dataset.kind == "fields"
    for i in range(5):
        for a, b in ((0, 4), (1, 3), (3, 4)):
            np.testing.assert_array_equal(dataset.main.read((i,), a, b), FIELDS[i, a:b])
    for a, b in ((0, 1000), (63, 65), (200, 700), (999, 1000), (64, 128)):
        np.testing.assert_array_equal(dataset.arrays["tokens"].read((), a, b), TOKENS[a:b])


def test_a_window_is_one_byte_range(url):
    main = Dataset.open(url).main
    frame = 2 * 6 * 8 * 4 + 4
    (piece,) = main.plan((3,), 1, 3)  # second trajectory of the second shard, frames 1 and 2
    assert piece[:7] == ("fields/c/1/0/0/0/0", 5 * frame, 7 * frame, 2, 0, 2, 0)


def test_ranges_of_several_windows_can_be_coalesced(url):
    dataset = Dataset.open(url)
    tokens, out = dataset.arrays["tokens"], np.empty((2, 100), np.int64)
    windows = [(10, 110), (100, 200)]
    pieces = [tokens.plan((), a, b)[0] for a, b in windows]
    lo, hi = min(p.start for p in pieces), max(p.stop for p in pieces)
    block = memoryview(dataset.store.read_range(pieces[0].path, lo, hi))
    for row, piece in zip(out, pieces, strict=True):
        tokens.decode(piece, block[piece.start - lo : piece.stop - lo], row)  # casts to int64
    np.testing.assert_array_equal(out, [TOKENS[a:b] for a, b in windows])


def test_decodes_into_given_memory(url):
    main = Dataset.open(url).main
    big = np.zeros((2, 3, 2, 6, 8), np.float32)
    main.read((1,), 0, 3, out=big[1])
    np.testing.assert_array_equal(big[1], FIELDS[1, :3])
    assert not big[0].any()
    strided = np.zeros((3, 2, 6, 16), np.float32)[..., ::2]
    main.read((1,), 0, 3, out=strided)
    np.testing.assert_array_equal(strided, FIELDS[1, :3])


@pytest.mark.parametrize(
    "index,a,b", [((5,), 0, 1), ((-1,), 0, 1), ((0,), 0, 5), ((0,), 2, 2), ((), 0, 1), ((0,), -1, 1)]
)
def test_windows_out_of_range(url, index, a, b):
    with pytest.raises(IndexError):
        Dataset.open(url).main.read(index, a, b)


def test_plain_zarr_and_xarray_open_it(url):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group, data = zarr.open_group(url, mode="r"), xarray.open_zarr(url)
        np.testing.assert_array_equal(group["fields"][:], FIELDS)
        np.testing.assert_array_equal(group["tokens"][:], TOKENS)
        np.testing.assert_array_equal(data["fields"].values, FIELDS)
        np.testing.assert_array_equal(data["tokens"].values, TOKENS)
        assert data["tokens"].dtype == np.uint8
    assert data["fields"].dims == FIELD_AXES and data["tokens"].dims == ("token",)
    assert data.attrs["dt"] == 0.1 and group.attrs["splits"] == {"train": [0, 3], "validation": [3, 5]}
    assert group["fields"].shards == (2, 4, 2, 6, 8) and group["fields"].chunks == (1, 1, 2, 6, 8)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from(sorted(DTYPES)),
    n=st.integers(1, 7),
    frames=st.integers(1, 4),
    space=st.lists(st.integers(1, 5), max_size=2),
    shard_length=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_any_field_shape_agrees_with_zarr(tmp_path_factory, dtype, n, frames, space, shard_length, seed):
    values = some((n, frames, 2, *space), dtype, seed)
    spec = ArraySpec(values.shape, dtype, ("trajectory", "time", "channel", *"xyz"[: len(space)]), shard_length)
    url = str(tmp_path_factory.mktemp("any"))
    write_dataset(url, {"u": spec}, {"u": values}, {"kind": "fields", "array": "u", "splits": {"train": [0, n]}})
    np.testing.assert_array_equal(zarr.open_array(url, path="u", mode="r")[:], values)
    dataset = Dataset.open(url)
    for i in (0, n - 1):
        np.testing.assert_array_equal(dataset.main.read((i,), 0, frames), values[i])
    assert verify(url) == []


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 150), chunk=st.integers(2, 50), per_shard=st.integers(1, 5), data=st.data())
def test_any_token_window_agrees_with_zarr(tmp_path_factory, n, chunk, per_shard, data):
    values = some((n,), "uint16", n)
    url = str(tmp_path_factory.mktemp("any"))
    spec = token_spec(n, chunk * per_shard, chunk, "uint16")
    write_dataset(url, {"tokens": spec}, {"tokens": values}, {"kind": "text", "array": "tokens", "splits": {}})
    np.testing.assert_array_equal(zarr.open_array(url, path="tokens", mode="r")[:], values)
    a = data.draw(st.integers(0, n - 1))
    b = data.draw(st.integers(a + 1, n))
    np.testing.assert_array_equal(Dataset.open(url).main.read((), a, b), values[a:b])


@pytest.mark.parametrize("empty", [False, True])
def test_reads_what_zarr_python_writes(tmp_path, empty):
    """zarr-python orders inner chunks along a Morton curve and leaves out those that hold only the fill value."""
    values = FIELDS.copy()
    if empty:
        values[0, 1:3] = 0
        values[2:4] = 0
    codec = zarr.codecs.ShardingCodec(
        chunk_shape=(1, 1, 2, 6, 8), codecs=[zarr.codecs.BytesCodec(), zarr.codecs.Crc32cCodec()]
    )
    array = zarr.create_array(
        str(tmp_path), name="u", shape=values.shape, dtype="f4", chunks=(2, 4, 2, 6, 8), serializer=codec,
        compressors=None, dimension_names=FIELD_AXES, fill_value=0,
    )  # fmt: skip
    array[:] = values
    reader = Array.open(Store(str(tmp_path)), "u")
    for i in range(5):
        for a, b in ((0, 4), (1, 4), (2, 3)):
            out = np.full((b - a, 2, 6, 8), np.nan, np.float32)
            np.testing.assert_array_equal(reader.read((i,), a, b, out=out), values[i, a:b])


@pytest.mark.parametrize(
    "change,message",
    [
        ({"compressors": zarr.codecs.BloscCodec()}, "codecs=.*'blosc'.*cannot be read"),
        ({"shards": None, "chunks": (1, 1, 2, 6, 8)}, "not sharded"),
        ({"serializer": zarr.codecs.BytesCodec(endian="big")}, "big-endian"),
        ({"chunk_key_encoding": {"name": "v2", "separator": "/"}}, "default encoding"),
    ],
)
def test_refuses_arrays_that_it_cannot_read(tmp_path, change, message):
    settings_ = {"shards": (2, 4, 2, 6, 8), "chunks": (1, 1, 2, 6, 8), "compressors": None, **change}
    zarr.create_array(str(tmp_path), name="u", shape=FIELDS.shape, dtype="f4", dimension_names=FIELD_AXES, **settings_)
    with pytest.raises(DataError, match=message):
        Array.open(Store(str(tmp_path)), "u")


def test_statistics_are_those_of_the_train_split(url):
    train = FIELDS[:3].astype(np.float64)
    found = Dataset.open(url).attributes["statistics"]
    for name in ("mean", "std", "min", "max"):
        np.testing.assert_allclose(found[name], getattr(train, name)((0, 1, 3, 4)), rtol=1e-12)


def test_fingerprint_follows_the_content(tmp_path):
    first, second = build(str(tmp_path / "a")), build(str(tmp_path / "b"))
    assert first == second == Dataset.open(str(tmp_path / "a")).fingerprint
    spec, other = field_spec(FIELDS.shape, 2), FIELDS.copy()
    other[4, 3, 1, 5, 7] += 1
    attributes = {"kind": "fields", "array": "fields", "splits": {"train": [0, 3]}}
    prints = {
        write_dataset(str(tmp_path / f"c{i}"), {"fields": spec}, {"fields": v}, attributes)
        for i, v in enumerate((FIELDS, other))
    }
    assert len(prints | {first}) == 3


def test_two_shards_of_one_size_are_told_apart(url):
    """A CRC-32C over chunks that carry their own CRC-32C would not: it is the same for all of them."""
    a, b = (Path(url, f"fields/c/{k}/0/0/0/0") for k in (0, 1))
    assert crc32c(a.read_bytes()) == crc32c(b.read_bytes())
    objects = Dataset.open(url).objects
    assert objects["fields/c/0/0/0/0/0"].crc32 != objects["fields/c/1/0/0/0/0"].crc32
    a.write_bytes(b.read_bytes())
    (line,) = verify(url)
    assert line.startswith(str(a))


def test_pickled_dataset_reads(url):
    again = pickle.loads(pickle.dumps(Dataset.open(url)))
    np.testing.assert_array_equal(again.main.read((4,), 0, 4), FIELDS[4])


def test_on_s3_as_on_disk(s3, url):
    remote = s3.url("data")
    assert build(remote) == Dataset.open(url).fingerprint
    dataset = Dataset.open(remote)
    np.testing.assert_array_equal(dataset.main.read((4,), 1, 4), FIELDS[4, 1:4])
    np.testing.assert_array_equal(dataset.arrays["tokens"].read((), 5, 995), TOKENS[5:995])
    assert verify(remote) == [] and not any("_parts" in name for name in Store(remote).list())
    data = xarray.open_zarr(remote)
    np.testing.assert_array_equal(data["fields"].values, FIELDS)


# Damage


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "flip first chunk":
        data[3] ^= 1
        path.write_bytes(data)
    elif how == "flip index":
        data[-30] ^= 1
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[:100])


@pytest.mark.parametrize(
    "how,read,report",
    [
        ("missing", "missing", "missing"),
        ("truncate", "truncated", "truncated, 100 bytes instead of"),
        ("flip first chunk", r"corrupt chunk at byte 0 \(crc32c\)", r"corrupt, .* \(chunk 0 at byte 0\)"),
        ("flip index", None, r"corrupt, .* \(in the shard index\)"),
    ],
)
def test_a_damaged_shard_is_named(url, how, read, report):
    name = "fields/c/1/0/0/0/0"
    damage(Path(url, name), how)
    dataset = Dataset.open(url)
    if read:
        with pytest.raises(DataError, match=f"{name}: {read}.*keel data make"):
            dataset.main.read((2,), 0, 2)
    np.testing.assert_array_equal(dataset.main.read((0,), 0, 4), FIELDS[0])
    (line,) = verify(url)
    assert line.startswith(str(Path(url, name)))
    assert re.search(report, line)
    assert len(verify(url, deep=False)) == (1 if how in ("missing", "truncate") else 0)


def test_a_foreign_shard_with_a_damaged_index_is_refused(url):
    damage(Path(url, "fields/c/0/0/0/0/0"), "flip index")
    with pytest.raises(DataError, match="shard index is damaged"):
        Array.open(Store(url), "fields").read((0,), 0, 1)


def test_changed_metadata_is_refused(url):
    path = Path(url, "fields/zarr.json")
    path.write_bytes(path.read_bytes().replace(b"trajectory", b"trajektory"))
    (line,) = verify(url)
    assert line.startswith(f"{path}: corrupt")
    path = Path(url, "zarr.json")
    path.write_bytes(path.read_bytes().replace(b"0.1", b"0.2"))
    with pytest.raises(DataError, match=r"zarr\.json: differs from the manifest"):
        Dataset.open(url)
    path.unlink()
    with pytest.raises(DataError, match=r"zarr\.json: missing"):
        Dataset.open(url)


def test_no_data_set_there(tmp_path):
    with pytest.raises(DataError, match="not a Keel data set, or an unfinished one; run `keel data make`"):
        Dataset.open(str(tmp_path / "nothing"))


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"format":"other"}', b'{"format":"keel-dataset","version":99}'])
def test_a_strange_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=str(tmp_path)):
        Dataset.open(str(tmp_path))


# Writing


def test_unfinished_is_not_whole_and_goes_on(tmp_path):
    store, spec = Store(str(tmp_path)), field_spec(FIELDS.shape, 2)
    writer = Writer(store, {"fields": spec}, {"seed": 1})
    writer.begin()
    records = {("fields", k): writer.write_shard("fields", k, FIELDS[2 * k : 2 * k + 2]) for k in (0, 1)}
    with pytest.raises(DataError, match="unfinished"):
        Dataset.open(store)
    with pytest.raises(ValueError, match="shard 2"):
        writer.finish({"kind": "fields", "array": "fields", "splits": {}}, records)
    again = Writer(store, {"fields": spec}, {"seed": 1})
    again.begin()
    assert again.written("fields", 0) == records["fields", 0] and again.written("fields", 2) is None
    damage(tmp_path / "fields/c/0/0/0/0/0", "flip first chunk")
    assert again.written("fields", 0) is None and again.written("fields", 1) is not None


def test_another_identity_at_the_place_is_refused(tmp_path, url):
    spec = {"fields": field_spec(FIELDS.shape, 2)}
    Writer(Store(str(tmp_path / "new")), spec, {"seed": 1}).begin()
    with pytest.raises(DataError, match=r"unfinished data set there was made from another config \(seed: 1 -> 2\)"):
        Writer(Store(str(tmp_path / "new")), spec, {"seed": 2}).begin()
    with pytest.raises(DataError, match=r"the data set there was made from another config \(.*seed"):
        Writer(Store(url), {"fields": spec["fields"], "tokens": token_spec(1000, 256, 64)}, {"seed": 2}).finished()


@pytest.mark.parametrize("bad,dtype", [(np.nan, "float32"), (-np.inf, "bfloat16"), (1e6, "float16")])
@pytest.mark.parametrize("trajectory", [1, 4])  # of the train split, and of another
def test_values_that_are_not_finite_are_named_or_allowed(tmp_path, trajectory, bad, dtype):
    values = FIELDS.copy()
    values[trajectory, 2, 1, 3, 5] = bad
    specs = {"fields": field_spec(values.shape, 2, dtype)}
    attributes = {"kind": "fields", "array": "fields", "splits": {"train": [0, 3], "test": [3, 5]}}
    place = f"fields holds -?(nan|inf) at trajectory {trajectory}, time 2, channel 1, x 3, y 5, stored as {dtype}; mend"
    with pytest.raises(DataError, match=place) as caught:
        write_dataset(str(tmp_path / "a"), specs, {"fields": values}, attributes)
    assert "\n" not in str(caught.value)
    if dtype == "float32":
        write_dataset(str(tmp_path / "b"), specs, {"fields": values}, attributes, allow_nan=True)
        dataset = Dataset.open(str(tmp_path / "b"))
        mean = np.nanmean(values[:3], (0, 1, 3, 4), dtype=np.float64)
        np.testing.assert_allclose(dataset.attributes["statistics"]["mean"], mean)
        assert np.isnan(dataset.main.read((trajectory,), 2, 3)).sum() == 1


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"dtype": "complex64"}, "dtype='complex64'"),
        ({"shape": (4, 3)}, r"shape=\(4, 3\)"),
        ({"shard_length": 0}, "shard_length=0"),
        ({"chunk_length": 3}, "chunk_length=3"),
    ],
)
def test_impossible_arrays_are_refused(fields, message):
    good = {"shape": (4, 4, 1), "dtype": "float32", "dimensions": ("trajectory", "time", "channel"), "shard_length": 2}
    with pytest.raises(ValueError, match=message):
        ArraySpec(**{**good, **fields})


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (7, 9), (1000, 1 << 16), (1, 99_991)])
def test_crc32_of_parts_gives_that_of_the_whole(sizes: tuple[int, int]) -> None:
    first, second = (np.random.default_rng(size).bytes(size) for size in sizes)
    assert combine_crc32(crc32(first), crc32(second), len(second)) == zlib.crc32(first + second)

"""keel data import, check, show, stats and copy, as a user calls them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from cluster import cli
from cluster.report.sample import draw_sample
from datamodules.format import ArraySpec, Dataset, verify, write_dataset
from datamodules.store import AccessDenied, Store, Unreachable
from tests.datamodules.importers.layouts import tensor, well


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not folded."""
    monkeypatch.setenv("COLUMNS", "250")


def made(url: Path, space: tuple[int, ...] = (12, 20), frames: int = 9, channels: int = 2, **change: object) -> str:
    """A data set of 4 trajectories; three are for training."""
    shape = (4, frames, channels, *space)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values = change.pop("values", values)
    axes = ("trajectory", "time", "channel", *"zyx"[3 - len(space) :])
    attributes = {
        "kind": "fields", "array": "fields", "splits": {"train": [0, 3], "test": [3, 4]}, "dt": 0.5,
        "channels": [f"c{i}" for i in range(channels)], "units": {"c0": "m/s", "time": "s"}, "parameters": {"viscosity": 1e-3},
        "boundary_conditions": {"x": "periodic"}, **change,
    }  # fmt: skip
    specs = {"fields": ArraySpec(shape, "float32", axes, 1), "speed": ArraySpec((4,), "float64", ("trajectory",), 4, 4)}
    write_dataset(str(url), specs, {"fields": values, "speed": np.arange(4.0)}, attributes)
    return str(url)


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = cli.main(["data", *(str(word) for word in words)])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code, _, err = call(capsys, *words)
    *bar, line = err.splitlines()
    assert code == 2 and line.startswith("keel: error: ") and len(bar) <= 1  # a progress bar may stand above
    return line


# import


def test_import_and_everything_after_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    well(tmp_path / "data/train/a.hdf5")
    well(tmp_path / "data/test/b.hdf5", seed=20)
    url = tmp_path / "out"
    words = [
        "import",
        tmp_path / "data",
        "--to",
        url,
        "--zstd",
        3,
        "--equation",
        "u_t = 0",
        "--units",
        "density=kg/m^3",
    ]
    assert call(capsys, *words)[:2] == (0, f"{url}\n")
    assert call(capsys, *words)[0] == 0
    dataset = Dataset.open(str(url))
    assert dataset.splits == {"train": (0, 3), "test": (3, 6)} and dataset.main.spec.level == 3
    assert dataset.attributes["equation"] == "u_t = 0"
    code, out, _ = call(capsys, "show", url, "--png", tmp_path / "a.png", "--trajectory", 5)
    assert code == 0 and "kg/m^3" in out and "zstd 3" in out and "viscosity" in out
    assert call(capsys, "check", url)[0] == 0
    assert call(capsys, "stats", url)[0] == 0
    assert call(capsys, "copy", url, tmp_path / "copy")[0] == 0
    assert Dataset.open(str(tmp_path / "copy")).fingerprint == dataset.fingerprint


def test_import_with_splits_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensor(tmp_path / "a.hdf5", n=10)
    url = tmp_path / "out"
    shares = "train=0.8,validation=0.1,test=0.1"
    code, *_ = call(
        capsys, "import", tmp_path / "*.hdf5", "--to", url, "--split", shares, "-o", "channels=speed", "--dtype", "bfloat16",
        "--layout", "pdebench", "--shard-mib", 0.0002,
    )  # fmt: skip
    dataset = Dataset.open(str(url))
    assert code == 0 and dataset.splits == {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}
    assert (
        dataset.attributes["channels"] == ["speed"]
        and dataset.main.spec.dtype == "bfloat16"
        and dataset.main.shards > 1
    )
    tensor(tmp_path / "b.hdf5", n=2)
    code, *_ = call(
        capsys, "import", "--train", tmp_path / "a.hdf5", "--test", tmp_path / "b.hdf5", "--to", tmp_path / "two"
    )
    assert code == 0 and Dataset.open(str(tmp_path / "two")).splits == {"train": (0, 10), "test": (10, 12)}


def test_import_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tensor(tmp_path / "a.hdf5")
    data[0, 1, 2] = np.nan
    np.save(tmp_path / "nan.npy", data)
    url = tmp_path / "out"
    assert "no such file" in refused(capsys, "import", tmp_path / "b.hdf5", "--to", url)
    assert "sources: give files" in refused(capsys, "import", "--to", url)
    assert "--split train: must be such as" in refused(
        capsys, "import", tmp_path / "a.hdf5", "--to", url, "--split", "train"
    )
    assert "--option channels: must be of the form KEY=VALUE" in refused(
        capsys, "import", tmp_path / "a.hdf5", "--to", url, "-o", "channels"
    )
    assert "dtype='int4'" in refused(capsys, "import", tmp_path / "a.hdf5", "--to", url, "--dtype", "int4")
    npy = ("import", tmp_path / "nan.npy", "--to", url, "-o", "axes=trajectory,time,x")
    assert "nan at trajectory 0, time 1, channel u; mend the file, or --allow-nan" in refused(capsys, *npy)
    assert call(capsys, *npy, "--allow-nan")[0] == 0
    code, out, _ = call(capsys, "stats", url)
    assert code == 0 and "not finite" in out and out.split()[-2] == "1"


def test_mistakes_of_an_import_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensor(tmp_path / "a.hdf5")
    words = ("import", tmp_path / "a.hdf5", "--to")
    assert "add up to 1, not nan" in refused(capsys, *words, tmp_path / "out", "--split", "train=nan")
    (tmp_path / "file").write_text("")
    line = refused(capsys, *words, tmp_path / "file")
    assert f"{tmp_path}/file/manifest.json: goes through a file, where a folder was expected" in line


# check


def test_check_goes_on_behind_an_object_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = Path(made(tmp_path / "a"))
    (url / "fields/c/2/0/0/0/0").unlink()
    real = Store.read_range

    def failing(self: Store, path: str, start: int, end: int) -> bytes:
        if path.startswith("fields/c/0"):
            raise AccessDenied(f"{self.join(path)}: access denied (403)")
        return real(self, path, start, end)

    monkeypatch.setattr(Store, "read_range", failing)
    code, out, _ = call(capsys, "check", url)
    assert code == 1 and "2 problems" in out
    assert "fields/c/0/0/0/0/0: access denied" in out and "fields/c/2/0/0/0/0: missing" in out

    def silent(self: Store, path: str) -> int:
        raise Unreachable(f"{self.join(path)}: the store did not answer in time")

    monkeypatch.setattr(Store, "size", silent)
    code, out, _ = call(capsys, "check", url)
    count = len(Dataset.open(str(url)).objects)
    assert code == 1 and f"{count} problems" in out and 1 <= out.count("did not answer in time") <= 4


def test_check_names_every_broken_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = Path(made(tmp_path / "a"))
    (url / "fields/c/0/0/0/0/0").unlink()
    (url / "fields/c/1/0/0/0/0").write_bytes(b"short")
    shard = url / "fields/c/2/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[50] ^= 1
    shard.write_bytes(data)
    code, out, _ = call(capsys, "check", url)
    assert code == 1 and "3 problems" in out
    for k, fault in ((0, "missing"), (1, "truncated"), (2, "chunk 0 at byte 0")):
        assert any(f"fields/c/{k}/0/0/0/0: " in line and fault in line for line in out.splitlines())


def test_check_refuses_the_manifest_of_another_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, other = Path(made(tmp_path / "a")), Path(made(tmp_path / "b", frames=5))
    manifest = (url / "manifest.json").read_bytes()
    (url / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
    assert "the manifest is that of another data set" in refused(capsys, "check", url)
    # One that agrees with the group's own document, but not on the arrays.
    forged = json.loads(manifest)
    forged["arrays"]["fields"]["shape"][1] = 5
    (url / "manifest.json").write_text(json.dumps(forged))
    assert "array 'fields' is float32 [4, 5, 2, 12, 20] there" in refused(capsys, "check", url)
    (url / "manifest.json").write_bytes(manifest)
    assert call(capsys, "check", url)[0] == 0


# show


def test_show_prints_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = made(tmp_path / "a")
    code, out, _ = call(capsys, "show", url)
    assert code == 0
    words = " ".join(out.split())
    for expected in ("float32", "trajectory=4, time=9, channel=2, y=12, x=20", "c0 m/s", "viscosity 0.001", "train 0 3 3",
                     "speed float64 trajectory=4 56 B", "periodic", Dataset.open(url).fingerprint):  # fmt: skip
        assert expected in words


@pytest.mark.parametrize("space", [(), (16,), (12, 20), (4, 6, 8)], ids=len)
def test_show_draws_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str], space: tuple[int, ...]) -> None:
    url, png = made(tmp_path / "a", space), tmp_path / "sample.png"
    code, out, _ = call(capsys, "show", url, "--png", png, "--trajectory", 2)
    assert code == 0 and out.endswith(f"{png}\n")
    picture = matplotlib.image.imread(io.BytesIO(png.read_bytes()))
    assert picture.shape[0] > 200 and picture.shape[1] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 20  # not blank
    assert png.read_bytes() != draw_sample(Dataset.open(url), 1)


def test_a_sample_shows_its_values(tmp_path: Path) -> None:
    """A field that is positive in one half and negative in the other is red there and blue here."""
    values = np.ones((4, 2, 1, 16, 16), np.float32)
    values[..., :8] = -1
    url = made(tmp_path / "a", (16, 16), 2, 1, values=values)
    picture = matplotlib.image.imread(io.BytesIO(draw_sample(Dataset.open(url))))[..., :3]
    red = (picture[..., 0] > 2 * picture[..., 2]) & (picture[..., 0] > 0.3)
    blue = (picture[..., 2] > 2 * picture[..., 0]) & (picture[..., 2] > 0.3)
    assert red.sum() > 5000 and blue.sum() > 5000
    half = picture.shape[1] // 2  # the first frame lies left of the middle: blue, then red
    assert np.nonzero(blue[:, :half])[1].mean() < np.nonzero(red[:, :half])[1].mean()


def test_show_refuses_what_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = made(tmp_path / "a")
    assert "trajectory=4" in refused(capsys, "show", url, "--png", tmp_path / "x.png", "--trajectory", 4)
    text = str(tmp_path / "text")
    spec = ArraySpec((99,), "uint8", ("token",), 99, 99)
    attributes = {"kind": "text", "array": "tokens", "splits": {"train": [0, 99]}}
    write_dataset(text, {"tokens": spec}, {"tokens": np.zeros(99, np.uint8)}, attributes)
    assert call(capsys, "show", text)[0] == 0
    masks = str(tmp_path / "masks")
    spec = ArraySpec((4, 8), "uint8", ("trajectory", "x"), 4)
    attributes = {"kind": "fields", "array": "mask", "splits": {"train": [0, 4]}}
    write_dataset(masks, {"mask": spec}, {"mask": np.zeros((4, 8), np.uint8)}, attributes)
    assert "only trajectories and text can be drawn" in refused(capsys, "show", masks, "--png", tmp_path / "x.png")
    assert "no channel axis" in refused(capsys, "stats", text)
    assert "No such file" in refused(capsys, "show", url, "--png", tmp_path / "nowhere/x.png")


def test_text_is_shown_in_short_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = np.frombuffer(("To be, or not to be: that is the question. " * 90).encode(), np.uint8)
    spec = ArraySpec(tokens.shape, "uint8", ("token",), tokens.size, tokens.size)
    attributes = {
        "kind": "text", "array": "tokens", "splits": {"train": [0, tokens.size]}, "vocab_size": 256, "separator": 0,
        "tokenizer": "bytes", "note": "x" * 100_000, "pattern": "*.[ch]",
    }  # fmt: skip
    write_dataset(str(tmp_path / "a"), {"tokens": spec}, {"tokens": tokens}, attributes)
    png = tmp_path / "text.png"
    code, out, _ = call(capsys, "show", tmp_path / "a", "--png", png)
    assert code == 0 and "it begins: To be, or not to be: that is the question. To be" in out
    assert "*.[ch]" in out and "x ... (100,000 characters)" in out and len(out) < 5000
    picture = matplotlib.image.imread(io.BytesIO(png.read_bytes()))
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 15


# options of the store


def test_store_options_reach_every_command(
    tmp_path: Path, s3, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server and its credentials are nowhere but in the options."""
    url, remote = made(tmp_path / "a"), s3.url("data")
    words = [f"endpoint_url={s3.endpoint}", "key=test", "secret=test", "client_kwargs.region_name=us-east-1"]
    options = [word for pair in words for word in ("-s", pair)]
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    assert call(capsys, "copy", url, remote, *["--target-store" if w == "-s" else w for w in options])[0] == 0
    for command in (("check",), ("show",), ("stats",), ("copy", remote, str(tmp_path / "b"))):
        code, out, err = call(capsys, *command, *([remote] if len(command) == 1 else []), *options)
        assert code == 0, (command, out, err)
    axes = ("-o", "axes=trajectory,time,x", *options)
    np.save(tmp_path / "a.npy", np.zeros((2, 3, 4), np.float32))
    assert call(capsys, "import", tmp_path / "a.npy", "--to", f"{remote}/imported", *axes)[0] == 0
    assert "--store endpoint: must be of the form KEY=VALUE" in refused(capsys, "show", remote, "-s", "endpoint")


# stats


def test_stats_agree_with_numpy_and_with_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.random.default_rng(3).standard_normal((4, 9, 2, 12, 20)).astype(np.float32) * 3 + 100
    url = made(tmp_path / "a", values=values)
    code, out, _ = call(capsys, "stats", url)
    assert code == 0 and "off stored" in out
    code, out, _ = call(capsys, "stats", url, "--split", "test")
    test = values[3].astype(np.float64)
    line = next(line.split() for line in out.splitlines() if line.split()[:1] == ["c1"])
    expected = [test[:, 1].mean(), test[:, 1].std(), test[:, 1].min(), test[:, 1].max()]
    np.testing.assert_allclose([float(word) for word in line[1:5]], expected, rtol=1e-3)
    assert "no split 'dev'" in refused(capsys, "stats", url, "--split", "dev")
    assert "no array 'w'" in refused(capsys, "stats", url, "--array", "w")


def test_stats_tells_stored_figures_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"mean": [0.5, 0.0], "std": [1.0, 1.0], "min": [-4.0, -4.0], "max": [4.0, 4.0]}
    shape = (4, 2, 2, 3)
    spec = ArraySpec(shape, "float32", ("trajectory", "time", "channel", "x"), 4)
    attributes = {"kind": "fields", "array": "u", "splits": {"train": [0, 4]}, "statistics": wrong}
    from datamodules.format import Writer

    writer = Writer(Store(str(tmp_path / "a")), {"u": spec}, {})
    writer.begin()
    writer.finish(attributes, {("u", 0): writer.write_shard("u", 0, np.zeros(shape, np.float32))})
    code, out, _ = call(capsys, "stats", tmp_path / "a")
    assert code == 1 and "the stored statistics differ by up to" in out


# copy


def test_copy_to_s3_and_back(tmp_path: Path, s3, capsys: pytest.CaptureFixture[str]) -> None:
    url, remote = made(tmp_path / "a"), s3.url("data")
    code, out, _ = call(capsys, "copy", url, remote, "--threads", 8)
    fingerprint = Dataset.open(url).fingerprint
    assert code == 0 and fingerprint in out and remote in out
    assert verify(remote) == [] and not any("_parts" in name for name in Store(remote).list())
    assert call(capsys, "copy", remote, tmp_path / "b")[0] == 0
    assert {p: Store(url).read(p) for p in Store(url).list()} == {
        p: Store(str(tmp_path / "b")).read(p) for p in Store(url).list()
    }


def test_copy_goes_on_and_is_whole_only_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, target = made(tmp_path / "a"), str(tmp_path / "b")
    written: list[str] = []
    real = Store.write

    def failing(self: Store, path: str, data: bytes) -> None:
        if len(written) == 2:
            raise OSError("the disk is gone")
        real(self, path, data)
        written.append(path)

    monkeypatch.setattr(Store, "write", failing)
    assert "the disk is gone" in refused(capsys, "copy", url, target, "--threads", 1)
    assert "unfinished" in refused(capsys, "check", target)
    first = list(written)
    monkeypatch.setattr(Store, "write", lambda self, path, data: written.append(path) or real(self, path, data))
    damaged = Path(target, first[1])
    damaged.write_bytes(b"x" * damaged.stat().st_size)  # must be copied again
    assert call(capsys, "copy", url, target)[0] == 0
    assert verify(target) == [] and written[-1] == "manifest.json"
    assert written.count(first[0]) == 1 and written.count(first[1]) == 2
    assert call(capsys, "copy", url, target)[0] == 0 and written[-1] == "manifest.json"


def test_copy_refuses_damage_and_other_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url, other = made(tmp_path / "a"), made(tmp_path / "b", frames=5)
    assert "holds another data set" in refused(capsys, "copy", url, other)
    Path(other, "manifest.json").unlink()
    assert "holds an unfinished data set" in refused(capsys, "copy", url, other)
    assert "threads=0" in refused(capsys, "copy", url, tmp_path / "c", "--threads", 0)
    shard = Path(url, "fields/c/2/0/0/0/0")
    shard.write_bytes(bytes(shard.stat().st_size))
    assert f"{shard}: differs from the manifest; the source is damaged" in refused(capsys, "copy", url, tmp_path / "d")
    again = made(tmp_path / "e")
    assert "unfinished copy of another data set" in refused(
        capsys, "copy", made(tmp_path / "f", frames=4), tmp_path / "d"
    )
    assert call(capsys, "copy", again, tmp_path / "d")[0] == 0

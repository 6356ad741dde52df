"""What a user can get wrong, through the command line: one clear line, a non-zero exit, nothing half-written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.launch import EXIT_UNAVAILABLE
from datamodules.store import Store
from tests.conftest import free_port, unavailable
from tests.helpers.runs import fno_config, tiny_fields
from trainer import config as configs
from trainer.checkpoint import committed_steps
from trainer.lifecycle import prepare_new
from trainer.run import fit

ROOT = Path(__file__).resolve().parent.parent.parent
NO_CLOUD = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "AWS_CONFIG_FILE": "/nowhere",
}


def keel(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *words],
        cwd=ROOT,
        env={**clean, **NO_CLOUD, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    lines = [line for line in done.stderr.strip().splitlines() if "━" not in line]  # but for a progress bar
    assert done.returncode == code, done.stderr
    assert len(lines) == 1 and lines[0].startswith("keel: error: "), done.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "fields"
    tiny_fields(str(folder))
    return folder


def config(folder: Path, data: str, processes: int, **train: object) -> str:
    raw = fno_config(str(folder / "run"), data, **train)
    raw["resources"]["processes_per_node"] = processes
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.mark.parametrize("processes", [1, 2])
def test_missing_data(tmp_path: Path, processes: int) -> None:
    done = keel("train", config(tmp_path, str(tmp_path / "nowhere"), processes))
    assert_one_line(done, str(tmp_path / "nowhere"))
    assert not committed_steps(Store(str(tmp_path / "run" / "checkpoints")))


def test_no_credentials(tmp_path: Path) -> None:
    assert_one_line(keel("train", config(tmp_path, "s3://some-bucket/data", 1)), "AWS_ACCESS_KEY_ID")


def test_unreachable_endpoint(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_ENDPOINT_URL": endpoint}
    done = keel("train", config(tmp_path, "s3://some-bucket/data", 1), **keys)
    # It may be wrong, or not there yet: a launcher may try again.
    assert_one_line(done, endpoint.removeprefix("http://"), "AWS_ENDPOINT_URL", code=EXIT_UNAVAILABLE)


@pytest.mark.parametrize("processes", [1, 2])
def test_corrupt_shard_in_training(tmp_path: Path, data: Path, processes: int) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    shards = sorted((copy / "fields" / "c").rglob("*"))
    for shard in (path for path in shards if path.is_file()):
        raw = bytearray(shard.read_bytes())
        raw[100] ^= 1
        shard.write_bytes(raw)
    assert_one_line(keel("train", config(tmp_path, str(copy), processes)), "data/fields/c/")
    assert not committed_steps(Store(str(tmp_path / "run" / "checkpoints")))


def test_data_made_anew_under_a_run_that_is_resumed(tmp_path: Path, data: Path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    prepare_new(configs.load(config(tmp_path, str(copy), 1, max_steps=4), ["strategy.name=ddp"]))
    fit(configs.load(str(tmp_path / "run" / "config.yaml")))
    saved = sorted(committed_steps(Store(str(tmp_path / "run" / "checkpoints"))))
    shutil.rmtree(copy)
    tiny_fields(str(copy), seed=1)
    done = keel("resume", str(tmp_path / "run"), "train.max_steps=6")
    assert_one_line(done, str(copy), "fingerprint")
    assert sorted(committed_steps(Store(str(tmp_path / "run" / "checkpoints")))) == saved


def test_a_world_that_does_not_divide_the_batch(tmp_path: Path, data: Path) -> None:
    done = keel("train", config(tmp_path, str(data), 3, global_batch=4))
    assert_one_line(done, "global_batch=4", "3 processes", "3 or 6")


@pytest.mark.parametrize("processes", [1, 2])
def test_truncated_checkpoint(tmp_path: Path, data: Path, processes: int) -> None:
    path = config(tmp_path, str(data), processes, max_steps=4)
    assert keel("train", path).returncode == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004" / "writer-0001-rank-00000-000.bin"
    os.truncate(checkpoint, 100)
    done = keel("resume", str(tmp_path / "run"), "train.max_steps=6")
    lines = [line for line in done.stderr.splitlines() if "WARNING" not in line]
    assert done.returncode == 2 and len(lines) == 1
    assert "no committed checkpoint" in lines[0] and "rank-00000-000.bin has 100 bytes" in lines[0]
    done = keel("checkpoint", "verify", str(tmp_path / "run"))
    assert done.returncode == 1 and "rank-00000-000.bin" in done.stdout + done.stderr


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        unavailable("a small file system needs root and mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_while_writing_a_shard(tiny_disk: Path) -> None:
    url = str(tiny_disk / "data")
    make = ["data", "make", "configs/data/tiny_navier_stokes_2d.yaml", f"url={url}", "--workers", "0"]
    assert_one_line(keel(*make, "generator.train=200"), "space", url)
    assert not (tiny_disk / "data" / "manifest.json").exists()
    assert not [path for path in (tiny_disk / "data").rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]
    assert_one_line(keel("data", "show", url), url)


def test_disk_full_while_saving_a_checkpoint(tiny_disk: Path, tmp_path: Path, data: Path) -> None:
    path = config(tmp_path, str(data), 1, max_steps=8)
    done = keel("train", path, f"url={tiny_disk}/run", "model.width=24")
    assert_one_line(done, "space")
    assert not committed_steps(Store(str(tiny_disk / "run" / "checkpoints")))

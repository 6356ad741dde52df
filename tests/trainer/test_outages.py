"""A store that is away, slow or full and a clock that jumps: training goes on, and nothing that was committed is lost."""

import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from datamodules.position import StreamPosition
from datamodules.store import Store
from tests.conftest import S3Server, unavailable
from tests.helpers.distributed import run_distributed
from tests.helpers.faulty_proxy import FaultyProxy
from tests.helpers.runs import fno_config, tiny_fields
from trainer import config as configs
from trainer.checkpoint import committed_steps, verify
from trainer.lifecycle import prepare_new
from trainer.records import read_metrics, read_record
from trainer.run import fit

STEPS = 12
BACK = "server-is-back"
REMOTE = {"away": "slow_down", "quota": "full", "slow": "late"}  # runs on an object store, and what happens there


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory):
    """A file system of 4 MiB."""
    folder = tmp_path_factory.mktemp("small")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True, timeout=30
    )
    if mounted.returncode:
        unavailable(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, s3: S3Server, small_disk: Path) -> dict[str, str]:
    """{name: URL} of runs that were disturbed, and of one that was not."""
    folder = tmp_path_factory.mktemp("outages")
    data = tiny_fields(str(folder / "fields"))
    urls = {name: str(folder / name) for name in ("whole", "clock", "final")}
    urls |= {"full": str(small_disk / "full"), **{name: s3.url(name) for name in REMOTE}}
    jobs = []
    for name, url in urls.items():
        config = fno_config(url, data, max_steps=STEPS) | {"diagnostics": {}}
        config["checkpoint"] = {"every": 2, "keep_last": 9, "tolerate": 9}
        config["log"]["flush_seconds"] = 0.05
        loaded = configs.load(config)
        prepare_new(loaded)
        jobs.append((name, loaded))
    begun: set[str] = set()
    buckets = {urls[name].split("/")[2]: name for name in REMOTE}

    def fault(method: str, path: str, number: int) -> str | None:
        """From the first upload of step 4 on the server does nothing but what is wrong with it, until step 7 is done."""
        name = buckets[path.split("/")[1]]
        if "step-00000004" in path and method == "PUT":
            begun.add(name)
        return REMOTE[name] if name in begun and not (folder / f"{BACK}-{name}").exists() else None

    with FaultyProxy(s3.endpoint, fault) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("FSSPEC_KEEL", '{"deadline": 1.0}')
        (errors,) = run_distributed(train_all, 1, jobs)
    assert begun == set(REMOTE)
    return urls | {"error": errors["final"]}


def train_all(jobs: list[Any]) -> dict[str, str]:
    """Worker function."""
    advance, clock, errors = StreamPosition.on_train_batch_end, time.time, {}
    for name, config in jobs:
        ballast = Path(config.url).parent / "ballast"

        def disturbed(self: Any, trainer: Any, *rest: Any, name: str = name, ballast: Path = ballast) -> None:
            advance(self, trainer, *rest)
            if name == "full" and trainer.global_step == 3:
                fill(ballast)
            if name == "full" and trainer.global_step == 7:
                ballast.unlink()
            if name in REMOTE and trainer.global_step == 7:
                Path(trainer.datamodule.config.url).with_name(f"{BACK}-{name}").touch()
            if name == "clock":
                time.time = lambda: clock() + {4: -86400.0, 8: 3e8}.get(trainer.global_step // 4 * 4, 0.0)
            if name == "final" and trainer.global_step == STEPS:  # the store goes and does not come back
                os.rename(trainer.datamodule.config.url[:-6] + "final", trainer.datamodule.config.url[:-6] + "gone")
                Path(trainer.datamodule.config.url[:-6] + "final").write_text("in the way")

        StreamPosition.on_train_batch_end = disturbed  # type: ignore[method-assign]
        try:
            fit(config)
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"
        finally:
            StreamPosition.on_train_batch_end, time.time = advance, clock  # type: ignore[method-assign]
    assert list(errors) == ["final"], errors
    return errors


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def losses(url: str) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(Store(url)) if "loss" in row]


@pytest.mark.parametrize("name", ["away", "full", "quota"])
def test_saves_fail_for_a_while_and_training_goes_on(runs: dict[str, str], name: str) -> None:
    store = Store(runs[name])
    failed = [row["step"] for row in read_metrics(store) if row.get("event") == "save_failed"]
    assert failed == [4, 6]
    checkpoints = store.sub("checkpoints")
    assert committed_steps(checkpoints) == [n for n in range(2, STEPS + 1, 2) if n not in failed]
    assert not any(verify(checkpoints, step) for step in committed_steps(checkpoints))
    assert losses(runs[name]) == losses(runs["whole"])  # no row is missing, none twice
    assert read_record(store)["status"] == "ok"


def test_a_slow_store_costs_time_only(runs: dict[str, str]) -> None:
    store = Store(runs["slow"])
    assert losses(runs["slow"]) == losses(runs["whole"])
    assert committed_steps(store.sub("checkpoints")) == [2, 4, 6, 8, 10, 12]
    assert not [row for row in read_metrics(store) if "event" in row]


def test_a_clock_that_jumps_changes_nothing(runs: dict[str, str]) -> None:
    assert losses(runs["clock"]) == losses(runs["whole"])
    checkpoints = Store(runs["clock"]).sub("checkpoints")
    assert committed_steps(checkpoints) == [2, 4, 6, 8, 10, 12]
    assert read_record(Store(runs["clock"]))["status"] == "ok"


def test_a_store_that_does_not_come_back_is_one_clear_error(runs: dict[str, str]) -> None:
    kind, _, line = runs["error"].partition(": ")
    assert kind in ("StoreError", "CheckpointError", "NotADirectoryError") and "final" in line
    assert committed_steps(Store(runs["whole"].replace("whole", "gone")).sub("checkpoints")) == [2, 4, 6, 8, 10]

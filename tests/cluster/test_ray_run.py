"""Training on a real Ray: two nodes, FSDP over gloo, code and data through the store. With a killed worker, a lost Ray node
and a cancellation, a run ends bitwise as one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster import cli
from cluster.launch import job as jobs
from cluster.launch.base import Backend
from cluster.launch.code import ROOT
from datamodules.store import Store
from tests.conftest import S3Server
from tests.helpers.ray import RayCluster
from tests.helpers.runs import fno_config, slowed, tiny_fields
from tests.helpers.slurm import wait_until
from trainer.checkpoint import committed_steps
from trainer.records import read_attempts, read_metrics, read_record, read_trace

CLUSTER = ROOT / "configs/clusters/ray.yaml"


@pytest.fixture
def place(s3: S3Server, ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `run.yaml` and `ray.yaml`, the shipped config with this machine's interpreter."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = tiny_fields(s3.url("fields"))
    raw = fno_config(s3.url("run"), data, max_steps=10**6)
    raw |= {"diagnostics": {"every": 0, "names": []}, "checkpoint": {"every": 50}}
    raw["schedule"] = {"name": "constant"}  # how long a run is does not change its steps
    raw["log"] |= {"every": 20}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    cluster = yaml.safe_load(CLUSTER.read_text())
    cluster |= {"python": sys.executable, "heartbeat_s": 1, "rendezvous": {"lost_s": 10}}
    cluster |= {"env": {"OMP_NUM_THREADS": "1", "KEEL_CODE_CACHE": str(tmp_path / "code"), **slowed(0.03)}}
    (tmp_path / "ray.yaml").write_text(yaml.safe_dump(cluster))
    return tmp_path


def read_job(store: Store) -> tuple[Backend, str]:
    found = jobs.read_job(store)
    assert found is not None and found.backend == "ray"
    return found.open(), found.job_id


def keel(*words: object) -> int:
    return cli.main([str(word) for word in words])


def wait(store: Store, *states: str, seconds: float = 240) -> None:
    """Waits until the job of the run is in one of `states`; it must not end in another."""
    backend, job = read_job(store)

    def look() -> bool:
        now = backend.state(job)
        assert now in states or now in ("queued", "running"), f"{now}\n" + "\n".join(backend.logs(job, 0))
        return now in states

    wait_until(look, f"{job} to be {states}", seconds, every=0.3)


def status(store: Store, node: int) -> dict:
    return store.read_json(f"status/node-{node}.json")


def workers(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def losses(store: Store) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(store) if "loss" in row}


@pytest.mark.timeout(900)
def test_a_run_survives_what_happens_to_a_cluster_bit_for_bit(place: Path, ray_cluster: RayCluster) -> None:
    store = Store(yaml.safe_load((place / "run.yaml").read_text())["url"])
    words = ("submit", place / "run.yaml", "--on", place / "ray.yaml", "nodes=2", "retries=5")
    # The submitter is a process that is gone when the job is queued.
    submitter = [sys.executable, "-m", "cluster.cli", *map(str, words)]
    done = subprocess.run(submitter, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "on ray: 2 x 1 processes" in done.stdout, done.stderr

    def training(attempt: int) -> int:
        """Waits until that attempt has trained; returns the step it resumed from."""

        def look() -> bool:
            wait(store, "running", "queued")
            return any(f"/{attempt:04d}-" in path for path in store.list("metrics"))

        wait_until(look, f"attempt {attempt} to train", 240, every=0.3)
        return int(read_attempts(store)[attempt - 1]["resumed_from"])

    def committed(after: int) -> int:
        """Waits for a commit later than the step `after`."""

        def look() -> int:
            newest = max(committed_steps(store.sub("checkpoints")), default=0)
            return newest if newest > after else 0

        return int(wait_until(look, f"a commit after step {after}", 240, every=0.3))

    resumed = [training(1)]
    first = committed(0)
    victim = status(store, 1)
    os.kill(workers(victim["pid"])[0], signal.SIGKILL)  # a worker: the node starts it again
    resumed.append(training(2))
    assert status(store, 1)["pid"] == victim["pid"] and resumed[1] >= first
    second = committed(resumed[1])
    backend, job = read_job(store)
    assert backend.state(job) == "running"
    gone = place_of(store, 1)
    ray_cluster.kill(gone)  # a Ray node, and all on it
    ray_cluster.start(gone)
    resumed.append(training(3))
    assert resumed[2] >= second and status(store, 1)["pid"] != victim["pid"]
    assert any("keel: warning: node 1 on " in line for line in backend._head.logs(job))
    backend.cancel(job)
    wait(store, "cancelled")
    steps = committed_steps(store.sub("checkpoints"))[-1]
    assert read_record(store)["status"] == "preempted" and read_record(store)["steps"] == steps

    steps += 20
    assert keel("resume", store.url, "--on", place / "ray.yaml", f"train.max_steps={steps}", "nodes=2") == 0
    wait(store, "done")
    alone = Store(f"{place}/alone")
    overrides = (f"url={alone.url}", f"train.max_steps={steps}", "resources.processes_per_node=2")
    assert keel("train", place / "run.yaml", *overrides) == 0
    record = read_record(store)
    assert (record["status"], record["steps"], record["attempts"]) == ("ok", steps, 4)
    assert losses(store) == losses(alone) and len(losses(store)) == steps
    assert record["loss"] == read_record(alone)["loss"]
    assert [row["index"] for row in read_trace(store)] == [row["index"] for row in read_trace(alone)]
    ended = [status(store, node) for node in (0, 1)]
    assert [(node["phase"], node["exit_code"], node["reason"]) for node in ended] == [("ended", 0, "done")] * 2


def place_of(store: Store, node: int) -> str:
    """The name of the Ray node that a node of the run is on."""
    environment = Path(f"/proc/{status(store, node)['pid']}/environ").read_bytes().split(b"\0")
    return next(e.partition(b"=")[2].decode() for e in environment if e.startswith(b"KEEL_RAY_NODE="))


def test_nothing_is_left_behind_by_a_job_that_is_refused(
    place: Path, ray_cluster: RayCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("submit", place / "run.yaml", "--on", place / "ray.yaml")
    assert keel(*words, "nodes=4") == 2
    assert capsys.readouterr().err == "keel: error: nodes=4: needs 4 nodes with 1 CPU, the cluster has 2\n"
    assert keel(*words, "ray.address=http://127.0.0.1:9") == 2
    assert capsys.readouterr().err.startswith("keel: error: Ray's dashboard does not answer at http://127.0.0.1:9: ")
    assert keel(*words, "nodes=2", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("job:\n  submission_id: $JOB\n  entrypoint: ")
    assert not Store(yaml.safe_load((place / "run.yaml").read_text())["url"]).exists("config.yaml")

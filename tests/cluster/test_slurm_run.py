"""Training on a real Slurm: two nodes, FSDP over gloo, code and data through the store; told to save, queued again, past
its time limit and with a lost node, a run ends bitwise as one that was left alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.launch import job as jobs
from datamodules.store import Store
from tests.conftest import S3Server
from tests.helpers.runs import fno_config, slowed, tiny_fields
from tests.helpers.slurm import SlurmCluster, wait_until
from trainer.checkpoint import committed_steps
from trainer.records import read_attempts, read_metrics, read_record, read_trace

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "configs/clusters/slurm.yaml"


@pytest.fixture
def place(s3: S3Server, slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `run.yaml` and `slurm.yaml`, the shipped config with this machine's interpreter."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = tiny_fields(s3.url("fields"))
    raw = fno_config(s3.url("run"), data, max_steps=10**6)
    raw |= {"diagnostics": {"every": 0, "names": []}, "checkpoint": {"every": 50}}
    raw["schedule"] = {"name": "constant"}  # how long a run is does not change its steps
    raw["log"] |= {"every": 20}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    cluster = yaml.safe_load(CLUSTER.read_text())
    cluster |= {"python": sys.executable, "env": {"OMP_NUM_THREADS": "1", **slowed(0.03)}, "heartbeat_s": 1}
    cluster["slurm"] |= {"logs": str(tmp_path), "signal_s": 20}
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(cluster))
    return tmp_path


def read_job(store: Store) -> jobs.JobFile:
    found = jobs.read_job(store)
    assert found is not None
    return found


def keel(*words: object) -> int:
    return cli.main([str(word) for word in words])


def submit(place: Path, *overrides: str) -> tuple[Store, str]:
    """The run's store and the job's id."""
    url = yaml.safe_load((place / "run.yaml").read_text())["url"]
    url = next((o.removeprefix("url=") for o in overrides if o.startswith("url=")), url)
    assert keel("submit", place / "run.yaml", "--on", place / "slurm.yaml", *overrides) == 0
    job = read_job(Store(url))
    assert job.backend == "slurm"
    return Store(url), job.job_id


def step(store: Store) -> int:
    return max((row["step"] for row in read_metrics(store)), default=0)


def losses(store: Store) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(store) if "loss" in row}


@pytest.mark.timeout(600)
def test_a_run_survives_what_slurm_does_to_it_bit_for_bit(place: Path, slurm: SlurmCluster) -> None:
    store, job = submit(place, "nodes=2", "time=10m")

    def training(attempt: int) -> int:
        """Waits until that attempt has trained; returns the step it resumed from."""

        def look() -> bool:
            slurm.wait(job, "running", "queued")
            return any(f"/{attempt:04d}-" in path for path in store.list("metrics"))  # rows leave every second

        wait_until(look, f"attempt {attempt} to train", 120, every=0.3)
        return int(read_attempts(store)[attempt - 1]["resumed_from"])

    resumed = [training(1)]
    # The time limit: told before it, saved, queued again.

    run_time = next(word for word in slurm.call("scontrol", "show", "job", "-o", job).split() if "RunTime=" in word)
    *_, minutes, seconds = (int(part) for part in run_time.removeprefix("RunTime=").split(":"))
    limit = minutes + 1 + (seconds > 30)  # the first one that leaves time for a save
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def told() -> bool:
        slurm.wait(job, "running", "queued")
        return "Restarts=1" in slurm.call("scontrol", "show", "job", "-o", job)

    wait_until(told, "the time limit", 120, every=0.3)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    resumed.append(training(2))
    slurm.call("scancel", "--signal=USR1", job)
    resumed.append(training(3))
    slurm.call("scontrol", "requeue", job)  # Slurm ends it itself, with a TERM
    resumed.append(training(4))
    assert 0 == resumed[0] < resumed[1] < resumed[2] < resumed[3]  # each had saved where it was
    slurm.kill("n2")
    try:
        slurm.wait(job, "queued", seconds=120)
    finally:
        slurm.start("n2")
    assert training(5) >= resumed[3]
    assert keel("cancel", store.url) == 0
    assert slurm.wait(job, "cancelled") == "cancelled"
    assert read_record(store)["status"] == "cancelled"

    steps = committed_steps(store.sub("checkpoints"))[-1] + 20
    assert keel("resume", store.url, "--on", place / "slurm.yaml", f"train.max_steps={steps}", "nodes=2") == 0
    assert slurm.wait(read_job(store).job_id, "done", seconds=120) == "done"
    alone = Store(f"{place}/alone")
    overrides = (f"url={alone.url}", f"train.max_steps={steps}", "resources.processes_per_node=2")
    assert keel("train", place / "run.yaml", *overrides) == 0

    record = read_record(store)
    assert (record["status"], record["steps"], record["attempts"]) == ("ok", steps, 6)
    assert losses(store) == losses(alone) and len(losses(store)) == steps
    assert record["loss"] == read_record(alone)["loss"]
    assert [row["index"] for row in read_trace(store)] == [row["index"] for row in read_trace(alone)]
    ended = [store.read_json(f"status/node-{node}.json") for node in (0, 1)]
    assert [(node["phase"], node["exit_code"]) for node in ended] == [("ended", 0)] * 2


def test_an_array_of_runs_and_one_that_is_cancelled(
    place: Path, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = yaml.safe_load((place / "run.yaml").read_text())["url"]
    settings = ("train.max_steps=8", "array=2", f"url={url}-{{index}}", "seed={index}")
    assert keel("submit", place / "run.yaml", "--on", place / "slurm.yaml", *settings) == 0
    tasks = [Store(f"{url}-{index}") for index in range(2)]
    job = read_job(tasks[0])
    assert slurm.wait(job.job_id, "done", seconds=120) == "done"
    records = [read_record(task) for task in tasks]
    assert [record["status"] for record in records] == ["ok", "ok"]
    assert records[0]["config"]["seed"] == 0 and records[1]["config"]["seed"] == 1
    assert records[0]["loss"] != records[1]["loss"]
    assert keel("status", tasks[1].url) == 0 and f"{job.job_id}_1 on slurm" in capsys.readouterr().out

    store, cancelled = submit(place, f"url={url}-cancelled")
    wait_until(lambda: step(store) > 0, "the run to train", 90)
    wait_until(lambda: store.list("logs"), "a log", 60)

    def told() -> dict[str, Any]:
        capsys.readouterr()
        code = keel("status", store.url, "--json")
        said = json.loads(capsys.readouterr().out)
        assert code == int(said["state"] not in ("starting", "running", "done"))
        return dict(said)

    now = wait_until(lambda: (said := told())["state"] == "running" and said, "the run to be heard", 60)
    assert now["job"] == {"id": cancelled, "backend": "slurm", "state": "running", "error": None}
    # From a machine that knows nothing of this Slurm the store tells the same.
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", "/nowhere")
        far = told()
        assert far["state"] in ("running", "stalled") and "is not installed here" in far["job"]["error"]
        assert keel("logs", store.url) == 0
        here = place / "here.yaml"
        here.write_text(f"{{backend: local, code: {{how: image}}, local: {{folder: {place}/jobs}}}}")
        assert keel("resume", store.url, "--on", here) == 2
        assert "which cannot be asked from here" in capsys.readouterr().err
        assert keel("cancel", store.url) == 0
        assert "a request lies in the store" in capsys.readouterr().out
    # To Slurm it is a job that ended with 130, and was not queued again.
    assert slurm.wait(cancelled, "failed") == "failed"
    assert told()["state"] == "cancelled"
    record = read_record(store)
    assert record["status"] == "cancelled" and committed_steps(store.sub("checkpoints"))[-1] == record["steps"]
    with monkeypatch.context() as elsewhere:  # and there it goes on
        elsewhere.setenv("PATH", "/nowhere")
        steps = record["steps"] + 2
        assert keel("resume", store.url, "--on", here, f"train.max_steps={steps}") == 0
        assert told()["state"] == "done" and read_record(store)["steps"] == steps


def test_a_store_that_the_nodes_cannot_write_to_is_one_line_and_no_second_start(
    place: Path, slurm: SlurmCluster
) -> None:
    reachable = "AWS_ENDPOINT_URL,AWS_REGION,AWS_DEFAULT_REGION,AWS_EC2_METADATA_DISABLED"
    store, job = submit(place, f"pass_env=[{reachable}]", "code.how=path", f"code.where={ROOT}")
    assert slurm.wait(job, "failed") == "failed"
    assert "ExitCode=2:0" in slurm.call("scontrol", "show", "job", "-o", job)
    (line,) = read_job(store).open().logs(job, 0)
    assert line.startswith(
        f"keel: error: {store.url}/status/node-0.json: no credentials (Unable to locate credentials)"
    )


def test_nothing_is_left_behind_by_a_job_that_is_refused(
    place: Path, slurm: SlurmCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("submit", place / "run.yaml", "--on", place / "slurm.yaml")
    assert keel(*words, "nodes=2", "slurm.partition=gpus") == 2
    told = capsys.readouterr().err
    assert told == "keel: error: slurm.partition=gpus: Slurm has no such partition, it has main, small, urgent\n"
    assert keel(*words, "nodes=4") == 2
    assert capsys.readouterr().err == "keel: error: nodes=4: partition main has 2\n"
    assert keel(*words, "nodes=2", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n#SBATCH --job-name=tiny-fno\n")
    url = yaml.safe_load((place / "run.yaml").read_text())["url"]
    assert not Store(url).exists("config.yaml") and slurm.call("squeue", "-h") == ""

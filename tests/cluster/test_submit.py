"""keel submit and keel resume --on, on this machine: what is refused, what is shipped, and jobs from their start to their
end, detached, in arrays, after each other, cancelled and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.launch.code import ROOT
from cluster.launch.job import read_job, task_spec
from cluster.launch.local_backend import Local
from datamodules.store import Store, StoreError
from tests.helpers.runs import fno_config, tiny_fields
from trainer.checkpoint import committed_steps
from trainer.records import read_metrics, read_record


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_fields(str(tmp_path_factory.mktemp("fields")))


@pytest.fixture
def place(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `run.yaml`, `here.yaml` (this machine, in the foreground) and `detached.yaml`."""
    raw = fno_config(str(tmp_path / "run"), data) | {"diagnostics": {"every": 0, "names": []}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    here = {"backend": "local", "code": {"how": "image"}, "heartbeat_s": 0.5, "job": {"retries": 1}}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(here))
    (tmp_path / "detached.yaml").write_text(yaml.safe_dump(here | {"local": {"detach": True}}))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def keel(*words: object) -> int:
    return cli.main([str(word) for word in words])


def submitted(url: str) -> Any:
    job = read_job(Store(url))
    assert job is not None
    return job


def until(url: str, *states: str, seconds: float = 240) -> str:
    deadline = time.monotonic() + seconds
    job = submitted(url)
    while (state := job.open().state(job.job_id)) not in states:
        folder = job.open().folder(job.job_id)
        said = "\n".join(log.read_text() for log in folder.glob("*.log"))
        assert time.monotonic() < deadline and state in ("queued", "running"), f"{state}\n{said}"
        time.sleep(0.1)
    return state


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nodes=3"], "global_batch"),
        (["nodes=two"], "job.nodes='two': expected int"),
        (["local.paralel=2"], "did you mean 'local.parallel'"),
        (["time=soon"], "must be like 90s"),
        (["array=2"], "each task needs its own url"),
        (["array=2", "url=x-{index}"], "all tasks are the same"),
        (["array=0"], "at least 1"),
        (["after=local-nobody"], "after=local-nobody: there is no such job"),
        (["image=x"], "image=x has no effect"),
        (["max_nodes=2"], "one machine is not elastic"),
        (["memory_gib=1e6"], "this machine has"),
        (["accelerators=1"], "accelerators=1 has no effect with resources.accelerator=cpu"),
        (["train.max_stps=1"], "did you mean 'train.max_steps'"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_queued(words: list[str], message: str, place: Path, capsys) -> None:
    assert keel("submit", place / "run.yaml", "--on", place / "here.yaml", *words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (place / "run").exists() and not (place / "state").exists()


def test_a_store_that_cannot_be_written_is_told_before_anything_is_queued(place: Path, capsys) -> None:
    (place / "file").write_text("")
    assert keel("submit", place / "run.yaml", "--on", place / "here.yaml", f"url={place}/file/run") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (place / "state").exists()


def test_a_dry_run_prints_the_command_and_touches_nothing(place: Path, capsys) -> None:
    words = ("submit", place / "run.yaml", "--on", place / "here.yaml", "--dry-run", "nodes=2", "time=1h", "retries=5")
    assert keel(*words) == 0
    printed = capsys.readouterr().out
    assert printed.count("-m cluster.launch.node") == 2 and "--time-limit 3600" in printed and "--restarts 5" in printed
    assert f"-- trainer fit {place}/run" in printed
    assert not (place / "run").exists() and not (place / "state").exists()


def test_a_folder_of_this_machine_is_told_where_several_nodes_must_see_it(place: Path, data: str, capsys) -> None:
    words = ("submit", place / "run.yaml", "--on", ROOT / "configs/clusters/slurm.yaml", "--dry-run", "pass_env=[]")
    assert keel(*words, "code.how=image", "nodes=2") == 0
    folders = f"url={place}/run, data.url={data}"
    assert capsys.readouterr().err == (
        f"keel: warning: {folders}: all nodes must see this folder under this path; an object store needs none\n"
    )
    assert keel(*words, "code.how=image") == 0
    assert capsys.readouterr().err == ""


def test_a_job_that_its_run_cannot_be_told_of_is_cancelled(place: Path, capsys, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise StoreError("the store is away")

    cancelled: list[str] = []
    monkeypatch.setattr("cluster.launch.job.write_job", fail)
    monkeypatch.setattr(Local, "submit", lambda self, spec: "local-1")
    monkeypatch.setattr(Local, "cancel", lambda self, job: cancelled.append(job))
    words = ("submit", place / "run.yaml", "--on", place / "detached.yaml")
    assert keel(*words) != 0 and cancelled == ["local-1"]
    error = capsys.readouterr().err
    assert "job local-1 is cancelled, since its run cannot be told of it\n" in error and "the store is away" in error
    monkeypatch.setattr(Local, "cancel", fail)
    assert keel(*words, f"url={place}/other") != 0
    assert "job local-1 goes on and must be cancelled by hand (the store is away)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- jobs
def test_the_laptop_config_trains_in_the_foreground_on_two_nodes(place: Path, capfd) -> None:
    laptop = ROOT / "configs/clusters/laptop.yaml"
    assert keel("submit", place / "run.yaml", "--on", laptop, "nodes=2") == 0
    printed = capfd.readouterr()
    assert "job local-" in printed.out and "ok after 8 steps" in printed.out and printed.err == ""
    store = Store(str(place / "run"))
    assert read_record(store)["status"] == "ok" and read_record(store)["environment"]["world_size"] == 2
    assert store.read_json("status/node-1.json")["reason"] == "done"
    assert keel("status", store.url) == 0
    assert "tiny_fno  done  " in (shown := capfd.readouterr().out) and "8 of 8 (100 %)" in shown and "step 8" in shown
    workers = [store.read_json(f"status/workers-{node}.json")["ranks"] for node in range(2)]
    assert sorted(rank["rank"] for ranks in workers for rank in ranks) == [0, 1]
    assert all(rank["memory_peak"] >= rank["memory"] > 1 << 20 and rank["step_s"] > 0 for (rank,) in workers)
    job = submitted(store.url)
    assert job.open().state(job.job_id) == "done" and job.spec.nodes == 2 and task_spec(job) == job.spec
    assert keel("submit", place / "run.yaml", "--on", laptop) == 2
    assert "a run exists at" in capfd.readouterr().err
    # Neither looking nor a mistake changes the run.
    before = store.read("config.yaml")
    assert keel("resume", store.url, "--on", laptop, "train.max_steps=50", "nodes=1", "--dry-run") == 0
    assert "-m cluster.launch.node" in capfd.readouterr().out and store.read("config.yaml") == before
    assert keel("resume", store.url, "--on", laptop, "train.max_steps=50", "after=local-nobody") == 2
    assert "there is no such job" in capfd.readouterr().err and store.read("config.yaml") == before


def test_a_detached_job_is_cancelled_and_resumed_from_its_shipped_code(place: Path, capsys) -> None:
    cache = place / "cache"
    long = ("train.max_steps=400", "checkpoint.every=5")
    cluster = yaml.safe_load((place / "detached.yaml").read_text()) | {"code": {"how": "snapshot"}}
    cluster |= {"env": {"KEEL_CODE_CACHE": str(cache)}}
    (place / "shipped.yaml").write_text(yaml.safe_dump(cluster))
    run = str(place / "run")
    assert keel("submit", place / "run.yaml", "--on", place / "shipped.yaml", *long) == 0
    assert "watch it with: keel status" in capsys.readouterr().out
    job, checkpoints = submitted(run), Store(run).sub("checkpoints")
    archive = Path(job.spec.code.where)
    assert archive.parent == place / "code" and hashlib.sha256(archive.read_bytes()).hexdigest() == job.spec.code.digest
    deadline = time.monotonic() + 240
    while not committed_steps(checkpoints):
        assert time.monotonic() < deadline and until(run, "running")
        time.sleep(0.1)
    assert keel("resume", run, "--on", place / "shipped.yaml") == 2
    assert f"job {job.job_id} of this run is running on local" in capsys.readouterr().err
    assert keel("cancel", run, "--wait") == 0
    assert capsys.readouterr().out.endswith(f"{run}: cancelled\n")
    assert until(run, "cancelled") == "cancelled"
    assert read_record(Store(run))["status"] == "cancelled"
    assert keel("status", run, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["state"] == told["job"]["state"] == "cancelled" and told["commit"]["step"] == told["step"]
    step = committed_steps(checkpoints)[-1]
    assert 0 < step < 400
    assert (cache / job.spec.code.digest / "cluster/launch/node.py").exists()
    assert keel("resume", run, "--on", place / "here.yaml", "processes=2", f"train.max_steps={step + 4}") == 0
    assert "ok after" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(Store(run)) if "loss" in row][-1] == step + 4
    assert "world_size" in read_record(Store(run))["environment"]


def test_an_array_and_a_job_after_it(place: Path, capsys) -> None:
    on = ("--on", place / "detached.yaml")
    short = ("train.max_steps=4", "local.parallel=2")
    assert keel("submit", place / "run.yaml", *on, *short, "array=2", f"url={place}/a-{{index}}", "seed={index}") == 0
    first = submitted(f"{place}/a-1")
    assert first.index == 1 and task_spec(first).run_url == f"{place}/a-1" and task_spec(first).array == 0
    assert keel("submit", place / "run.yaml", *on, *short, f"after={first.job_id}", f"url={place}/b") == 0
    assert until(f"{place}/b", "queued", "running", "done") != "done"
    assert not (place / "b/record.jsonl").exists()
    assert until(f"{place}/b", "done") == "done"
    assert first.open().state(first.job_id) == "done"
    records = [read_record(Store(f"{place}/{name}")) for name in ("a-0", "a-1", "b")]
    assert [record["status"] for record in records] == ["ok"] * 3
    assert [record["config"]["seed"] for record in records] == [0, 1, 7]
    assert [first.open().state(f"{first.job_id}_{task}") for task in (0, 1)] == ["done", "done"]
    # What the run's own log does not have, the backend has.
    folder = place / "state/keel/jobs" / first.job_id
    (folder / "task-00001-node-0.log").write_text("from the node\n")
    assert list(first.open().logs(f"{first.job_id}_1", 0)) == ["from the node"]
    assert list(first.open().logs(first.job_id, 0))[-1] == "from the node"  # of all tasks in turn
    Store(f"{place}/a-1").delete_tree("logs")
    capsys.readouterr()
    assert keel("logs", f"{place}/a-1") == 0 and capsys.readouterr().out == "from the node\n"
    assert keel("ls", place, "--json") == 0
    runs = json.loads(capsys.readouterr().out)
    assert [(told["url"], told["state"], told["step"]) for told in runs] == [
        (f"{place}/{name}", "done", 4) for name in ("a-0", "a-1", "b")
    ]
    # A job that comes after one that failed does not start.
    failed = place / "state/keel/jobs" / first.job_id / "outcome.json"
    failed.write_text(json.dumps({"state": "failed", "code": 1, "reason": "", "time": 0}))
    assert (
        keel("submit", place / "run.yaml", "--on", place / "here.yaml", f"after={first.job_id}", f"url={place}/c") == 1
    )
    assert "which this one comes after, is failed" in capsys.readouterr().err


def test_a_killed_node_is_started_again_and_a_killed_worker_leaves_a_record(place: Path) -> None:
    run = str(place / "run")
    long = ("train.max_steps=300", "checkpoint.every=5", "retries=1")
    assert keel("submit", place / "run.yaml", "--on", place / "detached.yaml", *long) == 0
    job, store = submitted(run), Store(run)
    deadline = time.monotonic() + 240
    while not committed_steps(store.sub("checkpoints")):
        assert time.monotonic() < deadline and until(run, "running")
        time.sleep(0.1)
    node = store.read_json("status/node-0.json")["pid"]
    os.kill(node, signal.SIGKILL)
    while store.read_json("status/node-0.json")["pid"] == node or not _child(store):
        assert time.monotonic() < deadline and until(run, "running")
        time.sleep(0.1)
    for _ in range(2):  # the worker is started again once; then the job has failed
        child, ends = None, time.monotonic() + 240
        while child is None or child == _killed(store, child):
            child = _child(store)
            assert time.monotonic() < ends
        os.kill(child, signal.SIGKILL)
        gone = child
        while _child(store) == gone and until(run, "running", "failed") == "running":
            time.sleep(0.05)
    assert until(run, "failed") == "failed"
    assert job.open().state(job.job_id) == "failed"
    record, status = read_record(store), store.read_json("status/node-0.json")
    assert record["status"] == "failed" and "was killed by SIGKILL" in record["error"]
    assert status["exit_code"] == 137 and status["reason"] == record["error"]


def _child(store: Store) -> int | None:
    node = store.read_json("status/node-0.json")["pid"]
    try:
        children = Path(f"/proc/{node}/task/{node}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


def _killed(store: Store, child: int) -> int | None:
    return child if not Path(f"/proc/{child}").exists() else None

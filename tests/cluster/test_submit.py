"""keel submit and keel resume --on, on this machine: what is refused, what is shipped, and jobs from their start to their
end, detached, in arrays, after each other, cancelled and resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.launch import BACKENDS, cluster_config
from cluster.launch.base import backend_class
from cluster.launch.code import ROOT, pack
from cluster.launch.entry import BOOTSTRAP, node_command, node_environment
from cluster.launch.job import read_job, task_spec
from cluster.launch.local_backend import Local
from cluster.launch.spec import CodeSpec, JobSpec, from_dict, passed, to_dict
from datamodules.store import Store, StoreError
from tests.helpers.runs import fno_config, tiny_fields
from trainer.checkpoint import committed_steps
from trainer.config import ConfigError
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


# ---------------------------------------------------------------------------------------------------------------- parts
def test_a_spec_survives_json_and_refuses_what_cannot_be() -> None:
    code = CodeSpec("snapshot", "s3://b/code/x.tar.gz", "ab" * 32)
    spec = JobSpec("a-b", ("trainer", "fit", "s3://b/r"), "s3://b/r", nodes=2, env={"X": "1"}, code=code, after=("7",))
    assert from_dict(json.loads(json.dumps(to_dict(spec)))) == spec
    good: dict[str, Any] = {"name": "x", "command": ("a",), "run_url": "u"}
    for bad, message in [
        ({"name": "A b"}, "name="),
        ({"nodes": 0}, "nodes=0"),
        ({"nodes": 3, "max_nodes": 2}, "max_nodes=2"),
        ({"array": 2}, "own url"),
        ({"run_url": "u-{index}"}, "no meaning without array"),
        ({"env": {"AWS_SECRET_ACCESS_KEY": "x"}}, "looks like a secret"),
        ({"time_limit_s": 0}, "time_limit_s=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            JobSpec(**(good | bad))
    for name in ("HF_TOKEN", "TOKEN", "TOKEN_FILE", "hub_token", "DB_PASSWORD"):
        with pytest.raises(ValueError, match="looks like a secret"):
            JobSpec(**good, env={name: "x"})
    JobSpec(**good, env={"TOKENIZERS_PARALLELISM": "false", "MAX_TOKENS": "1"})
    spec = JobSpec(**good, pass_env=("AWS_*", "HOME"))
    assert passed(spec, {"AWS_A": "1", "HOME": "/", "X": "y"}) == {"AWS_A": "1", "HOME": "/"}
    with pytest.raises(ValueError, match="HOME is not set here"):
        passed(spec, {})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("30m", 1800),
        ("1h30m", 5400),
        ("2d", 172800),
        ("4:00:00", 14400),
        ("1-12:00:00", 129600),
        ("", None),
    ],
)
def test_time_limits(text: str, seconds: float | None) -> None:
    assert cluster_config.seconds(text) == seconds


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "backend is required"),
        ({"backend": "moon"}, "backend=moon: unknown; one of"),
        ({"backend": "local", "slrum": {}}, "unknown key 'slrum'"),
        ({"backend": "local", "local": {"paralel": 2}}, "did you mean 'local.parallel'"),
        ({"backend": "local", "job": {"time": "soon"}}, "job: time=soon: must be like"),
        ({"backend": "local", "code": {"how": "path"}}, "code: how=path needs where="),
        ({"backend": "local", "env": {"API_TOKEN": "x"}}, "a secret does not belong in a file"),
        ({"backend": "local", "heartbeat_s": 0}, "heartbeat_s=0"),
        ({"backend": "local", "rendezvous": {"port": 70000}}, "port=70000"),
    ],
)
def test_a_wrong_cluster_is_refused_in_one_line(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        cluster_config.load(raw)
    assert "\n" not in str(refused.value)


def test_a_cluster_survives_the_store() -> None:
    cluster = cluster_config.load({"backend": "local", "env": {"A": "b"}, "local": {"parallel": 3}}, ["job.nodes=2"])
    again = cluster_config.load(json.loads(json.dumps(cluster_config.to_dict(cluster))))
    assert cluster_config.to_dict(again) == cluster_config.to_dict(cluster)
    assert again.options.parallel == 3 and again.job.nodes == 2


@pytest.mark.parametrize("name", sorted(BACKENDS))
def test_every_backend_has_the_interface(name: str) -> None:
    kind = backend_class(name)
    for method in ("render", "check", "submit", "state", "cancel", "logs"):
        assert callable(getattr(kind, method)), method
    assert dataclasses.is_dataclass(kind.Config)


def test_the_node_command_is_the_same_on_all_nodes_and_finds_the_code() -> None:
    cluster = cluster_config.load({"backend": "local", "rendezvous": {"lost_s": 9}, "python": "/opt/python"})
    base: dict[str, Any] = {"name": "x", "command": ("trainer", "fit", "u"), "run_url": "u", "nodes": 2, "max_nodes": 4}
    words = node_command(JobSpec(**base), cluster)
    assert words[:4] == ["/opt/python", "-P", "-m", "cluster.launch.node"] and words[-4:] == [
        "--",
        "trainer",
        "fit",
        "u",
    ]
    assert words[words.index("--nodes") + 1] == "2:4" and words[words.index("--lost") + 1] == "9"
    shared = JobSpec(**base, code=CodeSpec("path", "/shared/keel"), env={"A": "b"})
    assert node_command(shared, cluster) == words
    assert node_environment(shared) == {"PYTHONPATH": "/shared/keel", "A": "b"}
    shipped = JobSpec(**base, code=CodeSpec("snapshot", "s3://b/c.tar.gz", "ab"))
    assert node_command(shipped, cluster)[:6] == ["/opt/python", "-P", "-c", BOOTSTRAP, "s3://b/c.tar.gz", "ab"]
    assert node_command(shipped, cluster)[6:] == words[4:]


def test_a_snapshot_holds_what_git_does_not_ignore_and_is_named_after_it(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / "kept.py").write_text("a = 1\n")
    git("add", "kept.py")
    (tmp_path / "new.py").write_text("b = 2\n")
    (tmp_path / "big.log").write_text("x")
    first = pack(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert set(tar.getnames()) == {".gitignore", "kept.py", "new.py", ".keel-snapshot.json"}
    (tmp_path / "kept.py").touch()
    assert pack(tmp_path) == first
    (tmp_path / "kept.py").write_text("a = 3\n")
    assert pack(tmp_path) != first
    (tmp_path / "link.py").symlink_to("kept.py")
    pack(tmp_path)
    (tmp_path / "data").symlink_to("/nfs/data")
    with pytest.raises(ValueError, match=r"data is a link to /nfs/data, which no node has: add it to \.gitignore"):
        pack(tmp_path)
    with pytest.raises(ValueError, match="how=snapshot packs a git checkout"):
        pack(Path("/"))


def test_the_bootstrap_refuses_a_damaged_archive(tmp_path: Path) -> None:
    (tmp_path / "code.tar.gz").write_bytes(b"no archive")
    words = [sys.executable, "-P", "-c", BOOTSTRAP.replace("attempt == 4", "True"), str(tmp_path / "code.tar.gz")]
    done = subprocess.run([*words, "0" * 64], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the code cannot be fetched (OSError: its checksum is wrong)" in done.stderr


def test_a_node_that_is_told_to_end_while_it_fetches_the_code_is_started_again(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "code.tar.gz")
    words = [sys.executable, "-P", "-c", BOOTSTRAP, str(tmp_path / "code.tar.gz"), "0" * 64]
    node = subprocess.Popen(words)
    with open(tmp_path / "code.tar.gz", "wb"):  # waits for it to read
        node.send_signal(signal.SIGTERM)
        assert node.wait(60) == 75


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
    assert any("8 processes" in line or line for line in first.open().logs(first.job_id, 0))
    # What the run's own log does not have, the backend has.
    folder = place / "state/keel/jobs" / first.job_id
    (folder / "task-00001-node-0.log").write_text("from the node\n")
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

"""The Slurm backend on a real Slurm, with a small program in place of the node entry: queue, signals, ends, refusals."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import slurm_client
from cluster.launch.base import open_backend
from cluster.launch.cluster_config import load
from cluster.launch.slurm import Slurm
from cluster.launch.spec import CodeSpec, JobSpec
from tests.helpers.slurm import SlurmCluster, wait_until

# Stands in for `cluster.launch.node`: notes its environment, then does what its last argument says.
NODE = """
import json, os, signal, sys, time
out, action = sys.argv[-2:]
start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
keys = ["KEEL_NODE", "KEEL_RENDEZVOUS", "KEEL_JOB", "KEEL_ARRAY_INDEX", "SETTING", "EXTRA", "STRAY", "GIVEN", "SLURMD_NODENAME"]
if action == "save" or start:
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(signum, lambda *_: stopped.append(1))
stopped = []
name = f"{out}/{os.environ['KEEL_JOB']}-{start}-{os.environ['KEEL_NODE']}"
with open(name + ".tmp", "w") as file:
    json.dump({key: os.environ.get(key) for key in keys}, file)
os.rename(name + ".tmp", name + ".json")
print("node", os.environ["KEEL_NODE"], "start", start, flush=True)
if action[0].isdigit():
    codes = action.split(",")
    sys.exit(int(codes[min(int(os.environ["KEEL_NODE"]), len(codes) - 1)]))
while not stopped and not start:
    time.sleep(0.02)
if stopped:
    time.sleep(0.5)  # a save takes a while
    open(name + ".saved", "w").close()
    sys.exit(75)
"""


@pytest.fixture
def backend(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.setenv("GIVEN", "by the submitter")
    monkeypatch.setenv("STRAY", "stays behind")
    return make_backend(tmp_path)


def make_backend(folder: Path, **section: Any) -> Slurm:
    package = folder / "code/cluster/launch"
    package.mkdir(parents=True, exist_ok=True)
    (package / "node.py").write_text(NODE)
    cluster = {"python": sys.executable, "setup": ["export SETTING=set"], "pass_env": ["GIVEN"], "grace_s": 20}
    return open_backend(load({"backend": "slurm", "slurm": {"logs": str(folder), **section}, **cluster}))


def job(folder: Path, action: str, **fields: Any) -> JobSpec:
    values = {"nodes": 2, "run_url": "memory://run", "env": {"EXTRA": "it's $HOME"}, "pass_env": ("GIVEN",)}
    code = CodeSpec("path", str(folder / "code"))
    return JobSpec(name="test", command=("trainer", str(folder), action), code=code, **{**values, **fields})


def notes(folder: Path, job_id: str, start: int, nodes: int = 2) -> list[dict[str, str]]:
    """What the nodes noted at their `start`-th start; waits for it."""
    paths = [folder / f"{job_id}-{start}-{node}.json" for node in range(nodes)]
    wait_until(lambda: all(path.exists() for path in paths), f"start {start} of job {job_id}")
    return [json.loads(path.read_text()) for path in paths]


# --------------------------------------------------------------------------------------------------------------- queue
def test_nodes_know_where_they_stand_and_write_their_own_logs(
    backend: Slurm, slurm: SlurmCluster, tmp_path: Path
) -> None:
    name = backend.submit(job(tmp_path, "0", memory_gib=1.5, time_limit_s=100))
    assert slurm.wait(name, "done") == "done"
    first, second = notes(tmp_path, name, 0)
    assert (first["KEEL_NODE"], second["KEEL_NODE"]) == ("0", "1")
    assert (first["SLURMD_NODENAME"], second["SLURMD_NODENAME"]) == ("n1", "n2")
    for note in (first, second):
        assert note["KEEL_JOB"] == name and note["KEEL_ARRAY_INDEX"] is None
        assert note["KEEL_RENDEZVOUS"] == f"127.0.0.1:{15000 + int(name) % 15000}"
        assert (note["SETTING"], note["EXTRA"], note["GIVEN"]) == ("set", "it's $HOME", "by the submitter")
        assert note["STRAY"] is None
    assert list(backend.logs(name, 0)) == ["node 0 start 0"]
    assert list(backend.logs(name, 1)) == ["node 1 start 0"]
    assert list(backend.logs(name, 2)) == []
    shown = slurm.call("scontrol", "show", "job", "-o", name)
    for part in ("TimeLimit=00:02:00", "MinMemoryNode=1.50G", "Requeue=1", "Comment=memory://run", "JobName=test"):
        assert part in shown


@pytest.mark.parametrize(
    ("action", "fields", "starts"),
    [("1", {}, 1), ("2,74", {"nodes": 2}, 2), ("75", {"requeue": False}, 1), ("74", {"retries": 1}, 2)],
)
def test_only_what_starting_again_mends_is_queued_again(
    action: str, fields: dict, starts: int, backend: Slurm, slurm: SlurmCluster, tmp_path: Path
) -> None:
    name = backend.submit(job(tmp_path, action, **{"nodes": 1, "retries": 3, **fields}))
    assert slurm.wait(name, "failed") == "failed"
    assert f"ExitCode={action.partition(',')[0]}:0" in slurm.call("scontrol", "show", "job", "-o", name)
    assert len(list(tmp_path.glob(f"{name}-*.json"))) == starts


def test_an_array_runs_its_tasks_apart_and_a_dependent_job_after_them(
    backend: Slurm, slurm: SlurmCluster, tmp_path: Path
) -> None:
    name = backend.submit(job(tmp_path, "0", array=3, nodes=1, run_url="memory://run-{index}"))
    after = backend.submit(job(tmp_path, "0", nodes=1, after=(name,)))
    assert slurm.wait(after, "done", seconds=90) == "done"
    assert backend.state(name) == "done" and backend.state(f"{name}_2") == "done"
    for index in range(3):
        (note,) = notes(tmp_path, f"{name}_{index}", 0, nodes=1)
        assert note["KEEL_ARRAY_INDEX"] == str(index) and note["KEEL_RENDEZVOUS"] is None
        assert list(backend.logs(f"{name}_{index}", 0)) == ["node 0 start 0"]
    failed = backend.submit(job(tmp_path, "1", nodes=1))
    never = backend.submit(job(tmp_path, "0", nodes=1, after=(failed,)))
    assert slurm.wait(never, "cancelled", seconds=90) == "cancelled"


def test_nodes_may_differ_in_memory(slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVEN", "")
    backend = make_backend(tmp_path, groups=[{"memory_gib": 6}, {"memory_gib": 2}])
    name = backend.submit(job(tmp_path, "save"))
    first, second = notes(tmp_path, name, 0)
    assert (first["SLURMD_NODENAME"], first["KEEL_NODE"], second["KEEL_NODE"]) == ("n1", "0", "1")
    assert first["KEEL_RENDEZVOUS"] == second["KEEL_RENDEZVOUS"]
    assert list(backend.logs(name, 1)) == ["node 1 start 0"]
    shown = slurm.call("scontrol", "show", "job", "-o", name)
    assert "MinMemoryNode=6G" in shown and "MinMemoryNode=2G" in shown
    slurm.call("scancel", "--batch", "--signal=USR1", name)
    notes(tmp_path, name, 1)
    assert slurm.wait(name, "done") == "done"


def test_a_container_runs_the_node_where_setup_has_run(
    backend: Slurm, slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin/apptainer"  # exec --bind MOUNTS IMAGE COMMAND
    stand_in.write_text('#!/bin/bash\necho "$1 $2 $3"\nexport STRAY="in $4"\nshift 4\nexec "$@"\n')
    stand_in.chmod(0o755)
    (tmp_path / "keel.sif").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    contained = make_backend(tmp_path, container="apptainer", mounts=["/data"])
    name = contained.submit(job(tmp_path, "0", image=f"{tmp_path}/keel.sif"))
    assert slurm.wait(name, "done") == "done"
    for node, note in enumerate(notes(tmp_path, name, 0)):
        assert (note["SETTING"], note["STRAY"], note["KEEL_NODE"]) == ("set", f"in {tmp_path}/keel.sif", str(node))
    assert list(contained.logs(name, 0)) == [f"exec --bind {tmp_path}/code:{tmp_path}/code,/data", "node 0 start 0"]


# ------------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("action", ["save", "starting"])  # the second: before there is anybody to save
def test_a_job_that_is_told_to_save_is_queued_again(
    action: str, backend: Slurm, slurm: SlurmCluster, tmp_path: Path
) -> None:
    name = backend.submit(job(tmp_path, action))
    notes(tmp_path, name, 0)
    slurm.call("scancel", "--batch", "--signal=USR1", name)  # as Slurm does before the time limit
    notes(tmp_path, name, 1)
    assert slurm.wait(name, "done") == "done"
    saved = {path.name for path in tmp_path.glob("*.saved")}
    assert saved == ({f"{name}-0-0.saved", f"{name}-0-1.saved"} if action == "save" else set())
    assert list(backend.logs(name, 1)) == ["node 1 start 0", "node 1 start 1"]


def test_a_preempted_job_saves_and_comes_back(backend: Slurm, slurm: SlurmCluster, tmp_path: Path) -> None:
    name = backend.submit(job(tmp_path, "save", cpus=4))
    notes(tmp_path, name, 0)
    urgent = make_backend(tmp_path, partition="urgent").submit(job(tmp_path, "0", cpus=4))
    assert slurm.wait(urgent, "done") == "done"
    notes(tmp_path, name, 1)
    assert slurm.wait(name, "done") == "done"
    assert (tmp_path / f"{name}-0-1.saved").exists()


def test_cancelling_saves_first_and_is_for_good(backend: Slurm, slurm: SlurmCluster, tmp_path: Path) -> None:
    name = backend.submit(job(tmp_path, "save"))
    waiting = backend.submit(job(tmp_path, "0", after=(name,)))
    notes(tmp_path, name, 0)
    assert (backend.state(name), backend.state(waiting)) == ("running", "queued")
    backend.cancel(waiting)
    backend.cancel(name)
    assert slurm.wait(name, "cancelled") == "cancelled" and backend.state(waiting) == "cancelled"
    assert len(list(tmp_path.glob(f"{name}-0-*.saved"))) == 2
    time.sleep(1)
    backend.cancel(name)  # has ended: left alone
    assert backend.state(name) == "cancelled" and not (tmp_path / f"{name}-1-0.json").exists()
    assert backend.owns(name, "memory://run") and not backend.owns(name, "memory://other")
    assert backend.state("999999") == "unknown"
    backend.cancel("999999")


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ({"partition": "gpus"}, {}, "slurm.partition=gpus: Slurm has no such partition, it has main, small, urgent"),
        ({}, {"nodes": 3}, "nodes=3: partition main has 2"),
        ({"partition": "small"}, {}, "nodes=2: partition small has 1"),
        ({}, {"cpus": 64}, "nodes=2: partition main has 0 with 64 CPUs"),
        ({}, {"memory_gib": 6}, "nodes=2: partition main has 1 with 6 GiB of memory"),
        ({}, {"accelerators": 8}, "nodes=2: partition main has 0 with 8 of gpu"),
        ({"partition": "small"}, {"nodes": 1, "time_limit_s": 7200}, "time=120 minutes: partition small allows 10"),
        ({"constraint": "h200"}, {}, "sbatch refused: Invalid feature specification"),
        ({"container": "apptainer"}, {"image": "/tmp/no-such.sif"}, "image=/tmp/no-such.sif: no such file"),
        ({}, {"pass_env": ("NOT_SET_ANYWHERE",)}, "pass_env: NOT_SET_ANYWHERE is not set here"),
        ({}, {"after": ("999999",)}, "after=999999: Slurm knows no such job (any more)"),
        (
            {},
            {"array": 2000, "nodes": 1, "run_url": "memory://run-{index}"},
            "array= is more than Slurm takes (MaxArraySize in its configuration); submit several",
        ),
    ],
)
def test_what_can_never_run_is_refused_before_it_is_queued(
    section: dict, fields: dict, message: str, backend: Slurm, slurm: SlurmCluster, tmp_path: Path
) -> None:
    other, spec = make_backend(tmp_path, **section), job(tmp_path, "0", **fields)
    with pytest.raises((ValueError, OSError)) as error:
        other.check(spec)
        other.submit(spec)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert slurm.call("squeue", "-h", "-t", "PENDING") == ""


def test_a_job_larger_than_its_partition_takes_is_refused(backend: Slurm, slurm: SlurmCluster, tmp_path: Path) -> None:
    slurm.call("scontrol", "update", "PartitionName=urgent", "MaxNodes=1")
    try:
        with pytest.raises(ValueError, match=r"^nodes=2: partition urgent takes jobs of at most 1$"):
            make_backend(tmp_path, partition="urgent").check(job(tmp_path, "0"))
    finally:
        slurm.call("scontrol", "update", "PartitionName=urgent", "MaxNodes=UNLIMITED")


def test_a_slurm_that_cannot_be_asked_is_one_line(
    backend: Slurm, slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal() -> str:
        with pytest.raises(OSError) as error:
            backend.check(job(tmp_path, "0"))
        assert "\n" not in str(error.value)
        return str(error.value)

    broken = tmp_path / "slurm.conf"
    monkeypatch.setenv("SLURM_CONF", str(broken))
    text = Path(slurm.conf).read_text()
    broken.write_text(text.replace("munge.sock", "gone.sock"))
    assert refusal().startswith("munge does not run here, and Slurm needs it: start munged (Failed to access ")
    broken.write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=1\nMessageTimeout=1", text))
    assert refusal().startswith("Slurm's controller does not answer; is slurmctld running")
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        nothing = refusal()
    assert nothing == "sinfo is not installed here: submit from a machine with Slurm's client commands"


def test_causes_are_found_in_what_slurm_writes() -> None:
    why = slurm_client._why
    assert "set SLURM_CONF" in why(
        "sinfo", "sinfo: error: s_p_parse_file: cannot stat file /etc/x: No such file, retrying\n"
    )
    quota = "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates accounting/QOS policy\n"
    assert why("sbatch", quota) == "sbatch refused: QOSMaxSubmitJobPerUserLimit"
    assert why("sbatch", "") == "sbatch refused: it said nothing"

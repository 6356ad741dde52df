"""The Slurm backend on a real Slurm, with a small program in place of the node entry: queue, signals, ends, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import slurm_client
from cluster.launch.base import open_backend
from cluster.launch.cluster_config import load
from cluster.launch.job import JobFile, read_job, write_job
from cluster.launch.slurm import Slurm
from cluster.launch.spec import CodeSpec, JobSpec, to_dict
from datamodules.store import Store
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
    with pytest.raises((ValueError, OSError)) as error:
        make_backend(tmp_path, **section).submit(job(tmp_path, "0", **fields))
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


# ------------------------------------------------------------------------------------------------------------ rendering
GOLDEN = Path(__file__).parent / "golden"
BASE = JobSpec(
    name="fno",
    command=("trainer", "fit", "s3://bucket/runs/fno"),
    run_url="s3://bucket/runs/fno",
    nodes=2,
    processes=8,
    accelerators=8,
    cpus=96,
    memory_gib=512,
    time_limit_s=4 * 3600,
    env={"NCCL_DEBUG": "WARN", "NOTE": "it's a test"},
    code=CodeSpec("path", "/shared/keel"),
    retries=3,
)
VENV = {"setup": ["module load cuda", "source /opt/venv/bin/activate"], "slurm": {"partition": "gpu", "account": "ops"}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "venv": (VENV, {}),
    "pyxis": (
        {"slurm": {"container": "pyxis", "mounts": ["/scratch:/scratch"], "qos": "high", "exclusive": True}},
        {"code": CodeSpec("image"), "image": "nvcr.io#nvidia/pytorch:25.09-py3"},
    ),
    "apptainer": (
        {"python": "python3", "slurm": {"container": "apptainer", "mounts": ["/scratch"], "constraint": "h200|h100"}},
        {"code": CodeSpec("image"), "image": "/images/keel.sif", "requeue": False},
    ),
    "array": (
        {"slurm": {"directives": ["--switches=1"], "signal_s": 600}, "rendezvous": {"port": 29500}},
        {
            "array": 5,
            "run_url": "s3://bucket/runs/fno-{index}",
            "command": ("trainer", "fit", "s3://bucket/runs/fno-{index}"),
        }
        | {"after": ("12", "13"), "time_limit_s": 900},
    ),
    "snapshot": (
        {},
        {"code": CodeSpec("snapshot", "s3://bucket/code/ab12.tar.gz", "ab12"), "nodes": 1, "accelerators": 0},
    ),
    "groups": (
        {"slurm": {"groups": [{"memory_gib": 1024, "constraint": "big"}, {"nodes": 3}], "partition": "gpu"}},
        {"nodes": 4, "time_limit_s": None},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scripts_are_rendered_as_the_golden_files_say(name: str, tmp_path: Path) -> None:
    cluster, fields = CASES[name]
    script = open_backend(load({"backend": "slurm", **cluster})).render(dataclasses.replace(BASE, **fields))
    path = GOLDEN / f"slurm_{name}.sh"
    if os.environ.get("KEEL_GOLDEN") == "write":
        path.write_text(script)
    assert script == path.read_text(), f"if that is meant: KEEL_GOLDEN=write pytest {__file__}"
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_a_number_that_is_somebody_elses_job_now_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []
    comments = ["s3://bucket/runs/fno#lost=1"]

    def call(program: str, *words: str, **_: Any) -> str:
        calls.append((program, *words))
        if program == "squeue":
            return "7 RUNNING\n"
        if "7" not in words:
            raise slurm_client.SlurmError("scontrol refused: Invalid job id specified")
        comment = f" Comment={comments[-1]}" if comments[-1] else ""
        return f"JobId=7 JobState=RUNNING AdminComment=s3://x{comment} StdErr=/y\n"

    monkeypatch.setattr(slurm_client, "_call", call)
    cluster = load({"backend": "slurm"})
    run = Store(str(tmp_path / "run"))

    def job_file(job_id: str) -> JobFile:
        write_job(dataclasses.replace(BASE, run_url=run.url), cluster, job_id)
        run.write_json("job.json", {**run.read_json("job.json"), "spec": to_dict(BASE)})
        job = read_job(run)
        assert job is not None
        return job

    assert job_file("7").state() == "running"
    job_file("7").cancel()
    assert calls.pop() == ("scancel", "--batch", "--signal=USR2", "7")
    for other in ("s3://bucket/runs/fno-2", ""):
        comments.append(other)
        assert job_file("7").state() == "unknown"
        with pytest.raises(ValueError, match="job 7, as slurm knows it here, is not of this run; it is left alone"):
            job_file("7").cancel()
    assert job_file("8").state() == "unknown" and not any(words[0] == "scancel" for words in calls)


STAND_INS = {
    # Each start ends as the next line of `ends` says: the exit codes of its nodes, of which srun ends with the largest.
    "srun": """
read -r codes < ends; sed -i 1d ends; echo >> starts; largest=0; node=0
for code in $codes; do
    how="Exited with exit code $code"
    (( code <= 128 )) || how=Killed
    (( code == 0 )) || echo "srun: error: n$node: task $node: $how" >&2
    (( code <= largest )) || largest=$code
    node=$((node + 1))
done
exit $largest
""",
    "scontrol": """
case "$1" in
show) echo "JobId=7 JobState=RUNNING Restarts=0 Comment=$(cat comment) StdErr=x" ;;
update) echo "${3#Comment=}" > comment ;;
requeue) touch again ;;
esac
""",
}


@pytest.mark.parametrize(
    ("ends", "starts", "code"),
    [
        ("74 74 74 74", 3, 74),
        ("69 74 69 74", 3, 69),
        ("75 75 75 74 74 74 74", 6, 74),  # to be preempted uses nothing up
        ("74 74 75 74 74 74 74", 6, 74),  # and has saved
        ("74 74 77 74 74", 5, 74),  # nor counts what came before a commit
        ("137 137 137 137", 3, 137),  # the node entry was killed
        ("137 137 137,77 137 137", 5, 137),
        ("74,137 139,74 0", 3, 0),
        ("130", 1, 130),
        ("1", 1, 1),
        ("2,74", 1, 2),  # the others have lost the node that knows better
        ("137,2", 1, 2),
    ],
)
def test_retries_are_starts_after_failures_without_a_new_commit(
    ends: str, starts: int, code: int, tmp_path: Path
) -> None:
    (tmp_path / "ends").write_text("".join(f"{line.replace(',', ' ')}\n" for line in ends.split()))
    (tmp_path / "comment").write_text("s3://bucket/runs/fno\n")
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash{text}")
        (tmp_path / name).chmod(0o755)
    backend = open_backend(load({"backend": "slurm"}))
    script = backend.render(dataclasses.replace(BASE, nodes=1, retries=2))
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    again = True
    while again:
        (tmp_path / "again").unlink(missing_ok=True)
        with open(tmp_path / "log", "ab") as log:
            done = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, stderr=log, timeout=60)
        again = (tmp_path / "again").exists()
        assert not again or done.returncode == 75
    assert ((tmp_path / "starts").read_text().count("\n"), done.returncode) == (starts, code)
    assert slurm_client.run_of((tmp_path / "comment").read_text().strip()) == "s3://bucket/runs/fno"


@pytest.mark.parametrize(("container", "option"), [("pyxis", "--container-mounts="), ("apptainer", "--bind ")])
def test_a_container_sees_the_code_of_a_shared_folder(container: str, option: str) -> None:
    backend = open_backend(load({"backend": "slurm", "slurm": {"container": container, "mounts": ["/data"]}}))
    script = backend.render(dataclasses.replace(BASE, image="docker://keel"))
    (mounts,) = re.findall(re.escape(option) + r"(\S+)", script)
    assert mounts.removeprefix("/tmp:/tmp,") == "/shared/keel:/shared/keel,/data"


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ({}, {"max_nodes": 4}, "max_nodes=4: a Slurm job keeps its number of nodes"),
        ({}, {"image": "keel.sif"}, "image=keel.sif has no effect with slurm.container=none"),
        ({"container": "pyxis"}, {}, "slurm.container=pyxis needs image="),
        ({"container": "pyxis"}, {"image": "./a.sqsh"}, "image=./a.sqsh: a file needs its absolute path"),
        ({"container": "apptainer"}, {"image": "a.sif"}, "image=a.sif: a file needs its absolute path"),
        ({"groups": [{"nodes": 1}]}, {}, "slurm.groups have 1 nodes, but the job has nodes=2"),
        ({"container": "docker"}, {}, "container=docker: must be one of none, pyxis, apptainer"),
        ({"partitoin": "gpu"}, {}, "unknown key 'slurm.partitoin': did you mean 'slurm.partition'?"),
        ({"mounts": ["/a:/a"]}, {}, "mounts have no effect with container=none"),
        ({"logs": "logs"}, {}, "logs=logs: must be an absolute path"),
        ({"signal_s": -1}, {}, "signal_s=-1: must be at least 0"),
        ({"directives": ["switches=1"]}, {}, "directives: 'switches=1' is no sbatch option"),
        ({"directives": ["--comment=x"]}, {}, "a job's comment tells which run it is of"),
    ],
)
def test_impossible_jobs_are_refused(section: dict, fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        open_backend(load({"backend": "slurm", "slurm": section})).render(dataclasses.replace(BASE, **fields))
    assert message in str(error.value)

"""The batch scripts of the Slurm backend, without a Slurm: how they are rendered, what they do with how their nodes end, and
whose job a number is."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import slurm_client
from cluster.launch.base import open_backend
from cluster.launch.cluster_config import load
from cluster.launch.job import JobFile, read_job, write_job
from cluster.launch.spec import CodeSpec, to_dict
from datamodules.store import Store
from tests.helpers.jobs import FNO

GOLDEN = Path(__file__).parent / "golden"
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
    script = open_backend(load({"backend": "slurm", **cluster})).render(dataclasses.replace(FNO, **fields))
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
        return f"JobId=7 JobState=RUNNING AdminComment=s3://x{comment}  StdErr=/y\n"

    monkeypatch.setattr(slurm_client, "_call", call)
    cluster = load({"backend": "slurm"})
    run = Store(str(tmp_path / "run"))

    def job_file(job_id: str) -> JobFile:
        write_job(dataclasses.replace(FNO, run_url=run.url), cluster, job_id)
        run.write_json("job.json", {**run.read_json("job.json"), "spec": to_dict(FNO)})
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
    [[ $code != *k ]] || how=Killed
    code=${code%k}
    (( code == 0 )) || echo "srun: error: n$node: task $node: $how" >&2
    (( code <= largest )) || largest=$code
    node=$((node + 1))
done
exit $largest
""",
    "scontrol": """
case "$1" in
show) echo "JobId=7 JobState=RUNNING Restarts=0 Comment=$(cat comment)  StdErr=x" ;;
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
        ("137k 137k 137k 137k", 3, 137),  # the node entry was killed
        ("137", 1, 137),  # its workers were, so often as they may be
        ("137k 137k 137k,77 137k 137k", 5, 137),
        ("74,137k 139k,74 0", 3, 0),
        ("130", 1, 130),
        ("1", 1, 1),
        ("2,74", 1, 2),  # the others have lost the node that knows better
        ("137k,2", 1, 2),
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
    script = backend.render(dataclasses.replace(FNO, nodes=1, retries=2))
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
    script = backend.render(dataclasses.replace(FNO, image="docker://keel"))
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
        open_backend(load({"backend": "slurm", "slurm": section})).render(dataclasses.replace(FNO, **fields))
    assert message in str(error.value)

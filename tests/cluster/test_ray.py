"""The Ray backend on a real Ray, with a small program in place of the node entry: queue, lost nodes, ends, refusals."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.launch.base import open_backend
from cluster.launch.cluster_config import load
from cluster.launch.code import ROOT
from cluster.launch.ray import Ray, check_room
from cluster.launch.ray_plan import Plan
from cluster.launch.spec import CodeSpec, JobSpec
from tests.helpers.jobs import FNO
from tests.helpers.ray import CPUS, RayCluster
from tests.helpers.slurm import wait_until

# Stands in for `cluster.launch.node`: notes its environment, then does what the file that its last argument names says:
# an exit code, or nothing, until it says so or a signal comes.
NODE = """
import json, os, signal, sys, time
out, action = sys.argv[-2:]
stopped = []
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, lambda *_: stopped.append(1))
node = os.environ["KEEL_NODE"]
keys = ["KEEL_NODE", "KEEL_RENDEZVOUS", "KEEL_JOB", "KEEL_ARRAY_INDEX", "SETTING", "EXTRA", "STRAY", "GIVEN", "OMP_NUM_THREADS"]
note = {key: os.environ.get(key) for key in keys} | {"pid": os.getpid(), "ppid": os.getppid(), "ray": os.environ["KEEL_RAY_NODE"]}
name = f"{out}/{os.environ['KEEL_JOB']}-{node}-{time.time_ns()}"
with open(name + ".tmp", "w") as file:
    json.dump(note, file)
os.rename(name + ".tmp", name + ".json")
print("node", node, "starts", flush=True)
orders = f"{out}/{action}"
while not stopped:
    if os.path.exists(orders) and (text := open(orders).read().split()):
        sys.exit(int(text[min(int(node), len(text) - 1)]))
    if os.getppid() != note["ppid"]:
        sys.exit(1)
    time.sleep(0.02)
time.sleep(5 if action == "slow" else 0.5)  # a save takes a while, and longer than the 3 s that Ray leaves a driver
open(name + ".saved", "w").close()
sys.exit(75)
"""


@pytest.fixture
def backend(ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ray:
    monkeypatch.setenv("GIVEN", "by the submitter")
    monkeypatch.setenv("STRAY", "stays behind")
    return make_backend(tmp_path)


def make_backend(folder: Path, **section: Any) -> Ray:
    """A backend whose jobs run the program above, under the real driver."""
    package = folder / "code/cluster"
    if not package.exists():
        shutil.copytree(ROOT / "cluster/launch", package / "launch")
        (package / "__init__.py").touch()
        (package / "launch/node.py").write_text(NODE)
        for name in ("trainer", "datamodules", "modules"):
            (folder / "code" / name).symlink_to(ROOT / name)
    cluster = {"python": sys.executable, "setup": ["export SETTING=set"], "pass_env": ["GIVEN"], "grace_s": 20}
    return open_backend(load({"backend": "ray", "ray": section, "rendezvous": {"lost_s": 5}, **cluster}))


def job(folder: Path, action: str, **fields: Any) -> JobSpec:
    """`action` is the name of the file with the orders."""
    values = {"nodes": 2, "run_url": str(folder / "run"), "env": {"EXTRA": "it's $HOME"}, "pass_env": ("GIVEN",)}
    code = CodeSpec("path", str(folder / "code"))
    return JobSpec(name="test", command=("trainer", str(folder), action), code=code, **{**values, **fields})


def order(folder: Path, action: str, text: str) -> None:
    (folder / f"{action}.part").write_text(text)
    (folder / f"{action}.part").rename(folder / action)


def notes(folder: Path, job_id: str, *starts: int) -> list[dict[str, Any]]:
    """What node k noted at its newest start, once it was started `starts[k]` times."""

    def paths(node: int) -> list[Path]:
        return sorted(folder.glob(f"{job_id}-{node}-*.json"))

    wait_until(lambda: all(len(paths(k)) >= n for k, n in enumerate(starts)), f"starts {starts} of {job_id}", 120)
    assert [len(paths(k)) for k in range(len(starts))] == list(starts)
    return [json.loads(paths(k)[-1].read_text()) for k in range(len(starts))]


def until(backend: Ray, job_id: str, *states: str, seconds: float = 120) -> str:
    """Waits until the job is in one of `states`; it must not end in another."""

    def look() -> str:
        now = backend.state(job_id)
        said = "\n".join(backend._head.logs(job_id)) if now in ("done", "failed", "cancelled") else ""
        assert now in states or not said, f"{job_id} is {now}:\n{said}"
        return now if now in states else ""

    return str(wait_until(look, f"{job_id} to be {states}", seconds))


def ended(ray_cluster: RayCluster, job_id: str) -> tuple[str, int]:
    """(status, exit code of the driver), as Ray has it."""
    found = ray_cluster.ask(f"/api/jobs/{job_id}")
    return found["status"], found["driver_exit_code"]


# --------------------------------------------------------------------------------------------------------------- queue
def test_nodes_know_where_they_stand_and_save_when_cancelled(
    backend: Ray, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    name = backend.submit(job(tmp_path, "slow", memory_gib=1, processes=1, cpus=CPUS))
    waiting = backend.submit(job(tmp_path, "x", cpus=CPUS))
    first, second = notes(tmp_path, name, 1, 1)
    assert (first["KEEL_NODE"], second["KEEL_NODE"]) == ("0", "1") and {first["ray"], second["ray"]} == {"n1", "n2"}
    for note in (first, second):
        assert note["KEEL_JOB"] == name and note["KEEL_ARRAY_INDEX"] is None and note["OMP_NUM_THREADS"] == str(CPUS)
        assert note["KEEL_RENDEZVOUS"].startswith(f"{ray_cluster.address_of(first['ray'])}:")
        assert (note["SETTING"], note["EXTRA"], note["GIVEN"]) == ("set", "it's $HOME", "by the submitter")
        assert note["STRAY"] is None
    assert ray_cluster.ask(f"/api/jobs/{name}")["metadata"]["run"] == str(tmp_path / "run")
    assert (backend.state(name), backend.state(waiting)) == ("running", "queued")
    backend.cancel(waiting)
    backend.cancel(name)
    until(backend, name, "cancelled")
    until(backend, waiting, "cancelled")
    assert len(list(tmp_path.glob(f"{name}-*.saved"))) == 2 and not list(tmp_path.glob(f"{waiting}-*"))
    elsewhere = make_backend(tmp_path, address=ray_cluster.address)
    assert list(elsewhere.logs(name, 1)) == ["node 1 starts"] and list(elsewhere.logs(name, 2)) == []
    elsewhere.cancel(name)  # has ended: left alone
    elsewhere.cancel("keel-nobody")
    assert elsewhere.state("keel-nobody") == "unknown" and list(elsewhere.logs("keel-nobody", 0)) == []


def test_jobs_end_as_their_nodes_do(backend: Ray, ray_cluster: RayCluster, tmp_path: Path) -> None:
    """Exit codes, requeue, arrays and jobs that come after others, all at once."""
    order(tmp_path, "bad", "2")
    order(tmp_path, "worse", "0 137")
    order(tmp_path, "again", "75")
    order(tmp_path, "well", "0")
    one: dict[str, Any] = {"nodes": 1, "cpus": 1}
    bad = backend.submit(job(tmp_path, "bad", **one))
    array = backend.submit(job(tmp_path, "well", array=2, run_url=f"{tmp_path}/run-{{index}}", **one))
    after = backend.submit(job(tmp_path, "well", after=(array,), **one))
    never = backend.submit(job(tmp_path, "well", after=(bad,), **one))
    worse = backend.submit(job(tmp_path, "worse", cpus=1))
    again = make_backend(tmp_path, strategy="PACK").submit(job(tmp_path, "again", cpus=1))  # on one Ray node
    alone = backend.submit(job(tmp_path, "x", **one))
    (note,) = notes(tmp_path, alone, 1)
    os.kill(note["pid"], signal.SIGKILL)
    until(backend, alone, "failed")
    assert ended(ray_cluster, alone) == ("FAILED", 74)
    assert any(" was lost: its node entry ended with -9; no retries" in line for line in backend._head.logs(alone))
    until(backend, after, "done", seconds=240)
    assert backend.state(array) == "done" and [backend.state(f"{array}_{k}") for k in (0, 1, 2)] == [
        "done",
        "done",
        "unknown",
    ]
    for index in (0, 1):
        (note,) = notes(tmp_path, f"{array}_{index}", 1)
        assert note["KEEL_ARRAY_INDEX"] == str(index) and note["KEEL_RENDEZVOUS"]
    assert list(backend.logs(array, 0)) == ["node 0 starts"] * 2
    until(backend, bad, "failed")
    until(backend, worse, "failed")
    assert ended(ray_cluster, bad) == ("FAILED", 2) and ended(ray_cluster, worse) == ("FAILED", 137)
    until(backend, never, "failed")
    (said,) = [line for line in backend._head.logs(never) if line.startswith("keel: ")]
    assert said == f"keel: error: job {bad}, which this one comes after, is failed"
    for node in (0, 1):
        started = f"{again}-{node}-*.json"
        wait_until(lambda started=started: len(list(tmp_path.glob(started))) > 1, "the preempted job to come back", 120)
    order(tmp_path, "again", "0")
    until(backend, again, "done")


def test_lost_nodes_are_replaced_and_an_elastic_job_goes_on_without(
    backend: Ray, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    elastic = backend.submit(job(tmp_path, "x", nodes=1, max_nodes=2, retries=2, cpus=1))
    name = backend.submit(job(tmp_path, "x", retries=3, cpus=1))
    first, second = notes(tmp_path, name, 1, 1)
    os.kill(second["pid"], signal.SIGKILL)  # the node entry: starts again in its place, beside node 0
    _, second = notes(tmp_path, name, 1, 2)
    os.kill(second["ppid"], signal.SIGKILL)  # its actor
    again, second = notes(tmp_path, name, 1, 3)
    assert again["pid"] == first["pid"] and second["KEEL_RENDEZVOUS"] == first["KEEL_RENDEZVOUS"]
    zero, one = notes(tmp_path, elastic, 1, 1)
    assert {zero["ray"], one["ray"]} == {"n1", "n2"} and zero["KEEL_RENDEZVOUS"] == one["KEEL_RENDEZVOUS"]
    ray_cluster.kill(zero["ray"])  # a whole Ray node, that of node 0 of the elastic job
    (alone,) = notes(tmp_path, elastic, 2)  # on the node that is left, without a wait
    assert alone["ray"] == one["ray"] and alone["KEEL_RENDEZVOUS"] != one["KEEL_RENDEZVOUS"]
    ray_cluster.start(zero["ray"])
    if zero["ray"] == first["ray"]:  # node 0 of the other job, too: all are told of another place to meet
        first, second = notes(tmp_path, name, 2, 4)
    else:
        first, second = notes(tmp_path, name, 1, 4)
    assert first["KEEL_RENDEZVOUS"] == second["KEEL_RENDEZVOUS"] and {first["ray"], second["ray"]} == {"n1", "n2"}
    _, one = notes(tmp_path, elastic, 2, 2)
    assert one["KEEL_RENDEZVOUS"] == alone["KEEL_RENDEZVOUS"]
    order(tmp_path, "x", "0")
    until(backend, name, "done")
    until(backend, elastic, "done")
    said = [line for line in backend._head.logs(name) if " was lost: " in line]
    assert len(said) == 3 and said[0].startswith("keel: warning: node 1 on ") and "2 retries are left" in said[0]


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ({}, {"nodes": 3}, "nodes=3: needs 3 nodes with 2 CPUs, the cluster has 2"),
        ({}, {"cpus": 64}, "nodes=2: needs 2 nodes with 64 CPUs, the cluster has 0"),
        ({}, {"accelerators": 8}, "nodes=2: needs 2 nodes with 2 CPUs and 8 GPUs, the cluster has 0"),
        ({}, {"memory_gib": 4096}, "nodes=2: needs 2 nodes with 2 CPUs and 4096 GiB of memory, the cluster has 0"),
        ({"resources": {"tpu": 4}}, {}, "nodes=2: needs 2 nodes with 2 CPUs and 4 of tpu, the cluster has 0"),
        ({"labels": {"zone": "in(a,b)"}}, {}, "nodes=2: needs 2 nodes with 2 CPUs and zone=in(a,b), the cluster has 0"),
        ({"strategy": "PACK"}, {"nodes": 5}, "nodes=5: needs 5 nodes with 2 CPUs, the cluster has room for 4"),
        ({}, {"pass_env": ("NOT_SET_ANYWHERE",)}, "pass_env: NOT_SET_ANYWHERE is not set here"),
        ({}, {"pass_env": ("DOLLAR",)}, "pass_env: the value of DOLLAR holds a $, which Ray would expand"),
        ({}, {"after": ("keel-nobody",)}, "after=keel-nobody: there is no such job on http://127."),
        ({"address": "http://127.0.0.1:9"}, {}, "Ray's dashboard does not answer at http://127.0.0.1:9: "),
        ({"address": "http://no-such-host.invalid:8265"}, {}, "Ray's dashboard does not answer at http://no-such-host"),
    ],
)
def test_what_can_never_run_is_refused_before_it_is_queued(
    section: dict,
    fields: dict,
    message: str,
    backend: Ray,
    ray_cluster: RayCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DOLLAR", "a$b")
    jobs = len(ray_cluster.ask("/api/jobs/"))
    with pytest.raises((ValueError, OSError)) as error:
        make_backend(tmp_path, **section).check(job(tmp_path, "0", **{"processes": 2, **fields}))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert len(ray_cluster.ask("/api/jobs/")) == jobs


def test_a_cluster_that_grows_is_not_held_to_what_it_has(backend: Ray, tmp_path: Path) -> None:
    make_backend(tmp_path, autoscaling=True).check(job(tmp_path, "0", nodes=100))


def test_whoever_has_no_token_or_another_ray_is_told(
    backend: Ray, ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private.authentication_test_utils import reset_auth_token_state

    def refusal() -> str:
        with pytest.raises((ValueError, OSError)) as error:
            make_backend(tmp_path).check(job(tmp_path, "0"))
        assert "\n" not in str(error.value)
        return str(error.value)

    at = ray_cluster.address
    with monkeypatch.context() as patch:
        patch.setattr("ray.__version__", "2.49.0")
        assert refusal().startswith(f"the cluster at {at} runs Ray 2.") and "here is 2.49.0" in refusal()
    with monkeypatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        assert refusal() == f"Ray at {at} does not take this token: check RAY_AUTH_TOKEN_PATH"
        patch.delenv("RAY_AUTH_TOKEN")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        assert refusal().startswith(f"RAY_AUTH_MODE=token, but {tmp_path}/none cannot be read: set RAY_AUTH_TOKEN_PATH")
        patch.delenv("RAY_AUTH_MODE")
        reset_auth_token_state()
        assert refusal() == f"Ray at {at} wants a token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"
        patch.delenv("RAY_API_SERVER_ADDRESS")
        assert refusal().startswith("ray.address='': must be the URL of the head's dashboard, such as http://head:8265")
    reset_auth_token_state()


# ------------------------------------------------------------------------------------------------------------ rendering
GOLDEN = Path(__file__).parent / "golden"
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "path": ({"setup": ["module load cuda", "source /opt/venv/bin/activate"]}, {"pass_env": ("AWS_*",)}),
    "elastic": (
        {"python": "/opt/venv/bin/python", "ray": {"labels": {"zone": "in(a,b)"}, "resources": {"efa": 4}}},
        {"code": CodeSpec("image"), "max_nodes": 4, "after": ("keel-data-1",), "env": {"OMP_NUM_THREADS": "4"}},
    ),
    "array": (
        {"ray": {"strategy": "PACK", "namespace": "ops"}, "rendezvous": {"port": 29500}, "grace_s": 60},
        {
            "array": 5,
            "run_url": "s3://bucket/runs/fno-{index}",
            "command": ("trainer", "fit", "s3://bucket/runs/fno-{index}"),
            "code": CodeSpec("snapshot", "s3://bucket/code/ab12.tar.gz", "ab12"),
            "nodes": 1,
            "accelerators": 0,
            "requeue": False,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_submitted_is_rendered_as_the_golden_files_say(name: str) -> None:
    cluster, fields = CASES[name]
    text = open_backend(load({"backend": "ray", **cluster})).render(dataclasses.replace(FNO, **fields))
    path = GOLDEN / f"ray_{name}.yaml"
    if os.environ.get("KEEL_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"if that is meant: KEEL_GOLDEN=write pytest {__file__}"
    job, driver = yaml.safe_load_all(text)
    shell = shlex.split(job["job"]["entrypoint"])
    plan = Plan.from_json(shell[-1])
    assert plan.command == driver["driver"]["node"]["command"] and plan.nodes == len(
        driver["driver"]["placement_group"]["bundles"]
    )


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ({}, {"image": "keel:1"}, "image=keel:1 has no effect with backend=ray"),
        ({"address": "head:8265"}, {}, "address=head:8265: must be the URL of the head's dashboard"),
        ({"strategy": "SPREAD"}, {}, "strategy=SPREAD: must be one of STRICT_SPREAD, PACK"),
        ({"resources": {"GPU": 8}}, {}, "resources.GPU: set cpus, accelerators or memory_gib of the job instead"),
        ({"resources": {"efa": 0}}, {}, "resources.efa=0: must be positive"),
        ({"adress": "http://x"}, {}, "unknown key 'ray.adress': did you mean 'ray.address'?"),
    ],
)
def test_impossible_jobs_are_refused(section: dict, fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        open_backend(load({"backend": "ray", "ray": section})).render(dataclasses.replace(FNO, **fields))
    assert message in str(error.value)


@pytest.mark.parametrize(("selector", "values"), [("a", "a"), ("!a", "bc"), ("in(a, b)", "ab"), ("!in(a,b)", "c")])
def test_labels_select_as_in_ray(selector: str, values: str) -> None:
    plan = open_backend(load({"backend": "ray", "ray": {"labels": {"zone": selector}}})).plan(
        dataclasses.replace(FNO, nodes=1, accelerators=0, memory_gib=0, cpus=1)
    )
    fits = []
    for value in "abc":
        with contextlib.suppress(ValueError):
            check_room([({"CPU": 1.0}, {"zone": value})], plan)
            fits.append(value)
    assert "".join(fits) == values

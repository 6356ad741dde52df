"""What the Kubernetes backend asks kubectl, what it makes of the answers, and keel submit on Kubernetes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.launch import kubectl
from cluster.launch.base import open_backend
from cluster.launch.cluster_config import load
from cluster.launch.code import ROOT
from cluster.launch.job import read_job
from cluster.launch.kubernetes import Kubernetes, name_of
from datamodules.store import Store
from tests.cluster.kubernetes_schemas import BASE, validate
from tests.helpers.runs import fno_config

FAKE = """
import json, os, sys
here = os.path.dirname(os.path.abspath(__file__))
words = [word for word in sys.argv[1:] if not word.startswith("--")]
state = json.load(open(here + "/state.json"))
text = sys.stdin.read() if "-" in words else ""
with open(here + "/calls.jsonl", "a") as log:
    log.write(json.dumps({"words": sys.argv[1:], "stdin": text}) + "\\n")
for said, code, output in state["answers"]:
    if said in " ".join(sys.argv[1:]):
        (sys.stderr if code else sys.stdout).write(output)
        sys.exit(code)
if words[0] == "get" and "-l" in words:
    print(json.dumps({"items": state["items"]}))
elif words[0] == "get":
    print(json.dumps({"items": []}) if "json" in words else words[1] + "/" + words[2])
"""


class Fake:
    """A kubectl that notes how it is called, and says what a test wants it to say."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        script = folder / "kubectl"
        script.write_text(f"#!{sys.executable} -S\n{FAKE}")
        script.chmod(0o755)
        self.say()

    def say(self, *answers: tuple[str, int, str], items: tuple[dict[str, Any], ...] = ()) -> None:
        """`answers`: (part of the command line, exit code, output); `items`: what is found by labels."""
        (self.folder / "state.json").write_text(json.dumps({"answers": answers, "items": items}))
        (self.folder / "calls.jsonl").write_text("")

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    def words(self, verb: str) -> list[str]:
        """The arguments after those of the client, of the calls with this verb."""
        lines = [[w for w in call["words"] if not w.startswith("--request-timeout")] for call in self.calls()]
        return [" ".join(line) for line in lines if verb in line]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{fake.folder}:{os.environ['PATH']}")
    return fake


def backend(**section: Any) -> Kubernetes:
    return open_backend(load({"backend": "kubernetes", "kubernetes": {"kind": "job", "apply": True, **section}}))  # type: ignore[return-value]


def found(kind: str, task: int | None = None, **status: Any) -> dict[str, Any]:
    """An object as kubectl prints it."""
    labels = {} if task is None else {"keel/task": str(task)}
    return {"kind": kind, "metadata": {"name": "x", "labels": labels}, "status": status}


def ended(kind: str, condition: str, task: int | None = None) -> dict[str, Any]:
    return found(kind, task, conditions=[{"type": condition, "status": "True"}])


def test_submit_asks_first_then_applies_exactly_what_is_rendered(fake: Fake) -> None:
    job = backend(
        namespace="team", context="prod", secrets=["s3"], queue="gpus", volumes=[{"path": "/d", "claim": "c"}]
    )
    job.check(BASE)
    assert job.submit(BASE) == name_of(BASE)
    client, mine = "--context=prod --namespace=team", f"app.kubernetes.io/instance={name_of(BASE)}"
    assert [line.removeprefix(f"{client} ") for call in fake.calls() for line in [_line(call)]] == [
        f"get jobs.batch,pods -l {mine} -o json",
        "apply --dry-run=server -f -",
        "get localqueues.kueue.x-k8s.io gpus -o name",
        "get secrets s3 -o name",
        "get persistentvolumeclaims c -o name",
        "get resourcequotas -o json",
        f"delete jobs.batch,services -l {mine} --ignore-not-found --cascade=foreground --wait=true",
        "apply -f -",
    ]
    assert all(call["stdin"] in ("", job.render(BASE)) for call in fake.calls()) and fake.calls()[-1]["stdin"]


def _line(call: dict[str, Any]) -> str:
    return " ".join(word for word in call["words"] if not word.startswith("--request-timeout"))


@pytest.mark.parametrize(
    ("kind", "items", "state"),
    [
        ("job", [], "unknown"),
        ("job", [found("Job")], "queued"),
        ("job", [found("Job"), found("Pod", phase="Pending")], "queued"),
        ("job", [found("Job"), found("Pod", phase="Running")], "running"),
        ("job", [ended("Job", "Complete"), found("Pod", phase="Succeeded")], "done"),
        ("job", [ended("Job", "Failed")], "failed"),
        ("job", [ended("Job", "Suspended")], "queued"),
        ("jobset", [ended("JobSet", "Completed")], "done"),
        ("jobset", [ended("JobSet", "Failed")], "failed"),
        ("trainjob", [ended("TrainJob", "Complete")], "done"),
        ("pytorchjob", [ended("PyTorchJob", "Succeeded")], "done"),
        ("pytorchjob", [ended("PyTorchJob", "Restarting")], "queued"),
        ("rayjob", [found("RayJob", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")], "done"),
        ("rayjob", [found("RayJob", jobDeploymentStatus="Complete", jobStatus="STOPPED")], "cancelled"),
        ("rayjob", [found("RayJob", jobDeploymentStatus="Failed", jobStatus="FAILED")], "failed"),
        ("rayjob", [found("RayJob", jobDeploymentStatus="Initializing", jobStatus="")], "queued"),
        ("job", [ended("Job", "Complete", 0), found("Job", 1), found("Pod", 1, phase="Running")], "running"),
        ("job", [ended("Job", "Complete", 0), ended("Job", "Failed", 1)], "failed"),
    ],
)
def test_states(kind: str, items: list[dict[str, Any]], state: str, fake: Fake) -> None:
    fake.say(items=tuple(items))
    assert backend(kind=kind).state("x") == state


def test_cancel_deletes_what_runs_and_logs_are_those_of_the_node(fake: Fake) -> None:
    job, mine = backend(), "app.kubernetes.io/instance=x"
    fake.say(items=(found("Job"),))
    job.cancel("x")
    delete = f"delete jobs.batch,services -l {mine} --ignore-not-found --cascade=foreground --wait=false"
    assert fake.words("delete") == [delete]
    fake.say(items=(ended("Job", "Complete"),))
    job.cancel("x")
    assert fake.words("delete") == []
    fake.say(("logs", 0, "one\ntwo\n"))
    assert list(job.logs("x_3", 1)) == ["one", "two"]
    assert fake.words("logs") == [f"logs -l {mine},keel/task=3,batch.kubernetes.io/job-completion-index=1 --tail=-1"]
    assert list(backend(kind="pytorchjob").logs("x", 2)) == ["one", "two"]
    assert "training.kubeflow.org/replica-type=worker,training.kubeflow.org/replica-index=1 " in fake.words("logs")[-1]
    fake.say(("logs", 1, 'Error from server (BadRequest): container "node" in pod "x" is waiting to start: trying'))
    assert list(job.logs("x", 0)) == []


def test_a_rayjob_is_cancelled_and_read_through_its_head(fake: Fake) -> None:
    head = {"kind": "Pod", "metadata": {"name": "x-head", "labels": {}}, "status": {"phase": "Running"}}
    job = backend(kind="rayjob")
    fake.say(("exec", 0, "[node 0] one\nkeel: warning: x\n[node 1] two\n"), items=(found("RayJob"), head))
    job.cancel("x")
    ray = 'exec x-head -c ray-head -- sh -c ray job {} --address http://127.0.0.1:8265 "$KEEL_JOB"'
    assert fake.words("exec") == [ray.format("stop --no-wait")] and fake.words("delete") == []
    assert list(job.logs("x", 1)) == ["two"]
    assert fake.words("exec")[1:] == [ray.format("logs")]
    assert fake.words("get")[-1] == "get pods -l app.kubernetes.io/instance=x,ray.io/node-type=head -o json"
    fake.say(items=(found("RayJob"),))
    job.cancel("x")  # nobody is there yet to save
    assert len(fake.words("delete")) == 1


def test_a_job_that_runs_is_not_submitted_again_and_one_that_has_ended_makes_room(fake: Fake) -> None:
    fake.say(items=(found("Job"),))
    with pytest.raises(
        ValueError, match=r"job fno-\w+ of this run is queued; `keel cancel s3://bucket/runs/fno` ends it"
    ):
        backend().check(BASE)
    fake.say(items=(ended("Job", "Failed"),))
    with pytest.raises(ValueError, match=r"kubernetes\.apply=false: nothing would be queued"):
        backend(apply=False).check(BASE)
    backend().check(BASE)
    backend().submit(BASE)
    assert len(fake.words("delete")) == 1 and len(fake.words("apply")) == 1  # the server would refuse a dry run


# ------------------------------------------------------------------------------------------------------------ bad input
REFUSED = """\
E1126 12:00:00.0 7 memcache.go:265] "Unhandled Error" err="couldn't get current server API group list: Get ..."
The connection to the server 127.0.0.1:1 was refused - did you specify the right host or port?
"""


@pytest.mark.parametrize(
    ("section", "answer", "message"),
    [
        (
            {},
            ("get", 1, REFUSED),
            "the Kubernetes API does not answer (The connection to the server 127.0.0.1:1 was refused - did",
        ),
        (
            {"kind": "jobset"},
            ("get", 1, 'error: the server doesn\'t have a resource type "jobsets"\n'),
            "the cluster does not know jobsets: install what brings them",
        ),
        (
            {},
            ("--dry-run", 1, 'Error from server (NotFound): error when creating "STDIN": namespaces "lab" not found\n'),
            'kubectl refused: namespaces "lab" not found',
        ),
        (
            {},
            (
                "--dry-run",
                1,
                'Error from server (Forbidden): error when creating "STDIN": jobs.batch "x" is forbidden: exceeded quota: '
                "jobs, requested: count/jobs.batch=1, used: count/jobs.batch=4, limited: count/jobs.batch=4\n",
            ),
            'quota: jobs.batch "x" is forbidden: exceeded quota: jobs, requested: count/jobs.batch=1',
        ),
        (
            {"secrets": ["s3"]},
            ("get secrets s3", 1, 'Error from server (NotFound): secrets "s3" not found\n'),
            "kubernetes.secrets: the cluster has no s3 (secrets)",
        ),
        (
            {"queue": "gpus"},
            ("get localqueues", 1, 'Error from server (NotFound): localqueues.kueue.x-k8s.io "gpus" not found\n'),
            "kubernetes.queue: the cluster has no gpus (localqueues.kueue.x-k8s.io)",
        ),
    ],
)
def test_what_the_cluster_would_refuse_is_one_line_and_nothing_is_applied(
    section: dict, answer: tuple[str, int, str], message: str, fake: Fake
) -> None:
    fake.say(answer)
    with pytest.raises((ValueError, OSError)) as error:
        backend(**section).check(BASE)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert [line for line in fake.words("apply") if "--dry-run" not in line] == []


@pytest.mark.parametrize(
    ("hard", "message"),
    [
        (
            {"requests.nvidia.com/gpu": "8"},
            "quota: lab allows requests.nvidia.com/gpu=8 in this namespace, and the job needs 16",
        ),
        ({"pods": "1"}, "quota: lab allows pods=1 in this namespace, and the job needs 2"),
        ({"requests.memory": "1Ti", "requests.cpu": "96"}, "quota: lab allows requests.cpu=96"),
        ({"memory": "512Gi"}, "quota: lab allows memory=512Gi in this namespace, and the job needs 1024Gi"),
        ({"requests.cpu": "192", "count/jobs.batch": "1e3", "limits.memory": "1Gi"}, ""),
    ],
)
def test_more_than_a_quota_is_refused(hard: dict[str, str], message: str, fake: Fake) -> None:
    quotas = json.dumps({"items": [{"metadata": {"name": "lab"}, "spec": {"hard": hard}}]})
    fake.say(("get resourcequotas", 0, quotas))
    if not message:
        backend().check(BASE)
        return
    with pytest.raises(ValueError) as error:
        backend().check(BASE)
    assert str(error.value).startswith(message)


def test_what_may_not_be_looked_at_is_left_to_the_cluster(fake: Fake) -> None:
    no = 'Error from server (Forbidden): x is forbidden: User "me" cannot {} resource "x" in API group ""'
    fake.say(("get secrets", 1, no.format("get")), ("get resourcequotas", 1, no.format("list")))
    backend(secrets=["s3"]).check(BASE)


def test_without_kubectl_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for ask in (
        lambda job: job.check(BASE),
        lambda job: job.state("x"),
        lambda job: job.cancel("x"),
        lambda job: list(job.logs("x", 0)),
    ):
        with pytest.raises(kubectl.KubectlError, match=r"^kubectl is not installed here; use a machine that has it"):
            ask(backend())
    assert backend(apply=False).state("x") == "unknown"


# ----------------------------------------------------------------------------------------------------------- keel submit
def keel(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """`keel submit` of a small run, with the shipped config."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fno_config(str(tmp_path / "run"), str(tmp_path / "none"))))
    shipped = ROOT / "configs/clusters/kubernetes.yaml"
    volume = f"kubernetes.volumes=[{{path: {tmp_path}, host: {tmp_path}}}]"
    return ["submit", tmp_path / "run.yaml", "--on", shipped, "image=keel:1", "code.how=image", volume]


def test_the_manifest_is_printed_for_kubectl_and_the_run_is_ready(
    words: list[object], fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keel(*words, "nodes=2", "--dry-run") == 0
    dry = capsys.readouterr().out
    for document in yaml.safe_load_all(dry):
        validate(document)
    assert not (tmp_path / "run").exists() and fake.calls() == []
    assert keel(*words, "nodes=2") == 0
    printed = capsys.readouterr()
    assert printed.out == dry and "is ready but not queued: give what is printed to kubectl apply -f -" in printed.err
    job = read_job(Store(str(tmp_path / "run")))
    assert job is not None and job.backend == "kubernetes" and job.job_id in dry and job.spec.nodes == 2
    assert (tmp_path / "run/config.yaml").exists() and fake.words("apply") == []


def test_apply_queues_it_and_a_refusal_leaves_nothing_behind(
    words: list[object], fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.say(("apply -f", 1, 'Error from server (InternalError): failed calling webhook "vjobset.kb.io": EOF\n'))
    assert keel(*words, "--apply") == 2
    assert 'kubectl refused: failed calling webhook "vjobset.kb.io": EOF' in capsys.readouterr().err
    assert not (tmp_path / "run/config.yaml").exists()
    fake.say()
    assert keel(*words, "--apply") == 0
    assert "watch it with: keel status" in capsys.readouterr().out
    assert fake.words("apply")[-1].endswith("apply -f -")
    fake.say(items=(ended("Job", "Failed"),))
    assert keel("resume", tmp_path / "run", *words[2:], "--apply") == 0
    assert fake.words("apply")[-1].endswith("apply -f -") and "watch it with: keel status" in capsys.readouterr().out
    for command in (["submit", words[1]], ["resume", tmp_path / "run"]):
        assert keel(*command, "--on", ROOT / "configs/clusters/laptop.yaml", "--apply") == 2
        assert "--apply has no effect with backend=local; drop it" in capsys.readouterr().err


def test_a_doctor_is_given_to_kubectl_with_the_shipped_config(
    words: list[object], fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert keel("doctor", tmp_path / "reports", *words[2:]) == 2  # this kubectl only takes it
    assert "it could not be checked: job keel-doctor-" in capsys.readouterr().err
    assert fake.words("apply")[-1].endswith("apply -f -")


def test_what_no_pod_sees_is_refused(
    words: list[object], fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, message in [
        ([f"kubernetes.volumes=[{{path: {tmp_path}/ru, size: 1Gi}}]"], f"url={tmp_path}/run"),
        ([f"kubernetes.volumes=[{{path: {tmp_path}/run/, size: 1Gi}}]"], f"data.url={tmp_path}/none"),
        (["weights.url=/elsewhere"], "weights.url=/elsewhere"),
        (["code.how=path", "code.where=/opt/keel"], "code.where=/opt/keel"),
    ]:
        assert keel(*words, *change, "--dry-run") == 2
        error = capsys.readouterr().err
        assert f"{message} lies in none of kubernetes.volumes, so no pod sees it" in error and error.count("\n") == 1

"""The Kubernetes backend: manifests as the golden files say and as Kubernetes takes them, and refusals."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.launch.base import open_backend
from cluster.launch.cluster_config import load
from cluster.launch.code import ROOT
from cluster.launch.kubernetes import name_of
from cluster.launch.kubernetes_config import KINDS, quantity
from cluster.launch.kubernetes_pods import escaped
from cluster.launch.spec import CodeSpec
from datamodules.store import Store
from tests.cluster.kubernetes_schemas import BASE, validate
from tests.conftest import free_port

GOLDEN = Path(__file__).parent / "golden"
FULL = {
    "setup": ["source /opt/venv/bin/activate"],
    "kubernetes": {
        "kind": "job",
        "namespace": "team",
        "queue": "gpus",
        "priority_class": "batch",
        "service_account": "trainer",
        "node_selector": {"gpu": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu"}, {"key": "team", "value": "ops", "effect": "NoSchedule"}],
        "resources": {"vpc.amazonaws.com/efa": "4", "hugepages-2Mi": "5120Mi"},
        "shm": "64Gi",
        "secrets": ["s3-credentials"],
        "config_maps": ["proxy"],
        "volumes": [
            {"path": "/data", "claim": "datasets", "read_only": True},
            {"path": "/nvme", "host": "/mnt/nvme"},
            {"path": "/cache", "size": "200Gi"},
        ],
        "pull": "Always",
        "pull_secrets": ["registry"],
        "capabilities": ["IPC_LOCK"],
        "labels": {"team": "ops"},
        "annotations": {"kueue.x-k8s.io/podset-preferred-topology": "rack"},
        "pod": {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"},
        "keep_s": 86400,
    },
}
SNAPSHOT = CodeSpec("snapshot", "s3://bucket/code/ab12.tar.gz", "ab12")
ARRAY: dict[str, Any] = {
    "array": 2,
    "run_url": "s3://bucket/runs/fno-{index}",
    "command": ("trainer", "fit", "s3://bucket/runs/fno-{index}"),
}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "job": ({"kubernetes": {"kind": "job"}}, {}),
    "job_full": (FULL, {"requeue": False}),
    "job_alone": ({"kubernetes": {"kind": "job", "shm": ""}}, {"nodes": 1, "code": SNAPSHOT, "accelerators": 0}),
    "job_elastic": ({"kubernetes": {"kind": "job", "queue": "gpus"}}, {"max_nodes": 4}),
    "jobset": ({}, {}),
    "jobset_array": ({"rendezvous": {"port": 4000}, "kubernetes": {"shm": ""}}, ARRAY),
    "pytorchjob": ({"kubernetes": {"kind": "pytorchjob"}}, {}),
    "pytorchjob_elastic": ({"kubernetes": {"kind": "pytorchjob"}}, {"max_nodes": 4, "time_limit_s": None}),
    "trainjob": ({"kubernetes": {"kind": "trainjob"}}, {}),
    "rayjob": ({"kubernetes": {"kind": "rayjob"}}, {"max_nodes": 4, "code": SNAPSHOT}),
}


def render(cluster: dict[str, Any], **fields: Any) -> str:
    return open_backend(load({"backend": "kubernetes", **cluster})).render(dataclasses.replace(BASE, **fields))


def documents(cluster: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(cluster, **fields)))


# ------------------------------------------------------------------------------------------------------------ rendering
@pytest.mark.parametrize("name", CASES)
def test_manifests_are_rendered_as_the_golden_files_say_and_as_kubernetes_takes_them(name: str) -> None:
    cluster, fields = CASES[name]
    manifest = render(cluster, **fields)
    path = GOLDEN / f"kubernetes_{name}.yaml"
    if os.environ.get("KEEL_GOLDEN") == "write":
        path.write_text(manifest)
    assert manifest == path.read_text(), f"if that is meant: KEEL_GOLDEN=write pytest {__file__}"
    for document in yaml.safe_load_all(manifest):
        validate(document)


def test_there_is_a_golden_file_of_each_kind() -> None:
    assert {load({"backend": "kubernetes", **cluster}).options.kind for cluster, _ in CASES.values()} == set(KINDS)


def _set(document: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for part in parents:
        document = document[int(part)] if part.isdigit() else document[part]  # type: ignore[index]
    document[last] = value


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("job", "spec.backofLimit"),
        ("job", "spec.template.spec.containers.0.imagePulPolicy"),
        ("jobset", "spec.networks"),
        ("jobset", "spec.replicatedJobs.0.template.spec.podFailurePolicy.rule"),
        ("jobset", "spec.replicatedJobs.0.template.spec.template.spec.toleration"),
        ("pytorchjob", "spec.runPolicy.activeDeadlineSecond"),
        ("pytorchjob", "spec.pytorchReplicaSpecs.Worker.template.spec.volume"),
        ("pytorchjob", "spec.pytorchReplicaSpecs.Leader"),
        ("trainjob", "spec.trainer.nodes"),
        ("rayjob", "spec.rayClusterSpec.workerGroupSpecs.0.replica"),
        ("rayjob", "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0.envs"),
    ],
)
def test_a_typo_in_a_manifest_would_be_noticed(name: str, path: str) -> None:
    cluster, fields = CASES[name]
    document = documents(cluster, **fields)[-1]
    validate(document)
    _set(document, path, {})
    with pytest.raises(jsonschema.ValidationError, match=path.rpartition(".")[2]):
        validate(document)


def test_what_is_a_retry_and_what_is_not() -> None:
    def rules(**fields: Any) -> Any:
        (job,) = documents({"kubernetes": {"kind": "job"}}, nodes=1, **fields)
        validate(job)
        assert job["spec"]["backoffLimit"] == fields.get("retries", 3)
        return job["spec"].get("podFailurePolicy", {"rules": []})["rules"]

    evicted, preempted, fatal = rules()
    assert evicted["action"] == preempted["action"] == "Ignore" and fatal["action"] == "FailJob"
    assert preempted["onExitCodes"] == {"operator": "In", "values": [75]}
    assert fatal["onExitCodes"] == {"operator": "NotIn", "values": [69, 74, 75, 137, 143]}  # 2 is bad input, 1 a crash
    assert [rule["action"] for rule in rules(requeue=False)] == ["FailJob"]
    assert rules(retries=0)[-1]["onExitCodes"]["values"] == [75]
    assert rules(retries=0, requeue=False) == []


def test_a_job_is_named_after_its_run() -> None:
    assert name_of(BASE) == name_of(dataclasses.replace(BASE, nodes=9))
    assert name_of(BASE) != name_of(dataclasses.replace(BASE, run_url="s3://bucket/runs/other"))
    long = name_of(dataclasses.replace(BASE, name="9" * 63))
    assert long.startswith("run-9") and len(f"{long}-999-node-0-999-abcde") <= 63


def expanded(text: str) -> str:
    """As Kubernetes does: $$ is one dollar, and $(NAME) a variable, of which there is none."""
    out, i = "", 0
    while i < len(text):
        if text[i] == "$" and text[i + 1 : i + 2] == "$":
            i += 1
        elif text[i] == "$" and text[i + 1 : i + 2] == "(" and ")" in text[i:]:
            raise AssertionError(f"{text} has a variable at {i}")
        out += text[i]
        i += 1
    return out


def test_what_the_pods_of_a_job_would_run_meets_and_ends_well(tmp_path: Path) -> None:
    """Two processes in place of two pods; only the name of the first is another."""
    fields = {"command": ("platform",), "run_url": str(tmp_path / "run"), "processes": 1, "env": {"A": "$(b) $$"}}
    cluster = {"python": sys.executable, "setup": ["export SET=1"], "rendezvous": {"port": free_port()}}
    cluster |= {"kubernetes": {"volumes": [{"path": str(tmp_path), "host": str(tmp_path)}]}}
    (job,) = documents(cluster, **fields)
    (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    pods = []
    for index in range(2):
        env = {entry["name"]: expanded(entry["value"]) for entry in container["env"] if "value" in entry}
        (number,) = (entry for entry in container["env"] if "valueFrom" in entry)
        assert number["name"] == "KEEL_NODE" and "job-completion-index" in number["valueFrom"]["fieldRef"]["fieldPath"]
        host, _, port = env["KEEL_RENDEZVOUS"].partition(":")
        assert host == f"{env['KEEL_JOB']}-node-0-0.{env['KEEL_JOB']}" and env["A"] == "$(b) $$"
        env |= {"KEEL_NODE": str(index), "KEEL_RENDEZVOUS": f"127.0.0.1:{port}", "PYTHONPATH": str(ROOT)}
        words = [expanded(word) for word in container["command"]]
        pods.append(subprocess.Popen(words, env={**os.environ, **env, "OMP_NUM_THREADS": "1"}, cwd=tmp_path))
    assert [pod.wait(200) for pod in pods] == [0, 0]
    ends = [Store(fields["run_url"]).read_json(f"status/node-{node}.json") for node in (0, 1)]
    assert [(end["reason"], end["job_id"]) for end in ends] == [("done", job["metadata"]["name"])] * 2


def test_dollars_reach_the_pod_as_they_are() -> None:
    for text in ("$HOME", "$(date)", "$$", "a $$(b) $", "$((1 + $N))", "${X:-$(y)}"):
        assert expanded(escaped(text)) == text


@pytest.mark.parametrize(
    ("cluster", "fields", "message"),
    [
        ({}, {"image": ""}, "image is required: a pod runs one"),
        ({}, {"pass_env": ("AWS_*",)}, "pass_env=AWS_*: values of your environment would stand in the manifest"),
        ({}, {"after": ("x",)}, "after=x: Kubernetes has no order of jobs"),
        ({"kubernetes": {"kind": "trainjob"}}, {"max_nodes": 4}, "max_nodes=4: a trainjob keeps its number of nodes"),
        ({"kubernetes": {"queue": "q"}}, {"max_nodes": 4}, "max_nodes=4: Kueue admits all of a jobset or nothing"),
        ({}, {"code": CodeSpec("path", "/shared/keel")}, "code.where=/shared/keel lies in none of kubernetes.volumes"),
        ({"kubernetes": {"pod": {"containers": []}}}, {}, "kubernetes.pod.containers is set by Keel"),
        ({"kubernetes": {"kind": "pod"}}, {}, "kind=pod: must be one of jobset, pytorchjob, trainjob, rayjob, job"),
        ({"kubernetes": {"nodeselector": {}}}, {}, "unknown key 'kubernetes.nodeselector': did you mean"),
        ({"kubernetes": {"shm": "8 GB"}}, {}, "'8 GB' is no quantity, such as 4, 500m or 16Gi"),
        ({"kubernetes": {"pull": "Sometimes"}}, {}, "pull=Sometimes: must be one of Always, IfNotPresent, Never"),
        ({"kubernetes": {"volumes": [{"path": "/a"}]}}, {}, "volumes: /a needs one of claim=, host= and size="),
        ({"kubernetes": {"volumes": [{"path": "a", "size": "1Gi"}]}}, {}, "path='a' must be an absolute path"),
        ({"kubernetes": {"tolerations": [{"effect": "No"}]}}, {}, "effect=No: must be one of NoSchedule"),
        ({"kubernetes": {"keep_s": -1}}, {}, "keep_s=-1: must be at least 0"),
    ],
)
def test_impossible_jobs_are_refused(cluster: dict, fields: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        render(cluster, **fields)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "value"), [("4", 4), ("500m", 0.5), ("16Gi", 2**34), ("2k", 2000), ("1Ki", 1024)])
def test_quantities(text: str, value: float) -> None:
    assert quantity(text) == value


def test_the_shell_of_a_pytorchjob_tells_the_operator_what_to_start_again(tmp_path: Path) -> None:
    node = tmp_path / "python"
    node.write_text(
        f"#!{sys.executable}\nimport os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "print(os.environ['KEEL_NODE'], flush=True)\n"
        "code = int(os.environ['CODE'])\n"
        "time.sleep(60) if code < 0 else sys.exit(code)\n"
    )
    node.chmod(0o755)
    (job,) = documents({"python": str(node), "kubernetes": {"kind": "pytorchjob"}}, nodes=1)
    command = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["command"]

    def start(code: int) -> subprocess.Popen[str]:
        env = {**os.environ, "RANK": "3", "CODE": str(code)}
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    for code, told in [(0, 0), (2, 2), (75, 203), (74, 202), (69, 197), (1, 1)]:
        assert start(code).wait(60) == told
    preempted = start(-1)
    assert preempted.stdout is not None and preempted.stdout.readline() == "3\n"
    preempted.send_signal(signal.SIGTERM)
    assert preempted.wait(60) == 203

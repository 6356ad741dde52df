"""The kinds of job on Kubernetes: what each looks like as objects, and how it says that it has ended.

Written from the public API types: JobSet v1alpha2 (kubernetes-sigs/jobset), PyTorchJob v1 (kubeflow/training-operator 1.x),
TrainJob v1alpha1 (kubeflow/trainer).

`job`, `jobset` and `trainjob` all come down to one indexed Job, whose pods have stable names and numbers. A pod that was
preempted or evicted is replaced by itself, so the others need not start again: they wait for it, and the run goes on from
the last commit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.launch import EXIT_LOST, EXIT_REQUEUE, EXIT_UNAVAILABLE, kubernetes_ray
from cluster.launch.kubectl import Kubectl
from cluster.launch.kubernetes_pods import INDEX, RUN, Object, labels, node_pod
from cluster.launch.spec import JobSpec

if TYPE_CHECKING:
    from cluster.launch.cluster_config import ClusterConfig

# After these a node may be started again, but not for ever.
_AGAIN = (EXIT_UNAVAILABLE, EXIT_LOST)
# What killed the node itself, and not its workers: out of memory, or a signal before it could take one.
_KILLED = (137, 143)


@dataclass(frozen=True)
class Kind:
    """One kind of job.

    Attributes:
        resource: what `kubectl get` calls it.
        others: resources that belong to the job beside it and its pods.
        elastic: whether a job may start with fewer nodes than it may have.
        objects: (spec, cluster, name, job id, task of an array) -> the objects of one job.
        ended: the job's object -> `done`, `failed` or `cancelled`; "" while it goes on.
        logs: (kubectl, selector of the job, number of a node) -> what the node printed.
        stop: (kubectl, selector of the job) -> whether the job was told to save and end; None: its pods are, when it is
            deleted.
    """

    resource: str
    others: tuple[str, ...]
    elastic: bool
    objects: Callable[[JobSpec, ClusterConfig, str, str, int | None], list[Object]]
    ended: Callable[[Object], str]
    logs: Callable[[Kubectl, str, int], Iterator[str]]
    stop: Callable[[Kubectl, str], bool] | None = None


def _of_task(text: str, task: int | None) -> str:
    return text if task is None else text.replace("{index}", str(task))


def _head(
    api: str, kind: str, name: str, job_id: str, task: int | None, spec: JobSpec, cluster: ClusterConfig
) -> Object:
    options = cluster.options
    metadata: Object = {"name": name}
    if options.namespace:
        metadata["namespace"] = options.namespace
    metadata["labels"] = labels(options, job_id, task)
    if kind not in ("Service", "TrainingRuntime"):
        if options.queue:
            metadata["labels"]["kueue.x-k8s.io/queue-name"] = options.queue
        metadata["annotations"] = {**options.annotations, RUN: _of_task(spec.run_url, task)}
    return {"apiVersion": api, "kind": kind, "metadata": metadata}


# ------------------------------------------------------------------------------------------------------- indexed Jobs
def _job_spec(spec: JobSpec, cluster: ClusterConfig, template: Object) -> Object:
    size = max(spec.nodes, spec.max_nodes)
    counted = [*_AGAIN, *_KILLED] if spec.retries else []
    again: list[Object] = []
    if spec.requeue:
        again = [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [EXIT_REQUEUE]}},
        ]
        counted = sorted([EXIT_REQUEUE, *counted])
    fatal = {"action": "FailJob", "onExitCodes": {"operator": "NotIn", "values": counted}}
    found: Object = {
        "completions": size,
        "parallelism": size,
        "completionMode": "Indexed",
        "backoffLimit": spec.retries * size,  # when nodes lose each other, each of them may end
        "podReplacementPolicy": "Failed",
    }
    if counted:
        found["podFailurePolicy"] = {"rules": [*again, fatal]}
    if size > spec.nodes:  # node 0 ends when the run does; those that never found room are not waited for
        found["successPolicy"] = {"rules": [{"succeededIndexes": "0"}]}
    if spec.time_limit_s is not None:
        found["activeDeadlineSeconds"] = math.ceil(spec.time_limit_s)
    return found | {"template": template}


def _many(spec: JobSpec) -> bool:
    return max(spec.nodes, spec.max_nodes) > 1


def _numbered(spec: JobSpec, cluster: ClusterConfig, job_id: str, task: int | None, host: str) -> Object:
    index = {"fieldRef": {"fieldPath": INDEX}}
    return node_pod(spec, cluster, job_id, task, host=host if _many(spec) else "", node=index)


def _kept(cluster: ClusterConfig) -> Object:
    return {"ttlSecondsAfterFinished": cluster.options.keep_s} if cluster.options.keep_s else {}


def _job(spec: JobSpec, cluster: ClusterConfig, name: str, job_id: str, task: int | None) -> list[Object]:
    template = _numbered(spec, cluster, job_id, task, f"{name}-0.{name}")
    head = _head("batch/v1", "Job", name, job_id, task, spec, cluster)
    if spec.max_nodes > spec.nodes and cluster.options.queue:
        head["metadata"]["annotations"] |= {
            "kueue.x-k8s.io/job-min-parallelism": str(spec.nodes),
            "kueue.x-k8s.io/job-completions-equal-parallelism": "true",
        }
    job = head | {"spec": _kept(cluster) | _job_spec(spec, cluster, template)}
    if not _many(spec):
        return [job]
    template["spec"]["subdomain"] = name
    service = _head("v1", "Service", name, job_id, task, spec, cluster)
    # Without an address of its own it only gives the pods their names, before they are ready.
    service["spec"] = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": name},
    }
    return [service, job]


def _jobset_spec(spec: JobSpec, cluster: ClusterConfig, name: str, job_id: str, task: int | None) -> Object:
    template = _numbered(spec, cluster, job_id, task, f"{name}-node-0-0.{name}")
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": 0},  # the Job inside starts again what can be
        "replicatedJobs": [
            {"name": "node", "replicas": 1, "template": {"spec": _job_spec(spec, cluster, template)}},
        ],
    }


def _jobset(spec: JobSpec, cluster: ClusterConfig, name: str, job_id: str, task: int | None) -> list[Object]:
    head = _head("jobset.x-k8s.io/v1alpha2", "JobSet", name, job_id, task, spec, cluster)
    return [head | {"spec": _kept(cluster) | _jobset_spec(spec, cluster, name, job_id, task)}]


def _trainjob(spec: JobSpec, cluster: ClusterConfig, name: str, job_id: str, task: int | None) -> list[Object]:
    api = "trainer.kubeflow.org/v1alpha1"
    inner = _jobset_spec(spec, cluster, name, job_id, task)
    inner["replicatedJobs"][0]["template"]["metadata"] = {
        "labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    }
    # A runtime of the job's own: those of a cluster start torchrun, and differ from cluster to cluster.
    runtime = _head(api, "TrainingRuntime", name, job_id, task, spec, cluster)
    runtime["spec"] = {"mlPolicy": {"numNodes": spec.nodes}, "template": {"spec": inner}}
    train = _head(api, "TrainJob", name, job_id, task, spec, cluster)
    train["spec"] = {
        "runtimeRef": {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": name},
        "trainer": {"numNodes": spec.nodes},
    }
    return [runtime, train]


# ----------------------------------------------------------------------------------------------------------- PyTorchJob
def _pytorchjob(spec: JobSpec, cluster: ClusterConfig, name: str, job_id: str, task: int | None) -> list[Object]:
    # The operator starts a pod again when its exit code is 128 or more; it does not count.
    again = [EXIT_REQUEUE] * spec.requeue + list(_AGAIN) * bool(spec.retries)
    lines = ['"$@" &', "node=$!", """trap 'kill -TERM "$node"' TERM"""]
    lines += ['while kill -0 "$node" 2>/dev/null; do wait "$node"; done', 'wait "$node"', "code=$?"]
    lines += [f'if [[ "$code" == {code} ]]; then code={128 + code}; fi' for code in again]
    shell = "\n".join(['export KEEL_NODE="$RANK"', *lines, 'exit "$code"'])
    template = node_pod(
        spec,
        cluster,
        job_id,
        task,
        container="pytorch",
        host=f"{name}-master-0" if _many(spec) else "",
        shell=shell,
    )
    del template["spec"]["restartPolicy"]  # the operator's own is beside the template
    size = max(spec.nodes, spec.max_nodes)
    replicas = {"Master": {"replicas": 1, "restartPolicy": "ExitCode", "template": template}}
    if size > 1:
        replicas["Worker"] = {"replicas": size - 1, "restartPolicy": "ExitCode", "template": template}
    policy: Object = {"cleanPodPolicy": "Running", **_kept(cluster)}
    if spec.time_limit_s is not None:
        policy["activeDeadlineSeconds"] = math.ceil(spec.time_limit_s)
    if size > spec.nodes:
        policy["schedulingPolicy"] = {"minAvailable": spec.nodes}
    head = _head("kubeflow.org/v1", "PyTorchJob", name, job_id, task, spec, cluster)
    return [head | {"spec": {"runPolicy": policy, "pytorchReplicaSpecs": replicas}}]


def _conditions(done: str, failed: str) -> Callable[[Object], str]:
    def ended(item: Object) -> str:
        met = {c["type"] for c in item.get("status", {}).get("conditions", []) if c.get("status") == "True"}
        return "done" if done in met else "failed" if failed in met else ""

    return ended


def _rayjob(spec: JobSpec, cluster: ClusterConfig, name: str, job_id: str, task: int | None) -> list[Object]:
    head = _head("ray.io/v1", "RayJob", name, job_id, task, spec, cluster)
    return [head | {"spec": kubernetes_ray.spec_of(spec, cluster, job_id, task)}]


def _pod_logs(selector: Callable[[int], str]) -> Callable[[Kubectl, str, int], Iterator[str]]:
    def logs(ask: Kubectl, job: str, node: int) -> Iterator[str]:
        return iter(ask("logs", "-l", f"{job},{selector(node)}", "--tail=-1").splitlines())

    return logs


def _index(node: int) -> str:
    return f"batch.kubernetes.io/job-completion-index={node}"


def _replica(node: int) -> str:
    role = "training.kubeflow.org/replica-type"
    return f"{role}=worker,training.kubeflow.org/replica-index={node - 1}" if node else f"{role}=master"


_indexed = _pod_logs(_index)
KIND: dict[str, Kind] = {
    "job": Kind("jobs.batch", ("services",), True, _job, _conditions("Complete", "Failed"), _indexed),
    "jobset": Kind("jobsets.jobset.x-k8s.io", (), True, _jobset, _conditions("Completed", "Failed"), _indexed),
    "trainjob": Kind(
        "trainjobs.trainer.kubeflow.org",
        ("trainingruntimes.trainer.kubeflow.org",),
        False,
        _trainjob,
        _conditions("Complete", "Failed"),
        _indexed,
    ),
    "pytorchjob": Kind(
        "pytorchjobs.kubeflow.org", (), True, _pytorchjob, _conditions("Succeeded", "Failed"), _pod_logs(_replica)
    ),
    "rayjob": Kind("rayjobs.ray.io", (), True, _rayjob, kubernetes_ray.ended, kubernetes_ray.logs, kubernetes_ray.stop),
}

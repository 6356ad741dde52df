"""A RayJob: KubeRay makes a Ray cluster for the job, with a pod for each node, and gives the driver of Keel's jobs on Ray
(`cluster.launch.ray_driver`) to its head.

Written from the public API types of ray.io/v1 (ray-project/kuberay).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cluster.launch.kubectl import Kubectl
from cluster.launch.kubernetes_pods import Object, identity, node_resources, pod, variables
from cluster.launch.ray import Ray, RayConfig
from cluster.launch.spec import JobSpec

if TYPE_CHECKING:
    from cluster.launch.cluster_config import ClusterConfig

_HEAD, _WORKER = "ray-head", "ray-worker"
# Drivers and the dashboard; it takes no node of the job.
_HEAD_RESOURCES = {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}
_STATES = {"SUCCEEDED": "done", "STOPPED": "cancelled"}


def spec_of(spec: JobSpec, cluster: ClusterConfig, job_id: str, task: int | None) -> Object:
    """The field `spec` of the RayJob."""
    ray = Ray(dataclasses.replace(cluster, backend="ray", options=RayConfig()))
    # A pod is a node: what it has is the node's, so the driver need not ask for memory, nor know of images.
    inner = dataclasses.replace(spec, image="", memory_gib=0.0)
    me = identity(job_id, task)
    (name,) = list(me.values())[:1]
    env = variables(ray.variables(inner, name, task))

    def group(container: str, resources: Object, **start: str) -> Object:
        main = {"name": container, "image": spec.image, "env": env, "resources": resources}
        return {"rayStartParams": start, "template": pod(cluster, job_id, task, main)}

    amounts = {"num-cpus": str(spec.cpus_per_node), "num-gpus": str(spec.accelerators)}
    workers = group(_WORKER, node_resources(spec, cluster.options), **amounts)
    most = max(spec.nodes, spec.max_nodes)
    size = {"groupName": "node", "replicas": spec.nodes, "minReplicas": spec.nodes, "maxReplicas": most}
    rays: Object = {"headGroupSpec": group(_HEAD, _HEAD_RESOURCES, **{"num-cpus": "0", "dashboard-host": "0.0.0.0"})}
    if most > spec.nodes:
        rays["enableInTreeAutoscaling"] = True
    rays["workerGroupSpecs"] = [{**size, **workers}]
    return {
        "entrypoint": ray.entrypoint(inner),
        "jobId": name,
        "submissionMode": "HTTPMode",  # others have a shell read the entrypoint once more
        "backoffLimit": spec.retries if spec.requeue else 0,  # when the head is lost
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.options.keep_s,
        "rayClusterSpec": rays,
    }


def ended(item: Object) -> str:
    """`done`, `cancelled` or `failed`; "" while the job goes on."""
    status = item.get("status", {})
    if status.get("jobDeploymentStatus") not in ("Complete", "Failed", "ValidationFailed"):
        return ""
    return _STATES.get(status.get("jobStatus", ""), "failed")


def stop(ask: Kubectl, selector: str) -> bool:
    """Has the driver told to save and end; False when there is none yet."""
    heads = _heads(ask, selector)
    for head in heads:
        _ray(ask, head, "stop --no-wait")
    return bool(heads)


def logs(ask: Kubectl, selector: str, node: int) -> Iterator[str]:
    """What the node printed, as the driver passed it on."""
    mark = f"[node {node}] "
    for head in _heads(ask, selector):
        lines = _ray(ask, head, "logs").splitlines()
        yield from (line.removeprefix(mark) for line in lines if line.startswith(mark))


def _heads(ask: Kubectl, selector: str) -> list[str]:
    pods = ask.items("pods", f"{selector},ray.io/node-type=head")
    return [pod["metadata"]["name"] for pod in pods if pod.get("status", {}).get("phase") == "Running"]


def _ray(ask: Kubectl, head: str, verb: str) -> str:
    line = f'ray job {verb} --address http://127.0.0.1:8265 "$KEEL_JOB"'
    return ask("exec", head, "-c", _HEAD, "--", "sh", "-c", line)

"""The pods of a job on Kubernetes, the same for every kind of job but for how a pod learns which node it is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cluster.launch.entry import ARRAY_INDEX, JOB_ID, NODE, RENDEZVOUS, node_command, node_environment
from cluster.launch.spec import JobSpec

if TYPE_CHECKING:
    from cluster.launch.cluster_config import ClusterConfig
    from cluster.launch.kubernetes_config import KubernetesConfig

Object = dict[str, Any]

PORT = 29500  # each pod has an address of its own, so that no two jobs meet at a port
INSTANCE, TASK, RUN = "app.kubernetes.io/instance", "keel/task", "keel/run"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"

# Workers have `grace_s` to save; then the node tells the store how it ended.
_LAST_WORDS_S = 15


def labels(options: KubernetesConfig, job_id: str, task: int | None) -> dict[str, str]:
    """Of a job and of its pods."""
    mine = {"app.kubernetes.io/name": "keel", INSTANCE: job_id}
    return {**options.labels, **mine, **({} if task is None else {TASK: str(task)})}


def variables(found: Mapping[str, str]) -> list[Object]:
    """Entries of a container's environment."""
    return [{"name": name, "value": escaped(value)} for name, value in found.items()]


def identity(job_id: str, task: int | None) -> dict[str, str]:
    """The variables that say which job this is."""
    name = {JOB_ID: job_id if task is None else f"{job_id}_{task}"}
    return name if task is None else {**name, ARRAY_INDEX: str(task)}


def node_pod(
    spec: JobSpec,
    cluster: ClusterConfig,
    job_id: str,
    task: int | None,
    *,
    container: str = "node",
    host: str = "",
    node: Object | None = None,
    shell: str = 'exec "$@"',
) -> Object:
    """The template of pods that run the node entry.

    Args:
        container: its name.
        host: name of node 0's pod, as the others find it.
        node: source of the node's number (`valueFrom`); None when `shell` sets it.
        shell: how bash starts the command, after the cluster's `setup`.
    """
    env = variables(node_environment(spec) | identity(job_id, task))
    if node is not None:
        env.append({"name": NODE, "valueFrom": node})
    if host:
        env += variables({RENDEZVOUS: f"{host}:{cluster.rendezvous.port or PORT}"})
    words = node_command(spec, cluster)
    lines = [*cluster.setup, shell]
    if lines != ['exec "$@"']:
        words = ["/bin/bash", "-c", "\n".join(lines), "node", *words]
    main = {"name": container, "image": spec.image, "command": [escaped(word) for word in words], "env": env}
    return pod(cluster, job_id, task, {**main, "resources": node_resources(spec, cluster.options)})


def pod(cluster: ClusterConfig, job_id: str, task: int | None, main: Object) -> Object:
    """The template of pods whose only container is `main`, with what the cluster's config adds to every pod."""
    options: KubernetesConfig = cluster.options
    main = dict(main)
    if options.pull:
        main["imagePullPolicy"] = options.pull
    sources: list[Object] = [{"secretRef": {"name": name}} for name in options.secrets]
    sources += [{"configMapRef": {"name": name}} for name in options.config_maps]
    if sources:
        main["envFrom"] = sources
    volumes, mounts = _volumes(options)
    if mounts:
        main["volumeMounts"] = mounts
    if options.capabilities:
        main["securityContext"] = {"capabilities": {"add": list(options.capabilities)}}
    body: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(cluster.grace_s) + _LAST_WORDS_S,
        "containers": [main],
    }
    if volumes:
        body["volumes"] = volumes
    named: dict[str, Any] = {
        "serviceAccountName": options.service_account,
        "priorityClassName": options.priority_class,
        "nodeSelector": dict(options.node_selector),
        "tolerations": [_toleration(t.key, t.value, t.effect) for t in options.tolerations],
        "imagePullSecrets": [{"name": name} for name in options.pull_secrets],
    }
    body |= {key: value for key, value in named.items() if value}
    for key in options.pod:
        if key in body:
            raise ValueError(f"kubernetes.pod.{key} is set by Keel; see the other keys of the section kubernetes")
    metadata: Object = {"labels": labels(options, job_id, task)}
    if options.annotations:
        metadata["annotations"] = dict(options.annotations)
    return {"metadata": metadata, "spec": body | options.pod}


def escaped(text: str) -> str:
    """`text` so that Kubernetes, which replaces $(NAME) and makes one dollar of two, leaves it as it is."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _toleration(key: str, value: str, effect: str) -> Object:
    found = {"key": key, "operator": "Equal" if value else "Exists", "value": value, "effect": effect}
    return {name: text for name, text in found.items() if text}


def node_resources(spec: JobSpec, options: KubernetesConfig) -> Object:
    """What each node of the job gets."""
    # A limit of CPUs would slow a node down that has some to spare.
    limits: Mapping[str, str] = dict(options.resources)
    if spec.memory_gib:
        limits = {"memory": f"{math.ceil(spec.memory_gib * 1024)}Mi", **limits}
    if spec.accelerators:
        limits = {**limits, options.accelerator: str(spec.accelerators)}
    requests = {"cpu": str(spec.cpus_per_node), **limits}
    return {"requests": requests, "limits": dict(limits)} if limits else {"requests": requests}


def _volumes(options: KubernetesConfig) -> tuple[list[Object], list[Object]]:
    volumes: list[Object] = []
    mounts: list[Object] = []
    if options.shm:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shm}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    for number, volume in enumerate(options.volumes):
        name = f"volume-{number}"
        if volume.claim:
            source: Object = {"persistentVolumeClaim": {"claimName": volume.claim}}
        elif volume.host:
            source = {"hostPath": {"path": volume.host}}
        else:
            source = {"emptyDir": {"sizeLimit": volume.size}}
        volumes.append({"name": name, **source})
        mounts.append({"name": name, "mountPath": volume.path} | ({"readOnly": True} if volume.read_only else {}))
    return volumes, mounts

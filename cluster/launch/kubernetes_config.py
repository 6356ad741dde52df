"""The section `kubernetes` of a cluster's config."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

KINDS = ("jobset", "pytorchjob", "trainjob", "rayjob", "job")
PULL = ("", "Always", "IfNotPresent", "Never")

_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(m|k|Ki|[MGTPE]i?)?")


@dataclass
class Volume:
    """A folder of each pod: `path` is a persistent volume claim (`claim`), a folder of the machine (`host`), or an empty
    one of at most `size`."""

    path: str = ""
    claim: str = ""
    host: str = ""
    size: str = ""
    read_only: bool = False

    def __post_init__(self) -> None:
        if not self.path.startswith("/"):
            raise ValueError(f"volumes: path={self.path!r} must be an absolute path")
        if sum(map(bool, (self.claim, self.host, self.size))) != 1:
            raise ValueError(f"volumes: {self.path} needs one of claim=, host= and size=")
        if self.size:
            quantity(self.size)
            if self.read_only:
                raise ValueError(f"volumes: {self.path} would stay empty with read_only; drop it")


@dataclass
class Toleration:
    """Of a node's taint: any value of `key` when `value` is empty, any effect when `effect` is."""

    key: str = ""
    value: str = ""
    effect: str = ""

    def __post_init__(self) -> None:
        effects = ("", "NoSchedule", "PreferNoSchedule", "NoExecute")
        if self.effect not in effects:
            raise ValueError(f"tolerations: effect={self.effect}: must be one of {', '.join(effects[1:])}")
        if self.value and not self.key:
            raise ValueError(f"tolerations: value={self.value} needs key=")


@dataclass
class KubernetesConfig:
    """Empty fields leave the choice to the cluster.

    Attributes:
        kind: `jobset` (JobSet), `pytorchjob` (Kubeflow's training operator, v1), `trainjob` (Kubeflow Trainer, v2),
            `rayjob` (KubeRay), or `job` (a plain indexed Job, which needs nothing installed).
        apply: whether `keel submit` gives the manifest to kubectl itself; otherwise it prints it.
        context, namespace: as in kubectl.
        queue: Kueue's LocalQueue.
        priority_class, service_account, node_selector, tolerations: of the pods.
        accelerator: the resource under which accelerators are asked for.
        resources: what else each pod gets, such as `vpc.amazonaws.com/efa: "4"` or `rdma/hca: "1"`.
        shm: size of /dev/shm, which counts as memory of the pod; "" leaves it at 64 MiB.
        secrets, config_maps: names of those whose keys become variables of the workers.
        volumes: see `Volume`.
        pull, pull_secrets: when the image is pulled, and with which secrets.
        capabilities: that the container adds, such as IPC_LOCK for InfiniBand.
        labels, annotations: of the job and its pods.
        pod: further fields of the pod's spec, such as `hostNetwork: true`.
        keep_s: seconds until an ended job is deleted; 0 keeps it.
    """

    kind: str = "jobset"
    apply: bool = False
    context: str = ""
    namespace: str = ""
    queue: str = ""
    priority_class: str = ""
    service_account: str = ""
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[Toleration] = field(default_factory=list)
    accelerator: str = "nvidia.com/gpu"
    resources: dict[str, str] = field(default_factory=dict)
    shm: str = "8Gi"
    secrets: list[str] = field(default_factory=list)
    config_maps: list[str] = field(default_factory=list)
    volumes: list[Volume] = field(default_factory=list)
    pull: str = ""
    pull_secrets: list[str] = field(default_factory=list)
    capabilities: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    pod: dict[str, Any] = field(default_factory=dict)
    keep_s: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind}: must be one of {', '.join(KINDS)}")
        if self.pull not in PULL:
            raise ValueError(f"pull={self.pull}: must be one of {', '.join(PULL[1:])}")
        if self.keep_s < 0:
            raise ValueError(f"keep_s={self.keep_s}: must be at least 0")
        for text in filter(None, (self.shm, *self.resources.values())):
            quantity(text)


def quantity(text: str) -> float:
    """A quantity as Kubernetes writes it: `4`, `500m`, `16Gi`, `2G`.

    Raises:
        ValueError: anything else.
    """
    found = _QUANTITY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no quantity, such as 4, 500m or 16Gi")
    number, unit = float(found[1]), found[2]
    if unit is None or unit == "m":
        return number if unit is None else number / 1000
    return number * float((1024 if unit.endswith("i") else 1000) ** (1 + "KMGTPE".index(unit[0].upper())))

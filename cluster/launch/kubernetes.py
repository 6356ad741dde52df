"""Jobs on a Kubernetes cluster: manifests of our own, given to kubectl or printed for it.

Nothing of a secret passes through here: pods read theirs from the cluster (`kubernetes.secrets`). A job is named after
its run, so that a run has at most one; an earlier one that has ended makes room.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import yaml

from cluster.launch.kubectl import Kubectl, KubectlError, Missing
from cluster.launch.kubernetes_config import KubernetesConfig, quantity
from cluster.launch.kubernetes_kinds import KIND, Kind
from cluster.launch.kubernetes_pods import INSTANCE, TASK
from cluster.launch.spec import JobSpec, local_path

if TYPE_CHECKING:
    from cluster.launch.cluster_config import ClusterConfig

# Of the states of an array's tasks the first in this order is that of the array.
_ORDER = ("running", "queued", "failed", "cancelled", "done")
# A pod's name, in which a job's is followed by those of its parts and by numbers, has 63 characters.
_LONGEST = 35


class Kubernetes:
    """See `cluster.launch.base.Backend`."""

    Config: ClassVar[type] = KubernetesConfig

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.options: KubernetesConfig = cluster.options
        self.kind: Kind = KIND[self.options.kind]
        self._kubectl = Kubectl(self.options.context, self.options.namespace)

    def render(self, spec: JobSpec) -> str:
        """The manifest of `spec`: one or more YAML documents. Pure.

        Raises:
            ValueError: a job that Kubernetes, or this kind, does not have.
        """
        self._refuse(spec)
        job_id, documents = name_of(spec), []
        for task in range(spec.array) if spec.array else [None]:
            name = job_id if task is None else f"{job_id}-{task}"
            documents += self.kind.objects(spec, self.cluster, name, job_id, task)
        return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)

    def check(self, spec: JobSpec) -> None:
        """Raises ValueError or OSError where the cluster would refuse the job, or its pods could never start."""
        self._refuse(spec)
        if not self.options.apply:
            raise ValueError(
                "kubernetes.apply=false: nothing would be queued; set kubernetes.apply=true, or apply what --dry-run prints"
            )
        state = self.state(name_of(spec))
        if state in ("queued", "running"):
            raise ValueError(f"job {name_of(spec)} of this run is {state}; `keel cancel {spec.run_urls[0]}` ends it")
        if state == "unknown":  # else there is one that makes room, and the cluster has taken such a job before
            self._kubectl("apply", "--dry-run=server", "-f", "-", stdin=self.render(spec))
        self._check_names()
        self._check_quota(spec)

    def submit(self, spec: JobSpec) -> str:
        """Gives the manifest of a job that was checked to kubectl, and returns the job's name."""
        name = name_of(spec)
        self._delete(name, wait=True)
        self._kubectl("apply", "-f", "-", stdin=self.render(spec))
        return name

    def state(self, job_id: str) -> str:
        """See `Backend.state`. NAME_3 is task 3 of an array. A job that was cancelled is unknown once its pods have ended,
        and so is one that was applied by hand elsewhere, where there is no kubectl."""
        if not self.options.apply and shutil.which("kubectl") is None:
            return "unknown"
        items = self._kubectl.items(f"{self.kind.resource},pods", _selector(job_id))
        jobs = [item for item in items if item["kind"] != "Pod"]
        running = {
            item["metadata"]["labels"].get(TASK)
            for item in items
            if item["kind"] == "Pod" and item.get("status", {}).get("phase") == "Running"
        }
        states = set()
        for job in jobs:
            going = "running" if job["metadata"]["labels"].get(TASK) in running else "queued"
            states.add(self.kind.ended(job) or going)
        return next((state for state in _ORDER if state in states), "unknown")

    def owns(self, job_id: str, run_url: str) -> bool:
        return True  # an id is used once

    def cancel(self, job_id: str) -> None:
        """Deletes the job: its pods are told to save and end. One that has ended is left alone."""
        if self.state(job_id) in ("queued", "running"):
            told = self.kind.stop is not None and self.kind.stop(self._kubectl, _selector(job_id))
            if not told:
                self._delete(job_id, wait=False)

    def logs(self, job_id: str, node: int) -> Iterator[str]:
        """What the node has printed, in its pod as it is now."""
        try:
            yield from self.kind.logs(self._kubectl, _selector(job_id), node)
        except KubectlError as error:
            if "waiting to start" not in str(error) and not isinstance(error, Missing):
                raise

    # --------------------------------------------------------------------------------------------------------- details
    def _refuse(self, spec: JobSpec) -> None:
        kind = self.options.kind
        if not spec.image:
            raise ValueError("image is required: a pod runs one, such as image=ghcr.io/you/keel:1")
        if spec.pass_env:
            raise ValueError(
                f"pass_env={','.join(spec.pass_env)}: values of your environment would stand in the manifest; put them in "
                "a Secret, and name it in kubernetes.secrets"
            )
        if spec.after:
            raise ValueError(
                f"after={','.join(spec.after)}: Kubernetes has no order of jobs; submit this one when they have ended"
            )
        if spec.max_nodes > spec.nodes:
            if not self.kind.elastic:
                raise ValueError(f"max_nodes={spec.max_nodes}: a {kind} keeps its number of nodes; use kind=job")
            if self.options.queue and kind != "job":
                raise ValueError(f"max_nodes={spec.max_nodes}: Kueue admits all of a {kind} or nothing; use kind=job")
        self.refuse_unseen({"url": spec.run_url, "code.where": spec.code.where})

    def refuse_unseen(self, places: Mapping[str, str]) -> None:
        """Raises ValueError when one of `places` (setting -> URL, or "") is a folder that no pod has."""
        for key, url in places.items():
            path = local_path(url)
            if path and not any(f"{path}/".startswith(f"{v.path.rstrip('/')}/") for v in self.options.volumes):
                raise ValueError(f"{key}={path} lies in none of kubernetes.volumes, so no pod sees it")

    def _check_names(self) -> None:
        options = self.options
        claims = [volume.claim for volume in options.volumes if volume.claim]
        for key, resource, names in (
            ("queue", "localqueues.kueue.x-k8s.io", [options.queue]),
            ("service_account", "serviceaccounts", [options.service_account]),
            ("priority_class", "priorityclasses", [options.priority_class]),
            ("secrets", "secrets", options.secrets),
            ("pull_secrets", "secrets", options.pull_secrets),
            ("config_maps", "configmaps", options.config_maps),
            ("volumes", "persistentvolumeclaims", claims),
        ):
            for name in filter(None, names):
                try:
                    self._kubectl("get", resource, name, "-o", "name")
                except Missing as error:
                    raise ValueError(f"kubernetes.{key}: the cluster has no {name} ({resource})") from error
                except KubectlError as error:
                    if "cannot get resource" not in str(error):  # not everybody may look at all of these
                        raise

    def _check_quota(self, spec: JobSpec) -> None:
        options, nodes = self.options, spec.nodes * max(1, spec.array)
        needs = {"pods": float(nodes), "cpu": float(nodes * spec.cpus_per_node)}
        needs["memory"] = nodes * spec.memory_gib * 2**30
        needs[options.accelerator] = float(nodes * spec.accelerators)
        try:
            quotas = json.loads(self._kubectl("get", "resourcequotas", "-o", "json"))["items"]
        except KubectlError as error:
            if "cannot list resource" not in str(error):
                raise
            return
        for quota in quotas:
            for name, most in quota.get("spec", {}).get("hard", {}).items():
                need = needs.get(name.removeprefix("requests."))
                if need is not None and need > quantity(most):
                    raise ValueError(
                        f"quota: {quota['metadata']['name']} allows {name}={most} in this namespace, and the job needs "
                        f"{_amount(name, need)}"
                    )

    def _delete(self, job_id: str, *, wait: bool) -> None:
        resources = ",".join([self.kind.resource, *self.kind.others])
        options = ("--ignore-not-found", "--cascade=foreground", f"--wait={str(wait).lower()}")
        self._kubectl("delete", resources, "-l", _selector(job_id), *options)


def name_of(spec: JobSpec) -> str:
    """The name of a run's job: a DNS label that begins with a letter."""
    name = spec.name if spec.name[0].isalpha() else f"run-{spec.name}"
    return f"{name[:_LONGEST].rstrip('-')}-{hashlib.sha256(spec.run_url.encode()).hexdigest()[:6]}"


def _selector(job_id: str) -> str:
    name, _, task = job_id.partition("_")
    return f"{INSTANCE}={name}" + (f",{TASK}={task}" if task else "")


def _amount(name: str, need: float) -> str:
    return f"{need / 2**30:g}Gi" if name.endswith("memory") else f"{need:g}"


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)

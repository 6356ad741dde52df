"""Jobs on a Ray cluster: submitted through Ray Jobs, so that whoever submits may leave.

On the head a driver of our own (`cluster.launch.ray_driver`) asks for a placement group with a bundle for each node, and
starts the node entry on each by an actor. It outlives the submitter, replaces nodes that are lost, lets more join where
the job is elastic, and passes a cancellation on to the nodes, which save and end. A shared file system is not needed.
"""

from __future__ import annotations

import math
import os
import shlex
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

from cluster.launch.entry import ARRAY_INDEX, JOB_ID, module_command, node_command, node_environment
from cluster.launch.ray_client import Head
from cluster.launch.ray_plan import Plan
from cluster.launch.spec import JobSpec, passed

if TYPE_CHECKING:
    from cluster.launch.cluster_config import ClusterConfig

STRATEGIES = ("STRICT_SPREAD", "PACK")
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray kills a driver so long after it was told to stop
_THREADS = "OMP_NUM_THREADS"
_JOB, _TASK = "$JOB", "$TASK"  # in what is rendered: known when it is submitted


@dataclass
class RayConfig:
    """The section `ray` of a cluster's config.

    Attributes:
        address: URL of the head's dashboard, such as http://head:8265; "" is $RAY_API_SERVER_ADDRESS.
        namespace: Ray's namespace of the jobs' actors.
        strategy: `STRICT_SPREAD`: each node of a job on a Ray node of its own; `PACK`: on as few as possible.
        resources: custom resources of each node, besides CPUs, GPUs and memory.
        labels: label selectors of the Ray nodes, such as {ray.io/accelerator-type: H100} or {zone: "in(a,b)"}.
        autoscaling: the cluster grows on demand, so what it lacks now is waited for.
    """

    address: str = ""
    namespace: str = "keel"
    strategy: str = "STRICT_SPREAD"
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    autoscaling: bool = False

    def __post_init__(self) -> None:
        if self.address and not self.address.startswith(("http://", "https://")):
            raise ValueError(
                f"address={self.address}: must be the URL of the head's dashboard, such as http://head:8265"
            )
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy={self.strategy}: must be one of {', '.join(STRATEGIES)}")
        for name, amount in self.resources.items():
            if name in ("CPU", "GPU", "memory"):
                raise ValueError(f"resources.{name}: set cpus, accelerators or memory_gib of the job instead")
            if amount <= 0:
                raise ValueError(f"resources.{name}={amount:g}: must be positive")


class Ray:
    """See `cluster.launch.base.Backend`."""

    Config = RayConfig

    def __init__(self, cluster: ClusterConfig) -> None:
        self.cluster = cluster
        self.options: RayConfig = cluster.options
        self._head = Head(self.options.address)

    def render(self, spec: JobSpec) -> str:
        """What is sent to Ray Jobs, and what the driver then asks Ray for. Pure. $JOB and $TASK are known when it is sent;
        the values of `pass_env` join the variables then.

        Raises:
            ValueError: a job that Ray does not have.
        """
        self._refuse(spec)
        plan = self.plan(spec)
        shown: dict[str, Any] = {
            "submission_id": f"{_JOB}_{_TASK}" if spec.array else _JOB,
            "entrypoint": self.entrypoint(spec),
            "runtime_env": {"env_vars": self.variables(spec, _JOB, _TASK if spec.array else None)},
            "metadata": self._metadata(spec),
        }
        if spec.array:
            shown = {"tasks": f"{_TASK}=0 to {spec.array - 1}, each a job of its own", **shown}
        if spec.pass_env:
            shown["pass_env"] = list(spec.pass_env)
        group = {
            "name": shown["submission_id"],
            "strategy": plan.strategy,
            "bundles": [dict(plan.bundle) for _ in range(plan.nodes)],
        }
        if plan.labels:
            group["bundle_label_selector"] = [dict(plan.labels) for _ in range(plan.nodes)]
        asked: dict[str, Any] = {"placement_group": group}
        if plan.max_nodes > plan.nodes:
            asked["later"] = f"up to {plan.max_nodes - plan.nodes} such bundles more, one at a time"
        node = {"setup": plan.setup, "environment": dict(plan.environment), "command": plan.command}
        asked["node"] = {name: value for name, value in node.items() if value}
        documents = [{"job": shown}, {"driver": asked}]
        return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)

    def check(self, spec: JobSpec) -> None:
        """Raises ValueError or OSError where the cluster cannot be asked, or could never hold the job."""
        self._refuse(spec)
        for name, value in passed(spec, os.environ).items():
            if "$" in value:
                raise ValueError(f"pass_env: the value of {name} holds a $, which Ray would expand; leave {name} out")
        self._head.check_version()
        if not self.options.autoscaling:
            check_room(self._head.nodes(), self.plan(spec))
        for job in spec.after:
            if self.state(job) == "unknown":
                raise ValueError(f"after={job}: there is no such job on {self._head.address}")

    def submit(self, spec: JobSpec) -> str:
        """Queues a job that was checked, and returns its id; that of an array's task is ID_TASK."""
        job_id = f"keel-{spec.name}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        secret = passed(spec, os.environ)
        for task in range(spec.array) if spec.array else [None]:
            name = job_id if task is None else f"{job_id}_{task}"
            variables = self.variables(spec, name, task) | secret
            self._head.submit(name, self.entrypoint(spec), variables, self._metadata(spec))
        return job_id

    def state(self, job_id: str) -> str:
        return self._head.state(job_id)

    def owns(self, job_id: str, run_url: str) -> bool:
        return True  # an id is used once

    def cancel(self, job_id: str) -> None:
        """SIGTERM to the driver: its nodes save and end, and nothing is started again."""
        self._head.stop(job_id)

    def logs(self, job_id: str, node: int) -> Iterator[str]:
        """What the node printed, as the driver passed it on; Ray keeps that on the head."""
        mark = f"[node {node}] "
        for line in self._head.logs(job_id):
            if line.startswith(mark):
                yield line.removeprefix(mark)

    def plan(self, spec: JobSpec) -> Plan:
        """What the job's driver is told."""
        bundle: dict[str, float] = {"CPU": spec.cpus_per_node}
        if spec.accelerators:
            bundle["GPU"] = spec.accelerators
        if spec.memory_gib:
            bundle["memory"] = math.ceil(spec.memory_gib * 2**30)
        own = node_environment(spec)
        if not _given(_THREADS, spec):  # else Ray gives all of the node's CPUs to each process
            own[_THREADS] = str(max(1, spec.cpus_per_node // spec.processes))
        return Plan(
            run_url=spec.run_url,
            nodes=spec.nodes,
            max_nodes=max(spec.nodes, spec.max_nodes),
            bundle=bundle | self.options.resources,
            labels=self.options.labels,
            strategy=self.options.strategy,
            command=node_command(spec, self.cluster, time_limit_s=spec.time_limit_s),
            environment=own,
            setup=self.cluster.setup,
            port=self.cluster.rendezvous.port,
            namespace=self.options.namespace,
            retries=spec.retries,
            requeue=spec.requeue,
            after=list(spec.after),
            grace_s=self.cluster.grace_s,
            lost_s=self.cluster.rendezvous.lost_s,
        )

    # --------------------------------------------------------------------------------------------------------- details
    def _refuse(self, spec: JobSpec) -> None:
        if spec.image:
            raise ValueError(
                f"image={spec.image} has no effect with backend=ray: jobs run in the image of the Ray nodes; drop it"
            )

    def entrypoint(self, spec: JobSpec) -> str:
        """The shell line of the driver."""
        python = self.cluster.python or "python"
        words = module_command(spec, python, "cluster.launch.ray_driver", [self.plan(spec).to_json()])
        if code := _code(spec):
            words = ["env", *(f"{name}={value}" for name, value in code.items()), *words]
        if self.cluster.setup:
            words = ["bash", "-c", "\n".join([*self.cluster.setup, 'exec "$0" "$@"']), *words]
        return f"exec {shlex.join(words)}"

    def variables(self, spec: JobSpec, job_id: str, task: int | str | None) -> dict[str, str]:
        """What the driver and the nodes find in their environment; no secrets. Ray expands a $ in it, so that nodes are told
        the values of `spec.env` once more."""
        own = {JOB_ID: job_id, _STOP_WAIT: str(math.ceil(self.cluster.grace_s) + 60)}
        return {**spec.env, **own} | ({} if task is None else {ARRAY_INDEX: str(task)})

    def _metadata(self, spec: JobSpec) -> dict[str, str]:
        return {"name": spec.name, "run": spec.run_url}


def _code(spec: JobSpec) -> dict[str, str]:
    """The variables that say where the code is. Ray's own workers must not have them."""
    return {name: value for name, value in node_environment(spec).items() if name not in spec.env}


def _given(name: str, spec: JobSpec) -> bool:
    patterns = (*spec.env, *spec.pass_env)
    return any(name.startswith(p[:-1]) if p.endswith("*") else name == p for p in patterns)


def check_room(nodes: list[tuple[dict[str, float], dict[str, str]]], plan: Plan) -> None:
    """Raises ValueError when `nodes`, as (resources, labels), could never hold the first `plan.nodes` bundles."""
    left, kind = nodes, ""
    for name, amount in plan.bundle.items():
        kind += f" with {_amount(name, amount)}" if not kind else f" and {_amount(name, amount)}"
        left = [node for node in left if node[0].get(name, 0) >= amount]
        _enough(left, plan, kind)
    for name, wanted in plan.labels.items():
        left = [node for node in left if _matches(node[1].get(name), wanted)]
        kind += f" and {name}={wanted}"
        _enough(left, plan, kind)


def _enough(left: list[tuple[dict[str, float], dict[str, str]]], plan: Plan, kind: str) -> None:
    have = len(left)
    if plan.strategy == "PACK":
        have = sum(min(int(total.get(name, 0) // need) for name, need in plan.bundle.items()) for total, _ in left)
    if have < plan.nodes:
        room = "room for " if plan.strategy == "PACK" else ""
        raise ValueError(f"nodes={plan.nodes}: needs {plan.nodes} nodes{kind}, the cluster has {room}{have}")


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / 2**30:g} GiB of memory"
    if name in ("CPU", "GPU"):
        return f"{amount:g} {name}{'' if amount == 1 else 's'}"
    return f"{amount:g} of {name}"


def _matches(value: str | None, wanted: str) -> bool:
    """Whether a node's label satisfies Ray's selector: `a`, `!a`, `in(a,b)` or `!in(a,b)`."""
    positive = wanted.removeprefix("!")
    listed = positive[3:-1].split(",") if positive.startswith("in(") and positive.endswith(")") else [positive]
    return (value in [item.strip() for item in listed]) != wanted.startswith("!")


class _Dumper(yaml.SafeDumper):
    """Scripts as blocks, for reading."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)

"""The driver of a job on a Ray cluster: Ray Jobs runs it on the head, where it outlives whoever submitted the job.

    python -m cluster.launch.ray_driver PLAN      # a `cluster.launch.ray_plan.Plan` as JSON

It holds a placement group with a bundle for each node and starts the node entry on each (`cluster.launch.ray_node`). A node
that is lost is waited for, on whatever Ray node its bundle moves to; the others stay, and all start again from the last
commit. When it is node 0, which listens, the group is formed anew. What nodes print goes to this job's log, line by line
behind `[node N] `. Exit codes are those of the node entry (`cluster.launch.node`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from cluster.launch import EXIT_LOST, EXIT_OK, EXIT_REQUEUE, EXIT_UNAVAILABLE, EXIT_USER_ERROR
from cluster.launch.budget import Budget, newest_commit
from cluster.launch.entry import ARRAY_INDEX, JOB_ID, NODE, RENDEZVOUS
from cluster.launch.ray_plan import Plan
from cluster.launch.spec import INDEX

_POLL_S = 0.25
_AFTER_S = 2.0
_OTHERS_S = 30.0  # how long the other nodes may take to end by themselves when one has ended
_QUIET_S = 10.0  # a job that waits longer for its nodes says so
_STOP_S = 10.0  # ... and when they are stopped to form the group anew
_NODE_ID = "ray.io/node-id"

# What a node is doing: its actor starts, it has a place in the cluster, its entry runs, it is being stopped, it has ended.
ARRIVING, READY, RUNNING, STOPPING, ENDED = "arriving", "ready", "running", "stopping", "ended"


class Lost(Exception):
    """The actor of a node is gone."""


class Refused(Exception):
    """The node entry cannot be started there."""


class Node:
    """One node of the job: a bundle, and the actor on it. `own`: the bundle is a placement group of its own."""

    def __init__(self, plan: Plan, group: Any, bundle: int, own: bool) -> None:
        self.plan, self.group, self.bundle, self.own = plan, group, bundle, own
        self.number: int | None = None
        self.host, self.port, self.ray_node = "", 0, ""
        self.code: int | None = None
        self.silent_since: float | None = None
        self.hire()

    def hire(self) -> None:
        """Has a new actor made; it waits for the bundle to be there."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from cluster.launch import ray_node

        ray.cloudpickle.register_pickle_by_value(ray_node)
        amounts = dict(self.plan.bundle)
        options = {
            "num_cpus": amounts.pop("CPU"),
            "num_gpus": amounts.pop("GPU", 0),
            "memory": amounts.pop("memory", None),
            "resources": amounts,
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, self.bundle),
        }
        self.actor: Any = ray.remote(ray_node.NodeHost).options(**options).remote()
        self.ask_where()

    def ask_where(self) -> None:
        self.phase, self.number, self.code = ARRIVING, None, None
        self._ref = self.actor.where.remote(self.plan.port)

    def start(self, number: int, endpoint: str) -> None:
        self.phase, self.number = RUNNING, number
        variables = {**self.plan.environment, NODE: str(number), RENDEZVOUS: endpoint}
        self._ref = self.actor.start.remote(self.plan.command, self.plan.setup, variables)

    def stop(self, seconds: float) -> None:
        self.phase = STOPPING
        self._ref = self.actor.stop.remote(seconds)

    def signal(self, signum: int) -> None:
        self.actor.signal.remote(signum)

    def look(self) -> None:
        """Takes the actor's answer, if there is one.

        Raises:
            Lost: there will be none.
            Refused: the node entry did not start.
        """
        import ray
        from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

        if self.phase in (READY, ENDED) or not ray.wait([self._ref], timeout=0)[0]:
            return
        try:
            told = ray.get(self._ref)
        except ActorUnavailableError as error:
            self.silent_since = self.silent_since or time.monotonic()
            if time.monotonic() - self.silent_since < self.plan.lost_s and self.phase == RUNNING:
                time.sleep(_POLL_S)
                self._ref = self.actor.poll.remote()
                return
            raise Lost("it does not answer") from error
        except RayTaskError as error:
            raise Refused(_line(error.cause)) from error
        except RayError as error:
            raise Lost(f"it is gone ({_line(error)})") from error
        self.silent_since = None
        if self.phase == ARRIVING:
            self.host, self.port, self.ray_node = told
            self.phase = READY
            return
        code, lines = told
        for line in lines:
            print(f"[node {self.number}] {line}", flush=True)
        if self.phase == STOPPING:
            self.ask_where()
        elif code is None:
            self._ref = self.actor.poll.remote()
        else:
            self.phase, self.code = ENDED, code

    def release(self) -> None:
        """Gives the actor up."""
        import ray

        ray.kill(self.actor)


class Group:
    """The nodes of one job, from the request for room to their end."""

    def __init__(self, plan: Plan, job_id: str, told: list[int]) -> None:
        self.plan, self.job_id, self._told, self._heard = plan, job_id, told, 0
        self._endpoint = ""
        self._losses = 0
        index = os.environ.get(ARRAY_INDEX, "")
        self._budget = Budget(plan.retries, lambda: newest_commit(plan.run_url.replace(INDEX, index)))
        self._first: int | None = None  # exit code of the node that ended first, otherwise than well
        self._since = 0.0
        self._extra = 0
        group = self._room(plan.nodes, plan.labels, job_id)
        self._groups = [group]
        self.nodes = [Node(plan, group, bundle, own=False) for bundle in range(plan.nodes)]

    def run(self) -> int:
        """Returns the exit code of the group."""
        quiet = time.monotonic() + _QUIET_S
        while True:
            self._signal()
            for node in list(self.nodes):
                self._look(node)
            code = self._outcome()
            if code is not None:
                return code
            if not self._told and self._first is None and not self._done():
                self._form() if not self._endpoint else self._join()
            if not self._endpoint and time.monotonic() > quiet:
                quiet = float("inf")
                if not self._placed():
                    _say(f"waiting for room: {self.plan.nodes} x {json.dumps(dict(self.plan.bundle))}")
            time.sleep(_POLL_S)

    def release(self) -> None:
        """Gives all room back."""
        from ray.util import remove_placement_group

        for node in self.nodes:
            node.release()
        for group in self._groups:
            remove_placement_group(group)

    # ----------------------------------------------------------------------------------------------------- what happens
    def _signal(self) -> None:
        if len(self._told) > self._heard:
            self._heard = len(self._told)
            for node in self.nodes:
                if node.phase == RUNNING:
                    node.signal(signal.SIGTERM)

    def _look(self, node: Node) -> None:
        try:
            node.look()
        except Refused as error:
            _say(f"the node entry cannot start on {node.host}: {error}", "error")
            node.phase, node.code = ENDED, EXIT_USER_ERROR
        except Lost as error:
            node.release()
            self._lost(node, str(error), alive=False)
            return
        if node.phase != ENDED or not node.code or self._first is not None:
            return
        gone = node.code in (EXIT_LOST, EXIT_UNAVAILABLE)
        if gone and self._done():
            return
        if self._told or not (gone or node.code < 0):
            self._first, self._since = node.code, time.monotonic()
        elif gone and node.number:  # node 0 has the last word on why
            node.ask_where()
        else:
            self._lost(node, f"its node entry ended with {node.code}", alive=True)

    def _lost(self, node: Node, why: str, alive: bool) -> None:
        number = node.number
        if self._told or self._first is not None or self._done():
            node.phase, node.code = ENDED, node.code or EXIT_LOST
            return
        left = self.plan.retries - self._budget.used(self._losses)
        self._losses += 1
        name = f"node {'?' if number is None else number}" + (f" on {node.host}" if node.host else "")
        if left <= 0:
            _say(f"{name} was lost: {why}; no retries are left", "error")
            node.phase, node.code = ENDED, EXIT_LOST
            self._first, self._since = EXIT_LOST, time.monotonic() - _OTHERS_S  # without it the others can do nothing
            return
        _say(f"{name} was lost: {why}; waiting for another, {left - 1} retries are left")
        if alive:
            node.ask_where()
        elif node.own:
            self.nodes.remove(node)
            self._drop(node.group)
        else:
            node.hire()
        if number == 0:
            self._endpoint = ""
            for other in self.nodes:
                if other.phase == RUNNING:
                    other.stop(_STOP_S)
                elif other.phase == ENDED:
                    other.ask_where()

    def _done(self) -> bool:
        return any(node.number == 0 and node.code == EXIT_OK for node in self.nodes)

    def _outcome(self) -> int | None:
        """The group's exit code, once there is one."""
        if self._done() and not self._since:
            self._since = time.monotonic()
        left = [node for node in self.nodes if node.phase in (RUNNING, STOPPING)]
        if left:
            waited = time.monotonic() - self._since if self._since else 0.0
            if waited > _OTHERS_S:
                for node in left:
                    if node.phase == RUNNING:
                        node.stop(self.plan.grace_s)
                self._since = time.monotonic()
            return None
        if self._first is not None:
            return self._first
        if self._done():
            return EXIT_OK
        return EXIT_REQUEUE if self._told else None

    # ---------------------------------------------------------------------------------------------------- who takes part
    def _form(self) -> None:
        ready = [node for node in self.nodes if node.phase == READY]
        if len(ready) < self.plan.nodes or any(node.phase == STOPPING for node in self.nodes):
            return
        self._endpoint = f"{ready[0].host}:{ready[0].port}"
        for number, node in enumerate(ready):
            node.start(number, self._endpoint)

    def _join(self) -> None:
        """Gives nodes that have come since a number, and asks for more where the job is elastic."""
        for node in self.nodes:
            if node.phase == READY:
                taken = {other.number for other in self.nodes}
                node.start(next(k for k in range(self.plan.max_nodes) if k not in taken), self._endpoint)
        if len(self.nodes) < self.plan.max_nodes and not any(n.phase == ARRIVING and n.own for n in self.nodes):
            labels = dict(self.plan.labels)
            if self.plan.strategy == "STRICT_SPREAD":
                labels[_NODE_ID] = f"!in({','.join(node.ray_node for node in self.nodes if node.ray_node)})"
            self._extra += 1
            group = self._room(1, labels, f"{self.job_id}+{self._extra}")
            self._groups.append(group)
            self.nodes.append(Node(self.plan, group, 0, own=True))

    def _room(self, bundles: int, labels: Any, name: str) -> Any:
        from ray.util import placement_group

        return placement_group(
            [dict(self.plan.bundle) for _ in range(bundles)],
            strategy=self.plan.strategy,
            name=name,
            bundle_label_selector=[dict(labels) for _ in range(bundles)] if labels else None,
        )

    def _placed(self) -> bool:
        from ray.util import placement_group_table

        return bool(placement_group_table(self._groups[0])["state"] == "CREATED")

    def _drop(self, group: Any) -> None:
        from ray.util import remove_placement_group

        self._groups.remove(group)
        remove_placement_group(group)


def drive(plan: Plan, job_id: str) -> int:
    """Runs the job to its end and returns its exit code. Must be called from the main thread: it handles signals."""
    import ray

    told: list[int] = []

    def tell(signum: int, _: FrameType | None) -> None:
        told.append(signum)

    context = ray.init(namespace=plan.namespace, log_to_driver=False, logging_level="warning")
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(signum, tell)
    code = _after(plan, f"http://{context.dashboard_url}", told)
    while code is None:
        group = Group(plan, job_id, told)
        code = group.run()
        if code == EXIT_REQUEUE and plan.requeue and not told:
            _say("the run was preempted after a save; asking for room again")
            group.release()
            code = None
    return 128 - code if code < 0 else code


def _after(plan: Plan, address: str, told: list[int]) -> int | None:
    """Waits for the jobs that must end before; an exit code when this one must not start."""
    from cluster.launch.ray_client import Head

    head = Head(address)
    for job in plan.after:
        while (state := head.state(job)) in ("queued", "running"):
            if told:
                return EXIT_REQUEUE
            time.sleep(_AFTER_S)
        if state != "done":
            _say(f"job {job}, which this one comes after, is {state}", "error")
            return 1
    return None


def _line(error: BaseException) -> str:
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _say(line: str, kind: str = "warning") -> None:
    print(f"keel: {kind}: {line}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1:
        print("keel: error: the driver of a Ray job takes its plan; `keel submit` starts it", file=sys.stderr)
        return 2
    return drive(Plan.from_json(words[0]), os.environ.get(JOB_ID, "keel"))


if __name__ == "__main__":
    sys.exit(main())

"""What a job's driver is told on a Ray cluster: plain values, so that the head needs neither torch nor a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Plan:
    """One job, or one task of an array.

    Attributes:
        run_url: may hold `{index}`.
        nodes, max_nodes: how many the job starts with, and how many may join.
        bundle: resources of one node, as a placement group has them (`memory` in bytes).
        labels: label selectors of the Ray nodes.
        strategy: of the placement group.
        command, environment, setup: how a node starts: words, variables, shell lines before.
        port: where node 0 listens; 0 picks a free one.
        namespace: Ray's, for the job's actors.
        retries: losses of nodes that are made good without a new commit in between.
        requeue: whether to start again after a preemption (exit code 75).
        after: jobs that must end well before.
        grace_s: how long a node may take to save after a signal.
        lost_s: a node that is silent for so long is lost.
    """

    run_url: str
    nodes: int
    max_nodes: int
    bundle: Mapping[str, float]
    labels: Mapping[str, str]
    strategy: str
    command: list[str]
    environment: Mapping[str, str]
    setup: list[str]
    port: int
    namespace: str
    retries: int
    requeue: bool
    after: list[str]
    grace_s: float
    lost_s: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(**json.loads(text))

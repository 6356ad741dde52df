"""What runs on Ray's nodes: a trial does one row as any backend would, and a judge in its worker tells Tune how it goes.

A trial is one actor on the first bundle of its placement group. It starts the node entry of every backend
(`cluster.launch.node`) as a process of its own, and an actor on each further bundle does the same for its node. Nothing
of Ray is in the workers: a validation's metrics are an object in the run's store, which the trial hands on to Tune.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.launch import PARENT_PID
from cluster.launch.local import _ROOT
from cluster.sweep.stopping import asked, halving
from datamodules.store import Store
from trainer.callbacks.pruning import JUDGE, JUDGE_SETTINGS
from trainer.records import decode, encode

JUDGED = {JUDGE: "cluster.sweep.tune_trial:judge"}
CODE, SAID = "keel_code", "keel_said"  # in a trial's last result: how its node ended

_FOLDER = "reports"
_POLL_S = 0.25
_LOST_S = 60.0  # so long the other nodes may take to end once the first one has


def judge(store: Store, step: int, metrics: Mapping[str, float]) -> str | None:
    """Leaves the metrics for the trial, and says whether the scheduler has stopped the run since the last time, or the
    sweep's `stop` section stops it now."""
    store.write(f"{_FOLDER}/{step:09d}.json", encode({"step": step, **metrics}))
    why = asked(store, step, metrics)
    return halving(store, step, metrics) if why is None and JUDGE_SETTINGS in os.environ else why


def trial(config: dict[str, Any]) -> None:
    """A row, from its last commit to its end. Tune starts it again after a node was lost.

    Args:
        config: `run` (its URL), `command` (the words after `python`), `environment`, `nodes`; `board`: name of an
            actor that knows whether the driver has been told to end.
    """
    import ray
    from ray import tune

    store, board = Store(config["run"]), ray.get_actor(config["board"])
    nodes = _start(config)
    seen: set[str] = set()
    told = False
    try:
        while (code := nodes[0].poll()) is None:
            _report(store, seen)
            if not told and ray.get(board.over.remote()):
                told = True
                for node in nodes:
                    node.tell(signal.SIGTERM)
            time.sleep(_POLL_S)
        _report(store, seen)
        said = nodes[0].said() if code else ""
        deadline = time.monotonic() + _LOST_S
        while time.monotonic() < deadline and any(node.poll() is None for node in nodes):
            time.sleep(_POLL_S)
    finally:
        for node in nodes:
            node.end()
    tune.report({CODE: 128 - code if code < 0 else code, SAID: said})


class Process:
    """The node entry as a process of this one; it ends when this one does."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
        own = {"PYTHONPATH": path, PARENT_PID: str(os.getpid())}
        self._log = tempfile.TemporaryFile(prefix="keel-trial-")  # noqa: SIM115  # open as long as the node runs
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment, **own},
        )

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.poll()

    def tell(self, signum: int) -> None:
        """Sends it a signal."""
        self._process.send_signal(signum)

    def said(self) -> str:
        """Its last line."""
        self._log.seek(0)
        lines = [line for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def end(self) -> None:
        """Kills it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._log.close()


class _Remote:
    """A `Process` in an actor on another node."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def poll(self) -> int | None:
        return self._ask("poll")

    def tell(self, signum: int) -> None:
        self._ask("tell", signum)

    def said(self) -> str:
        return str(self._ask("said"))

    def end(self) -> None:
        import ray

        ray.kill(self._actor)

    def _ask(self, what: str, *words: Any) -> Any:
        import ray

        return ray.get(getattr(self._actor, what).remote(*words))


def _start(config: Mapping[str, Any]) -> list[Any]:
    """The node entries of a row, the first one here."""
    words, environment = list(config["command"]), config["environment"]
    if config["nodes"] == 1:
        return [Process(words, environment)]
    import ray
    from ray.util import get_current_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    with socket.socket() as probe:  # on the address that the others reach
        host = ray.util.get_node_ip_address()
        probe.bind((host, 0))
        endpoint = f"{host}:{probe.getsockname()[1]}"
    cut = words.index("--")

    def of(node: int) -> list[str]:
        place = ["--nodes", str(config["nodes"]), "--node", str(node), "--rendezvous", endpoint]
        return [*words[:cut], *place, *words[cut:]]

    group: Any = get_current_placement_group()
    made: list[Any] = [Process(of(0), environment)]
    for node in range(1, config["nodes"]):
        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
        needs = group.bundle_specs[node]
        actor = ray.remote(Process).options(
            scheduling_strategy=place, num_cpus=needs.get("CPU", 0), num_gpus=needs.get("GPU", 0)
        )
        made.append(_Remote(actor.remote(of(node), environment)))
    return made


def _report(store: Store, seen: set[str]) -> None:
    """Hands metrics that are new on to Tune, in the order of their steps."""
    from ray import tune

    for name in sorted(set(store.list(_FOLDER)) - seen):
        seen.add(name)
        (row,) = decode(store.read(name))
        tune.report(
            {key: value for key, value in row.items() if math.isfinite(value)}
        )  # of no number schedulers know nothing

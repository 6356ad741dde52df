"""Two nodes with addresses of their own and nothing in common but a network: they meet, train, lose the link, go on."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datamodules.store import Store
from tests.conftest import CREDENTIALS, _wait, free_port, unavailable
from tests.helpers import network
from tests.helpers.network import Network
from tests.helpers.runs import fno_config, tiny_fields
from trainer import config as configs
from trainer.checkpoint import committed_steps
from trainer.records import read_attempts, read_metrics, read_record

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 60, 10


@pytest.fixture(scope="module")
def two() -> Iterator[Network]:
    """Two nodes, and on this machine a store that they reach over the network; AWS_* is set for it."""
    if reason := network.missing():
        unavailable(reason)
    if lacking := [name for name in ("moto", "s3fs", "flask") if importlib.util.find_spec(name) is None]:
        unavailable(f"S3 tests need {', '.join(lacking)}: pip install 'keel[test]'")
    with Network(2) as net, pytest.MonkeyPatch.context() as patch:
        port = free_port()
        command = [sys.executable, "-m", "moto.server", "-H", net.here, "-p", str(port)]
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            endpoint = f"http://{net.here}:{port}"
            assert _wait(endpoint, server)
            patch.delenv("AWS_PROFILE", raising=False)
            for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint}.items():
                patch.setenv(name, value)
            from urllib.request import Request, urlopen

            urlopen(Request(f"{endpoint}/{net.name}", method="PUT"), timeout=30).close()
            tiny_fields(f"s3://{net.name}/data")
            yield net
        finally:
            server.kill()
            server.wait()


class Nodes:
    """The two nodes of one run, each as a backend would start it."""

    def __init__(self, net: Network, name: str, folder: Path, **train: object) -> None:
        url = f"s3://{net.name}/{name}"
        raw = fno_config(url, f"s3://{net.name}/data", max_steps=STEPS, **train)
        raw["checkpoint"] = {"every": EVERY}
        raw["diagnostics"] = {"every": 0, "names": []}
        raw["log"] = {"every": 1, "flush_seconds": 0.2, "progress": False}
        raw["recovery"] = {"init_timeout_seconds": 60, "step_timeout_seconds": 6, "max_restarts": 3}
        raw["resources"] |= {"nodes": 2}
        self.net, self.store, self.folder, self.port = net, Store(url), folder, 29400
        folder.mkdir(exist_ok=True)
        self.store.write("config.yaml", configs.to_yaml(configs.load(raw)).encode())
        self.processes = [self.start(node) for node in range(2)]

    def start(self, node: int) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-P", "-m", "cluster.launch.node", "--run", self.store.url, "--nodes", "2"]
        words += ["--restarts", "3", "--heartbeat", "1", "--join-timeout", "90", "--lost", "6"]
        words += ["--", "trainer", "fit", self.store.url]
        environment = os.environ | {
            "KEEL_NODE": str(node),
            "KEEL_RENDEZVOUS": f"{self.net.address(0)}:{self.port}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "KEEL_PARENT_PID": str(os.getpid()),  # nothing outlives the test
        }
        with open(self.folder / f"node-{node}.txt", "ab") as out:
            return subprocess.Popen(self.net.command(node, words), stdout=out, stderr=out, env=environment)

    def wait(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]

    def until_committed(self, step: int, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while not [s for s in committed_steps(self.store.sub("checkpoints")) if s >= step]:
            assert time.monotonic() < deadline and self.processes[0].poll() is None, self.said()
            time.sleep(0.1)

    def said(self) -> str:
        return "\n".join((self.folder / f"node-{node}.txt").read_text() for node in range(2))

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


def losses(store: Store) -> list[float]:
    return [row["loss"] for row in read_metrics(store) if "loss" in row]


@pytest.fixture(scope="module")
def reference(two: Network, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run on both nodes when nothing happens."""
    nodes = Nodes(two, "reference", tmp_path_factory.mktemp("reference"))
    try:
        assert nodes.wait(120) == [0, 0], nodes.said()
    finally:
        nodes.end()
    status = [nodes.store.read_json(f"status/node-{node}.json") for node in range(2)]
    assert [s["phase"] for s in status] == ["ended", "ended"] and [s["reason"] for s in status] == ["done", "done"]
    assert set(nodes.store.list("logs")) == {
        f"logs/attempt-1/node-{node}/rank-{rank}.log" for node, rank in ((0, 0), (1, 1))
    }
    found = losses(nodes.store)
    assert len(found) == STEPS
    return found


def test_a_cut_link_is_noticed_and_the_run_goes_on_bitwise(
    two: Network, reference: list[float], tmp_path: Path
) -> None:
    nodes = Nodes(two, "cut", tmp_path)
    try:
        nodes.until_committed(2 * EVERY)
        two.cut(1)
        try:
            time.sleep(12)
            assert [process.poll() for process in nodes.processes] == [None, None], nodes.said()
            stood = committed_steps(nodes.store.sub("checkpoints"))[-1]
            assert stood < STEPS  # nobody trains alone
        finally:
            two.mend(1)
        assert nodes.wait(150) == [0, 0], nodes.said()
    finally:
        nodes.end()
    assert losses(nodes.store) == reference
    assert committed_steps(nodes.store.sub("checkpoints"))[-1] == STEPS
    record = read_record(nodes.store)
    assert record["status"] == "ok" and record["retries"] >= 1
    assert read_attempts(nodes.store)[-1]["resumed_from"] >= 2 * EVERY


def test_a_signal_to_one_node_and_the_loss_of_one_change_nothing(
    two: Network, reference: list[float], tmp_path: Path
) -> None:
    nodes = Nodes(two, "lost", tmp_path)
    try:
        nodes.until_committed(EVERY)
        nodes.processes[1].send_signal(signal.SIGTERM)
        assert nodes.wait(60) == [75, 75], nodes.said()
        assert read_record(nodes.store)["status"] == "preempted"
        assert nodes.store.read_json("status/node-0.json")["reason"] == "preempted after a save"
        nodes.processes = [nodes.start(node) for node in range(2)]
        nodes.until_committed(committed_steps(nodes.store.sub("checkpoints"))[-1] + 1)
        nodes.processes[1].kill()  # and its worker with it
        nodes.processes[1].wait()
        nodes.processes[1] = nodes.start(1)  # as a backend replaces a node
        assert nodes.wait(120) == [0, 0], nodes.said()
    finally:
        nodes.end()
    assert losses(nodes.store) == reference
    assert read_record(nodes.store)["status"] == "ok"
    attempts = read_attempts(nodes.store)
    assert len(attempts) >= 3 and attempts[-1]["cause"], attempts


def test_a_node_that_cannot_reach_the_first_says_so_in_one_line(two: Network, tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-m", "cluster.launch.node", "--run", f"s3://{two.name}/nobody", "--nodes", "2"]
    words += [
        "--node",
        "1",
        "--rendezvous",
        f"{two.address(0)}:29500",
        "--join-timeout",
        "2",
        "--",
        "trainer",
        "fit",
        "x",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(two.command(1, words), env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 74
    assert done.stderr.startswith(f"keel: error: node 1 did not reach node 0 at {two.address(0)}:29500 within 2 s")
    assert done.stderr.count("\n") == 1
    status = Store(f"s3://{two.name}/nobody").read_json("status/node-1.json")
    assert status["phase"] == "ended" and status["exit_code"] == 74 and "did not reach" in status["reason"]

"""The node entry, with a small worker in place of the trainer: what it tells the store, its exit codes, how nodes agree."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import Group, meet
from cluster.launch.agent import interface_of, local_address
from cluster.launch.node_watch import NodeWatch
from datamodules.store import Store
from tests.conftest import free_port
from trainer.records import read_attempts

ROOT = Path(__file__).resolve().parents[2]
WORKER = """
import os, signal, sys, time
rank, action = os.environ["RANK"], sys.argv[1]
print(f"rank {rank} of {os.environ['WORLD_SIZE']} on node {os.environ['KEEL_NODE']}, start {os.environ['KEEL_RESTARTS']}")
print("address", os.environ["MASTER_ADDR"], os.environ.get("GLOO_SOCKET_IFNAME"), flush=True)
if action == "task-3":
    print("setting", os.environ["SETTING"])
if action == "fails" or (action == "once" and os.environ["KEEL_RESTARTS"] == "0" and rank == "1"):
    print("keel: error: it broke", file=sys.stderr, flush=True)
    sys.exit(1)
if action == "user":
    print("keel: error: x=1: must be 2", file=sys.stderr, flush=True)
    sys.exit(2)
if action == "once" and os.environ["KEEL_RESTARTS"] == "0":
    time.sleep(60)
if action == "elastic":  # commits at each start; ends when it is told to, or when the other rank is gone
    from datamodules.store import Store
    from trainer import restarts
    from trainer.commits import committed_steps, step_name
    from trainer.records import start_attempt
    restarts.die_with_parent()
    store, world = Store("run"), int(os.environ["WORLD_SIZE"])
    if rank == "0":
        reached = max(committed_steps(store.sub("checkpoints")), default=0)
        start_attempt(store, {"resumed_from": reached, "world": world})
        store.write(f"checkpoints/{step_name(reached + 1)}/COMMITTED", b"{}")
    else:
        store.write_json("peer.json", os.getpid())
    while not os.path.exists("end"):
        if world == 2 and rank == "0" and os.path.exists("run/peer.json"):
            if not os.path.exists(f"/proc/{store.read_json('peer.json')}"):
                sys.exit(1)
        time.sleep(0.05)
if action == "commits":
    os.makedirs("run/checkpoints/step-00000001", exist_ok=True)
    open("run/checkpoints/step-00000001/COMMITTED", "w").close()
    sys.exit(69)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "keel_node_worker.py").write_text(WORKER)
    return tmp_path


def start(place: Path, *words: str, env: Mapping[str, str] | None = None, run: str = "run") -> subprocess.Popen[str]:
    options = [word for word in words if word.startswith("--")]
    command = [sys.executable, "-P", "-m", "cluster.launch.node", "--run", str(place / run), "--heartbeat", "0.5"]
    command += [part for option in options for part in option.split("=")]
    command += ["--", "keel_node_worker", *(word for word in words if not word.startswith("--"))]
    path = os.pathsep.join([str(ROOT), str(place)])
    environment = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(place), "KEEL_JOB": "job-1", **(env or {})}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place
    )


def status(place: Path, node: int = 0, run: str = "run") -> dict[str, Any]:
    return Store(str(place / run)).read_json(f"status/node-{node}.json")


def test_a_node_shows_rank_zero_and_keeps_all_logs_in_the_store(place: Path) -> None:
    node = start(place, "ok", "--processes=2")
    out, err = node.communicate(timeout=60)
    assert node.returncode == 0 and err == ""
    assert out == "rank 0 of 2 on node 0, start 0\naddress 127.0.0.1 lo\n"
    store = Store(str(place / "run"))
    assert store.list("logs") == [f"logs/attempt-1/node-0/rank-{rank}.log" for rank in range(2)]
    assert store.read("logs/attempt-1/node-0/rank-1.log").startswith(b"rank 1 of 2")
    said = status(place)
    assert said["phase"] == "ended" and said["exit_code"] == 0 and said["reason"] == "done"
    assert said["job_id"] == "job-1" and said["memory_bytes"] > 0 and said["time"] >= said["started"]
    assert not list(place.glob("keel-node-*"))  # nothing is left on the node


def test_a_failure_is_told_with_its_cause_and_in_the_record(place: Path) -> None:
    node = start(place, "fails", "--restarts=1")
    _, err = node.communicate(timeout=60)
    assert node.returncode == 1 and "restart 1 of 1" in err
    assert status(place)["reason"] == "the worker failed with exit code 1: it broke"
    record = (place / "run/record.jsonl").read_text()
    assert '"status":"failed"' in record and "it broke" in record


def test_bad_input_keeps_its_line(place: Path) -> None:
    node = start(place, "user", "--restarts=1")
    node.communicate(timeout=60)
    assert node.returncode == 2 and status(place)["reason"] == "x=1: must be 2"
    assert not (place / "run/record.jsonl").exists()


def test_a_lost_node_tells_whether_there_is_a_new_commit(place: Path) -> None:
    for code in (77, 69):
        node = start(place, "commits", env={"KEEL_PROGRESS_CODE": "77"})
        _, err = node.communicate(timeout=60)
        assert node.returncode == code, err
        assert status(place)["exit_code"] == 69


def test_logs_of_attempts_are_sent_in_their_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sent = Store(str(place / "run")), []
    monkeypatch.setattr(Store, "write", lambda self, path, data: sent.append(path))
    for attempt in (10, 9):
        (place / f"attempt-{attempt}").mkdir()
        (place / f"attempt-{attempt}/rank-0.log").write_text("x\n")
    NodeWatch(store, 0, str(place), 10.0, together=False)._send_logs(1 << 20)
    assert sent == [f"logs/attempt-{attempt}/node-0/rank-0.log" for attempt in (9, 10)]


def test_the_task_of_an_array_is_put_in_everywhere(place: Path) -> None:
    env = {"KEEL_ARRAY_INDEX": "3", "SETTING": "s-{index}"}
    node = start(place, "task-{index}", env=env, run="run-{index}")
    out, _ = node.communicate(timeout=60)
    assert node.returncode == 0 and "setting s-3" in out
    assert status(place, run="run-3")["reason"] == "done"
    node = start(place, "x", run="run-{index}")
    _, err = node.communicate(timeout=60)
    assert node.returncode == 2 and "$KEEL_ARRAY_INDEX is not set" in err and err.count("\n") == 1


def test_nodes_start_again_together_and_count_alike(place: Path) -> None:
    port = free_port()
    env = {"KEEL_RENDEZVOUS": f"127.0.0.1:{port}", "OMP_NUM_THREADS": "1"}
    words = ("once", "--nodes=2", "--restarts=2", "--join-timeout=60")
    nodes = [start(place, *words, env={**env, "KEEL_NODE": str(number)}) for number in range(2)]
    said = [node.communicate(timeout=150) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    states = [status(place, number) for number in range(2)]
    assert [state["start"] for state in states] == [1, 1] and states[0]["nodes"] == 2
    assert states[0]["cause"] == states[1]["cause"] == "rank 1 failed with exit code 1"
    shown = "".join(out for out, _ in said)
    assert "start 0" in shown and "start 1" in shown and "rank 1 of 2" not in shown


def test_a_node_that_joins_late_and_is_killed_changes_the_number_not_the_run(place: Path) -> None:
    env = {"KEEL_RENDEZVOUS": f"127.0.0.1:{free_port()}", "OMP_NUM_THREADS": "1"}
    words = ("elastic", "--nodes=1:2", "--restarts=2", "--join-timeout=12", "--lost=3")
    store = Store(str(place / "run"))

    def attempts(count: int) -> list[dict[str, Any]]:
        deadline = time.monotonic() + 90
        while len(found := read_attempts(store)) < count:
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        return found

    first = start(place, *words, env=env | {"KEEL_NODE": "0"})
    attempts(1)
    second = start(place, *words, env=env | {"KEEL_NODE": "1"})
    attempts(2)
    while not store.exists("peer.json"):
        time.sleep(0.05)
    second.kill()
    found = attempts(3)
    (place / "end").touch()
    _, err = first.communicate(timeout=60)
    second.communicate(timeout=60)
    assert first.returncode == 0, err
    assert [(row["world"], row["resumed_from"]) for row in found] == [(1, 0), (2, 1), (1, 2)]
    said = status(place)
    assert (said["nodes"], said["start"], said["attempt"], said["reason"]) == (1, 2, 3, "done")


def test_nodes_of_other_versions_do_not_begin(place: Path) -> None:
    other = place / "other/numpy-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.9\n")
    env = {"KEEL_RENDEZVOUS": f"127.0.0.1:{free_port()}"}
    skewed = {"PYTHONPATH": os.pathsep.join([str(other.parent), str(ROOT), str(place)])}
    words = ("ok", "--nodes=2", "--restarts=2", "--join-timeout=60")
    nodes = [start(place, *words, env=env | {"KEEL_NODE": str(n)} | (skewed if n else {})) for n in range(2)]
    said = [node.communicate(timeout=60) for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    for out, err in said:
        assert out == "" and err.startswith("keel: error: node ") and err.count("\n") == 1
        assert "has numpy 9.9, node 0 (" in err and err.endswith(": all nodes must run the same\n")
    assert "must run the same" in status(place, 1)["reason"] and not (place / "run/logs").exists()


@pytest.mark.parametrize("how", ["signal", "time-out"])
def test_a_node_that_waits_for_others_ends_when_told_or_when_time_is_up(how: str, place: Path) -> None:
    env = {"KEEL_RENDEZVOUS": f"127.0.0.1:{free_port()}", "KEEL_NODE": "0"}
    node = start(place, "ok", "--nodes=2", f"--join-timeout={120 if how == 'signal' else 2}", env=env)
    if how == "signal":
        deadline = time.monotonic() + 60
        while not (place / "run/status/node-0.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(2)
        assert status(place)["phase"] == "waiting"
        node.send_signal(signal.SIGTERM)
    _, err = node.communicate(timeout=60)
    assert node.returncode == (75 if how == "signal" else 74), err
    if how == "time-out":
        assert "the 2 nodes of the job did not all come within 2 s (this is node 0)" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("x", "--nodes=2"), "must be HOST:PORT of node 0"),
        (("x", "--nodes=2", "--node=2", "--rendezvous=a:1"), "must be 0 to 1"),
        (("x", "--nodes=3:2"), "must be N or MIN:MAX"),
    ],
)
def test_a_wrong_call_is_one_line(words: tuple[str, ...], message: str, place: Path) -> None:
    _, err = (node := start(place, *words)).communicate(timeout=60)
    assert node.returncode == 2 and message in err and err.count("\n") == 1


class Counted:
    def __init__(self, count: int) -> None:
        self.count, self.cause = count, ""

    def counted(self, cause: str, count: int | None = None) -> None:
        self.count, self.cause = self.count + 1 if count is None else count, cause


def test_node_zero_waits_for_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = []

    def address(endpoint: str) -> str:
        known.append(endpoint)
        if len(known) < 3:
            raise socket.gaierror(-2, "Name or service not known")
        return "127.0.0.1"

    monkeypatch.setattr(meet, "local_address", address)
    monkeypatch.setattr(meet, "_BIND_S", 0.3)
    group = Group(f"localhost:{free_port()}", 0, 2, join_timeout_s=60)
    handler, found = meet.rendezvous(group)
    assert found == "127.0.0.1" and len(known) == 3
    handler.shutdown()
    known.clear()
    with pytest.raises(meet.Lost, match="node 0 does not find its own name"):
        meet.rendezvous(dataclasses.replace(group, join_timeout_s=0.1))


def test_nodes_agree_on_starts_and_refuse_other_versions() -> None:
    def note(node: int, count: int, torch: str = "2") -> dict[str, Any]:
        facts = {"torch": torch}
        return {
            "node": node,
            "host": f"h{node}",
            "count": count,
            "cause": f"c{node}",
            "attempt": node + 4,
            "facts": facts,
        }

    mine = Counted(0)
    assert meet.agree(mine, [note(0, 0), note(1, 2)]) == 5
    assert (mine.count, mine.cause) == (2, "c1")
    changed = note(0, 3) | {"cause": meet.CHANGED}
    meet.agree(mine, [changed, note(1, 3) | {"cause": "rank 1 failed with exit code 1"}, note(2, 3)])
    assert (mine.count, mine.cause) == (3, "c2")
    with pytest.raises(
        ValueError, match=r"node 1 \(h1\) has torch 3, node 0 \(h0\) has 2: all nodes must run the same"
    ):
        meet.agree(mine, [note(0, 0), note(1, 0, torch="3")])


def test_the_way_to_an_address_is_found() -> None:
    assert local_address("127.0.0.1:80") == "127.0.0.1" and interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.1") == ""

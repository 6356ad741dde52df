"""keel doctor: here, and as a job of two nodes one of which is odd; and what it makes of what was measured."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.doctor.findings import judge
from cluster.launch.code import ROOT
from datamodules.store import Store


def keel(*words: object) -> int:
    return cli.main([str(word) for word in words])


def report(nodes: int = 4, local: int = 2, device: bool = True) -> dict[str, Any]:
    gpu = {"name": "H100", "memory": 80 << 30, "free": 80 << 30, "visible": local}
    good = {
        "write_bytes_per_s": 1e9,
        "read_bytes_per_s": 2e9,
        "created": False,
        "conditional": True,
        "ahead_of_store_s": 0.2,
    }
    ranks = [
        {
            "rank": rank,
            "node": rank // local,
            "host": f"h{rank // local}",
            "versions": {"python": "3.11", "torch": "2.13"},
            "environment": {"NCCL_DEBUG": "WARN"},
            "limits": {"open files": 65536, "locked memory": -1},
            "cpus": 8,
            "memory": 1 << 40,
            "shared_memory": 1 << 36,
            "temporary": 1 << 40,
            "infiniband": ["mlx5_0"],
            "devices": [gpu] if device else [],
            "flop_per_s": 6e14,
            "links": {}
            if rank % local
            else {n: 4e10 for n in (rank // local - 1, rank // local + 1) if 0 <= n < nodes},
            "store": {} if rank % local else good | {"created": rank == 0},
            "ahead_s": 0.001 * rank,
        }
        for rank in range(nodes * local)
    ]
    group = {f"{name}_{what}": 1e-4 for name in ("all_reduce", "all_to_all") for what in ("latency_s", "bytes_per_s")}
    return {"processes_per_node": local, "group": group, "ranks": copy.deepcopy(ranks)}


def problems(raw: dict[str, Any]) -> list[str]:
    return [line for finding in judge(raw) for line in finding.problems]


def test_a_sound_cluster_has_no_problems() -> None:
    assert problems(report()) == [] and problems(report(nodes=1, local=1, device=False)) == []
    assert {finding.name for finding in judge(report())} >= {
        "all-reduce",
        "all-to-all",
        "between nodes",
        "clocks",
        "conditional PUT",
    }


@pytest.mark.parametrize(
    ("rank", "changes", "message"),
    [
        (
            4,
            {"versions": {"python": "3.11", "torch": "2.12"}},
            "node 2 (h2), rank 4: torch 2.12, where the others have 2.13",
        ),
        (6, {"environment": {}}, "node 3 (h3), rank 6: variable NCCL_DEBUG nothing, where the others have 'WARN'"),
        (2, {"limits": {"open files": 256, "locked memory": -1}}, "rank 2: limit of open files 256, at least 1024"),
        (2, {"limits": {"open files": 65536, "locked memory": 65536}}, "locked memory is limited"),
        (3, {"flop_per_s": 3e14}, "node 1 (h1), rank 3: computes at 300 TFLOP/s, where 600 TFLOP/s are usual"),
        (2, {"devices": []}, "rank 2: accelerator none, where the others have H100"),
        (4, {"shared_memory": 64 << 20, "rank": 4}, ""),  # exactly enough for two processes
        (4, {"shared_memory": 32 << 20}, "node 2 (h2): 32.0 MiB of shared memory are free"),
        (4, {"ahead_s": 12.0}, "node 2 (h2): its clock is 12 s ahead of the others'"),
        (0, {"links": {1: 1e9}}, "node 0 (h0): its network gives 953.7 MiB/s"),
        (4, {"store": {"error": "s3://b/x: access denied"}}, "node 2 (h2): s3://b/x: access denied"),
    ],
)
def test_the_odd_one_is_named(rank: int, changes: dict[str, Any], message: str) -> None:
    raw = report()
    raw["ranks"][rank] |= changes
    assert bool(problems(raw)) == bool(message)
    assert any(message in line for line in problems(raw)) or not message, problems(raw)


def test_what_the_store_does_with_conditions() -> None:
    raw = report()
    raw["ranks"][2]["store"]["created"] = True
    assert any("2 of 4 nodes could create the same object" in line for line in problems(raw))
    raw = report()
    for rank in raw["ranks"]:
        rank["store"] = rank["store"] and rank["store"] | {"conditional": False}
    finding = next(finding for finding in judge(raw) if finding.name == "conditional PUT")
    assert finding.verdict == "note" and finding.found == "ignored by this server"


def test_here_two_processes_are_alike(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code = keel("doctor", "--processes", 2, "--accelerator", "cpu", "--seconds", 0.3, "--mib", 1, "--json")
    raw = json.loads(capfd.readouterr().out)
    verdicts = {check["check"]: check["verdict"] for check in raw["checks"]}
    assert code == int("problem" in verdicts.values())
    # Whether this machine has enough of everything is not for this test to say.
    enough = ("limits", "shared memory", "memory and disk")
    assert {verdict for name, verdict in verdicts.items() if name not in enough} == {"ok"}
    assert {"all-reduce", "all-to-all", "store", "conditional PUT", "matrix products"} <= verdicts.keys()
    assert len(raw["ranks"]) == 2 and raw["group"]["all_reduce_bytes_per_s"] > 0


def test_under_torchrun_rank_zero_has_the_report_and_the_exit_code(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["doctor", str(tmp_path / "reports"), "--accelerator", "cpu", "--seconds", "0.3", "--mib", "1", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    # So few open files are a problem of every rank: none of the others may end the one that tells it.
    limited = ["bash", "-c", 'ulimit -n 600; exec "$0" "$@"', *torchrun, "-m", "cluster.cli", *words]
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=120)
    report = json.loads(done.stdout)
    assert done.returncode == 1 and len(report["ranks"]) == 2
    problems = [line for check in report["checks"] for line in check["problems"]]
    assert any("limit of open files 600, at least 1024" in line for line in problems), problems


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    odd = 'if [ "$KEEL_NODE" = 1 ]; then ulimit -n 600; export NCCL_DEBUG=INFO; fi'
    raw = {"backend": "local", "code": {"how": "image"}, "heartbeat_s": 1, "setup": [odd], "job": {"nodes": 2}}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(raw))
    broken = {"setup": ["echo no python here", "exit 3"]}
    (tmp_path / "broken.yaml").write_text(yaml.safe_dump(raw | broken))
    return tmp_path


def test_as_a_job_it_names_the_odd_node(cluster: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ("--on", cluster / "odd.yaml", "--seconds", 0.3, "--mib", 1)
    assert keel("doctor", f"{cluster}/reports", *words) == 1
    printed = capfd.readouterr()
    assert "job local-" in printed.err and "2 x 1 processes on " in printed.out
    lines = [line for line in printed.out.splitlines() if line.startswith("problem  node")]
    assert all(line.startswith("problem  node 1 (") for line in lines if "open files" in line or "NCCL" in line), lines
    assert any("limit of open files 600, where the others have" in line for line in lines)
    assert any("variable NCCL_DEBUG 'INFO', where the others have nothing" in line for line in lines)
    (name,) = Store(f"{cluster}/reports").children()[0]
    assert len(Store(f"{cluster}/reports/{name}").read_json("doctor.json")["ranks"][0]["links"]) == 1


def test_what_cannot_be_checked_is_one_line(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in [
        ((f"{cluster}/x", "--on", cluster / "odd.yaml", "seed=3"), "seed=3 has no effect"),
        (("--on", cluster / "odd.yaml", "nodes=2"), "URL is required here"),
        ((f"{cluster}/x", "nodes=2"), "nodes=2 has no effect without --on"),
        (("--processes", 0), "must be at least 1"),
        ((f"{cluster}/x", "--on", cluster / "broken.yaml"), "is failed; no python here"),
    ]:
        assert keel("doctor", *words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("keel: error: ") and message in error, error

"""The parts of jobs on this machine: what their nodes find, and what is known of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import cluster_config, supervisor
from cluster.launch.base import open_backend
from cluster.launch.local_backend import Local, outcome, started_at
from cluster.launch.spec import JobSpec


def test_a_task_of_an_array_has_a_state_of_its_own(tmp_path: Path) -> None:
    local = open_backend(cluster_config.load({"backend": "local", "local": {"folder": str(tmp_path)}}))
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "job.json").touch()
    assert [local.state(name) for name in ("job", "job_1", "nobody")] == ["queued", "queued", "unknown"]
    (folder / "pid.json").write_text(json.dumps({"pid": os.getpid(), "ticks": started_at(os.getpid())}))
    for name in ("started", "task-00000-started", "task-00001-started"):
        (folder / name).touch()
    outcome(folder, "failed", 1, "", task=0)
    assert [local.state(f"job{task}") for task in ("", "_0", "_1", "_2")] == ["running", "failed", "running", "queued"]
    outcome(folder, "cancelled", 75, "")
    assert [local.state(f"job{task}") for task in ("", "_0", "_2")] == ["cancelled", "failed", "cancelled"]


def test_nodes_and_tasks_of_one_machine_have_accelerators_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def local(parallel: int = 1) -> Local:
        return open_backend(cluster_config.load({"backend": "local", "local": {"parallel": parallel}}))

    two: dict[str, Any] = {"name": "x", "command": ("trainer", "fit", "u"), "run_url": "u", "nodes": 2}
    found = re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", local().render(JobSpec(**two, accelerators=3)))
    assert found == ["0,1,2", "3,4,5"]
    assert "CUDA_VISIBLE" not in local().render(JobSpec(**two))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,3,1")
    found = re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", local().render(JobSpec(**two, accelerators=2)))
    assert found == ["7,5", "3,1"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    spec = JobSpec(**two | {"run_url": "u-{index}"}, accelerators=2, array=9)
    assert local(2).environment(spec, 1, 1, 5, place=1)["CUDA_VISIBLE_DEVICES"] == "6,7"
    assert 'CUDA_VISIBLE_DEVICES="$DEVICES"' in local(2).render(spec)
    local(2).check(spec)
    with pytest.raises(ValueError, match="accelerators=2 for each of 6 nodes at once: this machine has 8"):
        local(3).check(spec)


def test_cpus_are_the_threads_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    local = open_backend(cluster_config.load({"backend": "local"}))
    base: dict[str, Any] = {"name": "x", "command": ("trainer", "fit", "u"), "run_url": "u", "processes": 2}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def threads(**fields: Any) -> list[str]:
        return re.findall(r"OMP_NUM_THREADS=(\S+)", local.render(JobSpec(**base, **fields)))

    assert [threads(cpus=9), threads(cpus=1), threads()] == [["4"], ["1"], []]
    assert threads(cpus=9, env={"OMP_NUM_THREADS": "3"}) == ["3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert threads(cpus=9) == []  # what is set here reaches the nodes as it is
    with pytest.raises(ValueError, match=r"^cpus=9999: this machine has \d+$"):
        local.check(JobSpec(**base, cpus=9999))


def test_tasks_that_run_at_once_have_places_of_their_own(tmp_path: Path) -> None:
    class Task:
        def __init__(self, index: int) -> None:
            self.index, self.folder, self.code, self.place, self.left = index, tmp_path, 0, 0, 2 + index % 2

        def start(self) -> None:
            places.append(self.place)

        def cancelled(self) -> bool:
            return False

        def poll(self, ending: bool) -> bool:
            self.left -= 1
            return not self.left

    places: list[int] = []
    tasks: Any = [Task(index) for index in range(4)]
    assert supervisor._run(tasks, [], 2, lambda: False) == (0, "done")
    assert places == [0, 1, 0, 1]

"""Sweeps by real processes: drivers and workers that are killed, two drivers at once, rows added, rows that diverge or fail."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import cli
from cluster.laws.records import base_config
from cluster.laws.records import load as load_runs
from cluster.sweep.config import load
from cluster.sweep.expand import expand
from cluster.sweep.results import read_results
from cluster.sweep.status import status
from cluster.sweep.table import Table
from datamodules.store import Store
from tests.cluster.sweep.conftest import children
from tests.helpers.runs import tiny_fields
from tests.helpers.slurm import SlurmCluster, wait_until
from trainer.checkpoint.manifest import latest
from trainer.records import decode, read_attempts, read_record

ROOT = Path(__file__).resolve().parents[3]
Start = Callable[..., "subprocess.Popen[str]"]


def saved(raw: dict[str, Any], *overrides: str) -> Table:
    table = expand(load(raw, overrides))
    table.save(Store(table.url))
    return table


def drive(start: Start, table: Table, *words: object) -> subprocess.Popen[str]:
    return start("cluster.sweep.drive", table.url, *words)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a driver said, once it has ended."""
    said, _ = process.communicate(timeout=600)
    assert process.returncode == code, said
    return said


def lines(table: Table) -> Counter[str]:
    """How many results each row has, over all objects."""
    store = Store(table.url)
    return Counter(result["row"] for name in store.list("records") for result in decode(store.read(name)))


def keel(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.mark.timeout(900)
def test_kills_and_second_drivers_repeat_nothing_and_lose_nothing(
    sweep: dict[str, Any], start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep["grid"] = {"optim.lr": [1e-2, 1e9]}
    sweep["zip"] = [{"train.max_steps": [8, 600], "checkpoint.every": [8, 50]}]
    table = saved(sweep)
    short, long = [row for row in table.rows if row.samples == 32], [row for row in table.rows if row.samples > 32]
    run = {row.id: Store(table.run_url(row)) for row in table.rows}
    first = drive(start, table, "--executor", "local", "--workers", "2")
    # A worker of a long run is killed: its node starts it again.
    wait_until(lambda: latest(run[long[0].id].sub("checkpoints")), "the long run to commit a save", 400)
    record = run[long[0].id].read_json("status/node-0.json")
    for worker in children(record["pid"]):
        os.kill(worker, signal.SIGKILL)
    wait_until(lambda: len(read_attempts(run[long[0].id])) == 2, "the worker to be started again", 300)
    done = set(lines(table))
    assert {row.id for row in short} <= done
    # The driver is killed while that run goes on, and two others take over at once.
    first.kill()
    others = [drive(start, table, "--executor", "local", "--workers", "2") for _ in range(2)]
    for other in others:
        ended(other)
    assert lines(table) == Counter(row.id for row in table.rows)
    found = {result["row"]: result for result in read_results(Store(table.url))}
    for row in table.rows:
        assert found[row.id]["status"] == ("diverged" if row.axes["optim.lr"] == 1e9 else "ok")
        assert found[row.id]["run_id"] == read_record(run[row.id])["run_id"]
        if row.id in done:
            assert len(read_attempts(run[row.id])) == 1  # what was done was not done again
    attempts = read_attempts(run[long[0].id])
    assert len(attempts) == 3 and attempts[1]["cause"] and all(a["resumed_from"] >= 50 for a in attempts[1:])
    # Rows are added: only they run. By hand, from the same config with one more rate.
    sweep["grid"]["optim.lr"].append(1e-3)
    sweep["zip"] = [{"train.max_steps": [8], "checkpoint.every": [8]}]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert keel("sweep", "run", tmp_path / "sweep.yaml", "--executor", "packed", "--workers", "1") == 0
    said = capsys.readouterr().out
    assert "3 of 3 rows: optim.lr=0.001" in said and "2 done, 1 diverged" in said
    assert sum(lines(table).values()) == 5
    assert keel("sweep", "run", tmp_path / "sweep.yaml") == 0
    assert "of 3 rows" not in capsys.readouterr().out and sum(lines(table).values()) == 5
    # keel fit and keel plan read it.
    runs = load_runs(table.url)
    assert len(runs) == 3 and sorted(runs.status) == ["diverged", "ok", "ok"]
    assert base_config(table.url)["model"]["width"] == 8  # type: ignore[index]


@pytest.mark.timeout(900)
def test_packed_rows_survive_kills_of_drivers_and_of_workers(sweep: dict[str, Any], start: Start) -> None:
    rng = random.Random(time.time_ns())
    sweep["grid"] = {
        "optim.lr": {"from": 1e-3, "to": 1e-1, "steps": 8},
        "model.init_std": {"from": 0.01, "to": 1.0, "steps": 4},
    }
    sweep["packed"] = {"cells": 2, "stacked": True}
    table = saved(sweep)
    driver = drive(start, table, "--executor", "packed", "--workers", "2")
    for _ in range(2):
        before = len(lines(table))
        wait_until(lambda: len(lines(table)) > before or driver.poll() is not None, "rows to be done", 400)  # noqa: B023
        time.sleep(rng.uniform(0, 0.3))
        victims = children(driver.pid) if rng.random() < 0.5 else [driver.pid]
        for victim in victims[:1]:
            os.kill(victim, signal.SIGKILL)
        if driver.pid in victims:
            driver.wait()
            driver = drive(start, table, "--executor", "packed", "--workers", "2")
    ended(driver)
    assert lines(table) == Counter(row.id for row in table.rows)
    assert status(table).counts["ok"] == 32


@pytest.mark.timeout(900)
def test_told_to_end_a_driver_saves_gives_back_and_goes_on_later(sweep: dict[str, Any], start: Start) -> None:
    sweep["grid"] = {"seed": [0, 1]}
    sweep["settings"] = {"train.max_steps": 3000}
    table = saved(sweep)
    runs = [Store(table.run_url(row)) for row in table.rows]
    driver = drive(start, table, "--executor", "local", "--workers", "1")
    wait_until(lambda: any(run.list("metrics") for run in runs), "training", 400)
    assert status(table).counts["running"] == 1
    driver.send_signal(signal.SIGTERM)
    ended(driver, 75)
    assert not lines(table)
    assert status(table).counts == {"ok": 0, "diverged": 0, "pruned": 0, "failed": 0, "running": 0, "missing": 2}
    assert [read_record(run)["status"] for run in runs if run.exists("record.jsonl")] == ["preempted"]


def test_a_row_that_cannot_train_is_told_failed_and_can_be_tried_again(
    sweep: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = sweep["base"]["data"]["url"]
    sweep["zip"] = [{"data.url": [good, str(tmp_path / "none")], "seed": [1, 2]}]
    sweep["executor"] = "packed"
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    assert keel("sweep", "run", tmp_path / "sweep.yaml", "--workers", "1") == 1
    said = capsys.readouterr()
    assert "1 done, 1 failed" in said.out and "none" in said.err and "failed" in said.err
    assert keel("sweep", "run", tmp_path / "sweep.yaml", "--workers", "1") == 1
    assert "of 2 rows" not in capsys.readouterr().out  # it is a result, until somebody asks
    (tmp_path / "none").symlink_to(good)
    assert keel("sweep", "run", tmp_path / "sweep.yaml", "--workers", "1", "--retry") == 0
    assert "2 done" in capsys.readouterr().out


def test_plan_status_and_what_is_refused(
    sweep: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep["grid"] = {"optim.lr": {"from": 1e-4, "to": 1e-2, "steps": 3}, "seed": [0, 1]}
    sweep |= {"packed": {"stacked": True}, "executor": "packed", "machine": {"device": "h100", "price": 2.0}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    assert keel("sweep", "plan", path, "--json") == 0
    before = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in before["rows"]] == ["missing"] * 6
    assert before["cost"]["left"]["hours"] == pytest.approx(
        sum(r["flops"] for r in before["rows"]) / 989.4e12 / 0.4 / 3600
    )
    assert before["cost"]["all"]["price"] == pytest.approx(2 * before["cost"]["all"]["hours"])
    assert keel("sweep", "status", path) == 0 and "6 missing" in capsys.readouterr().out
    assert not Path(sweep["url"]).exists()  # neither writes anything
    for command in ("plan", "run"):
        assert keel("sweep", command, path, "cap.runs=5") == 2
        assert "cap.runs=5: the sweep comes to 6" in capsys.readouterr().err
    assert keel("sweep", "run", path, "--workers", "1", "cap.runs=6") == 0
    said = capsys.readouterr().out
    assert "6 done" in said and "at the edge: optim.lr=0.01 is the best, and the highest tried" in said
    assert keel("sweep", "status", sweep["url"], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["ok"] == 6 and found["best"]["axes"]["optim.lr"] == 0.01
    assert [edge["side"] for edge in found["edges"]] == ["high"]
    assert keel("sweep", "plan", path) == 0
    assert "measured on 6 done runs" in capsys.readouterr().out
    assert keel("sweep", "run", path, "optim.name=sgd") == 2
    assert "unknown key 'optim'" in capsys.readouterr().err
    assert keel("sweep", "run", path, "settings.optim.name=muon") == 2
    assert "optim.name=muon does not work on each element alone" in capsys.readouterr().err
    assert keel("sweep", "run", path, "settings.resources.processes_per_node=64", "settings.train.global_batch=64",
                "--executor", "local") == 2  # fmt: skip
    assert "needs 64 cores, and this machine has" in capsys.readouterr().err
    assert keel("sweep", "status", tmp_path / "nowhere") == 2
    assert "no sweep at" in capsys.readouterr().err


def test_a_pruned_run_is_told_by_the_others(sweep: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    sweep["grid"] = {"optim.lr": [1e-2, 3e-2, 1e-7, 1e-8]}
    sweep["base"]["train"] |= {"val_every": 2, "max_steps": 8}
    sweep |= {"objective": "val/loss", "stop": {"first": 4, "factor": 2}, "executor": "packed"}
    table = saved(sweep)
    from cluster.sweep.drive import drive as run

    assert run(table, "packed", 1) == 0
    found = {result["lr"]: result for result in read_results(Store(table.url))}
    assert [found[lr]["status"] for lr in (3e-2, 1e-2, 1e-7, 1e-8)] == ["ok", "ok", "pruned", "pruned"]
    assert found[1e-8]["steps"] == 4 and found[3e-2]["steps"] == 8
    record = read_record(Store(table.run_url(table.rows[3])))
    assert (
        record["status"] == "pruned" and "runs were better" in record["pruned"] and record["checkpoint"].endswith("4")
    )


@pytest.mark.timeout(900)
def test_a_row_on_several_nodes_is_a_job_of_its_own(
    sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sweep["grid"] = {"optim.lr": [1e-2]}
    sweep["settings"] = {"resources.nodes": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    here = {"backend": "local", "code": {"how": "image"}, "heartbeat_s": 0.5}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(here))
    assert keel("sweep", "run", tmp_path / "sweep.yaml") == 2
    assert "needs 2 machines; `keel sweep run --on`" in capsys.readouterr().err
    words = ("sweep", "run", tmp_path / "sweep.yaml", "--on", tmp_path / "here.yaml")
    assert keel(*words) == 0 and "1 running" in capsys.readouterr().out
    assert keel(*words) == 0 and "jobs local-" not in capsys.readouterr().out  # it is under way already
    table = expand(load(sweep))
    wait_until(lambda: not status(table).counts["running"], "the job to end", 600, every=0.5)
    assert status(table).counts["ok"] == 1
    assert read_record(Store(table.run_url(table.rows[0])))["environment"]["world_size"] == 2


@pytest.mark.timeout(900)
def test_a_slurm_array_shares_the_rows(
    sweep: dict[str, Any], slurm: SlurmCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    sweep["grid"] = {"optim.lr": {"from": 1e-4, "to": 1e-2, "steps": 4}, "model.init_std": [0.01, 0.1]}
    sweep |= {"packed": {"cells": 2, "stacked": True}, "executor": "packed"}
    cluster = yaml.safe_load((ROOT / "configs/clusters/slurm.yaml").read_text())
    cluster |= {"python": sys.executable, "env": {"OMP_NUM_THREADS": "1"}, "code": {"how": "path", "where": str(ROOT)}}
    cluster["pass_env"] = []
    cluster["slurm"] |= {"logs": str(tmp_path)}
    (tmp_path / "slurm.yaml").write_text(yaml.safe_dump(cluster))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    words = ("sweep", "run", tmp_path / "sweep.yaml", "--on", tmp_path / "slurm.yaml", "--workers", "2")
    assert keel(*words, "--dry-run") == 0
    assert "#SBATCH --array=0-1" in capsys.readouterr().out and not Path(sweep["url"]).exists()
    assert keel(*words) == 0
    job = capsys.readouterr().out.partition("jobs ")[2].partition(" ")[0]
    slurm.wait(job, "done", seconds=600)
    table = expand(load(sweep))
    assert lines(table) == Counter(row.id for row in table.rows)
    assert status(table).counts["ok"] == 8
    assert keel(*words) == 0 and "8 done" in capsys.readouterr().out  # nothing is left, and nothing submitted


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_runs(
    path: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row of it, for two steps, on other data."""
    monkeypatch.chdir(ROOT)
    raw = yaml.safe_load(path.read_text())
    assert raw["name"] == path.stem
    data = text
    if "operator" in path.stem:
        data = tiny_fields(str(tmp_path / "fields"), trajectories=16, frames=12)
    small = {"budget": 1e8, "data.url": data, "train.max_steps": 2}
    axes = {
        name: [small.get(name, axis["from"] if isinstance(axis, dict) else axis[0])]
        for name, axis in {**raw.get("grid", {}), **(raw["zip"][0] if "zip" in raw else {})}.items()
    }
    words = [f"url={tmp_path}/sweep", f"base.data.url={data}", "zip=[]", f"grid={yaml.safe_dump(axes)}"]
    if not {"budget", "train.max_steps"} & axes.keys():
        words += ["settings.train.max_steps=2", *(["settings.train.val_every=1"] if raw.get("objective") else [])]
    assert keel("sweep", "run", path, "--executor", "packed", "--workers", "1", *words) == 0
    assert "1 done" in capsys.readouterr().out

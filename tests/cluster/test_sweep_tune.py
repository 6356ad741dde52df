"""Sweeps on Ray Tune: real trials, a real cluster, drivers that are really killed; and the traps of Tune, each once."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from cluster.sweep.config import load, to_dict
from cluster.sweep.drive import drive as drive_table
from cluster.sweep.expand import expand
from cluster.sweep.results import failed, read_results
from cluster.sweep.suggest import Suggested
from cluster.sweep.sweep import Sweep
from cluster.sweep.table import Row, read_table
from cluster.sweep.tune import Tune, bundles, environment, placement, scheduler
from cluster.sweep.tune_trial import judge
from datamodules.store import Store
from tests.cluster.sweep.conftest import children
from tests.helpers.ray import RayCluster
from tests.helpers.runs import lm_config, tiny_text
from tests.helpers.slurm import wait_until
from trainer.callbacks.pruning import JUDGE, JUDGE_SETTINGS
from trainer.records import decode


class StopAtOnce(FIFOScheduler):
    """Stops every trial at its first result."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return self.STOP


class Counting(Searcher):
    """A searcher whose suggestions never repeat, in this process."""

    count = 0

    def suggest(self, trial_id: str) -> dict[str, Any]:
        type(self).count += 1
        return {"optim.lr": 1e-4 * self.count}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None: ...


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_text(str(tmp_path_factory.mktemp("text") / "text"))


def sweep_of(folder: Path, data: str, **more: Any) -> dict[str, Any]:
    base = lm_config(str(folder / "base"), data, max_steps=8, val_every=2)
    base |= {"diagnostics": {}, "strategy": {"name": "ddp"}, "checkpoint": {"every": 0}}
    return {
        "name": "tiny",
        "url": str(folder / "sweep"),
        "base": base,
        "objective": "val/loss",
        "executor": "ray",
        **more,
    }


def command(folder: Path, config: dict[str, Any], *words: str) -> list[str]:
    (folder / "sweep.yaml").write_text(yaml.safe_dump(config))
    return [sys.executable, "-m", "cluster.cli", "sweep", "run", str(folder / "sweep.yaml"), *words]


def drive(folder: Path, config: dict[str, Any], *words: str) -> str:
    done = subprocess.run(command(folder, config, *words), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(config: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    return {row["axes"]["optim.lr"]: row for row in read_results(Store(config["url"]))}


def test_a_killed_driver_loses_and_repeats_nothing_and_values_may_be_added(
    ray_cluster: RayCluster, data: str, tmp_path: Path
) -> None:
    """Rows of one and of two nodes; one diverges. `Tuner.restore` would leave the added value out without a word."""
    config = sweep_of(tmp_path, data, expiry_s=2.0, settings={"resources.nodes": "${round(1 + (nodes - 1))}"})
    config["zip"] = [{"optim.lr": [1e-3, 2e-3, 1e30], "nodes": [1, 2, 1]}]
    config["base"]["train"]["grad_clip"] = 0
    store = Store(config["url"])
    driver = subprocess.Popen(command(tmp_path, config, "--workers", "1"), stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: store.list("records"), "the first row to end", 200)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    before = {path: store.read(path) for path in store.list("records")}
    done = {row["row"] for data in before.values() for row in decode(data)}
    assert done
    config["zip"] = [{"optim.lr": [1e-3, 2e-3, 1e30, 4e-3], "nodes": [1, 2, 1, 1]}]
    drive(tmp_path, config)
    found = results(config)
    assert {lr: row["status"] for lr, row in found.items()} == {1e-3: "ok", 2e-3: "ok", 1e30: "diverged", 4e-3: "ok"}
    assert all(len(Store(found[lr]["url"]).list("attempts")) == 1 for lr in found if found[lr]["row"] in done)
    lines = [row["row"] for path in store.list("records") for row in decode(store.read(path))]
    assert sorted(lines) == sorted(set(lines)) and len(lines) == 4
    hosts = Store(found[2e-3]["url"]).list("status")
    assert len([path for path in hosts if "node" in path]) >= 2


def test_a_killed_ray_head_loses_and_repeats_nothing(data: str, tmp_path: Path, monkeypatch: Any) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")
    config = sweep_of(tmp_path, data, expiry_s=2.0, grid={"optim.lr": [1e-3, 2e-3]})
    store = Store(config["url"])
    driver = subprocess.Popen(
        command(tmp_path, config, "--workers", "1"), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        wait_until(lambda: store.list("records"), "the first row to end", 200)
        (head,) = [pid for pid in children(driver.pid) if "gcs_server" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(head, signal.SIGKILL)
        said = driver.communicate(timeout=200)[1]
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert driver.returncode != 0, said
    done = {row["row"] for path in store.list("records") for row in decode(store.read(path))}
    assert len(done) == 1
    drive(tmp_path, config, "--workers", "1")
    found = results(config)
    assert {lr: row["status"] for lr, row in found.items()} == {1e-3: "ok", 2e-3: "ok"}
    assert all(len(Store(row["url"]).list("attempts")) == 1 for row in found.values() if row["row"] in done)
    lines = [row["row"] for path in store.list("records") for row in decode(store.read(path))]
    assert sorted(lines) == sorted(set(lines)) and len(lines) == 2


def test_packs_share_the_cells_one_driver_in_each(ray_cluster: RayCluster, data: str, tmp_path: Path) -> None:
    config = sweep_of(tmp_path, data, grid={"optim.lr": [1e-3, 2e-3, 4e-3, 1e30]}, packed={"cells": 1})
    config["base"]["train"]["grad_clip"] = 0
    config["executor"] = "packed"
    drive(tmp_path, config, "--executor", "ray", "--workers", "2")
    found, store = results(config), Store(config["url"])
    assert [row["status"] for row in found.values()] == ["ok", "ok", "ok", "diverged"]
    lines = [row["row"] for path in store.list("records") for row in decode(store.read(path))]
    assert sorted(lines) == sorted(row["row"] for row in found.values())
    claims = [store.read_json(path) for path in store.list("claims")]
    assert len({claim["owner"] for claim in claims if claim.get("rows")}) == 2  # one driver in each pack, and no more


def test_early_stops_one_after_the_other_without_a_dashboard(data: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Where Tune ends a trial of Train from outside, its placement group stays, and the next trial waits for ever."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    config = sweep_of(tmp_path, data, grid={"optim.lr": [1e-3, 2e-3]})
    config["tune"] = {"scheduler": f"{__name__}:StopAtOnce"}
    config["base"]["train"]["max_steps"] = 2000  # which take far longer than a decision
    drive(tmp_path, config, "--workers", "1")
    found = results(config)
    assert [row["status"] for row in found.values()] == ["pruned", "pruned"]
    assert all(2 < row["steps"] < 2000 for row in found.values())  # by themselves, at a validation after the first


def test_a_search_goes_on_where_it_was(ray_cluster: RayCluster, data: str, tmp_path: Path) -> None:
    config = sweep_of(tmp_path, data, random={"samples": 1, "axes": {"optim.lr": {"log_uniform": [1e-4, 1e-1]}}})
    config["tune"] = {"search": "optuna", "search_options": {"seed": 1}}
    drive(tmp_path, config)
    first = results(config)
    assert len(first) == 1 and all(1e-4 <= lr <= 1e-1 for lr in first)
    config["random"]["samples"] = 2
    drive(tmp_path, config)
    assert len(results(config)) == 2 and first.items() <= results(config).items()


def test_what_can_never_fit_is_refused_with_what_there_is(ray_cluster: RayCluster, data: str, tmp_path: Path) -> None:
    config = sweep_of(tmp_path, data, grid={"optim.lr": [1e-3]}, settings={"resources.processes_per_node": 8})
    config["base"]["train"]["global_batch"] = 8
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(command(tmp_path, config), capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "needs 1 nodes with 8 CPU each; the Ray cluster has" in done.stderr
    assert not Store(config["url"]).list("claims")


def test_a_row_asks_for_all_that_it_needs_at_once(data: str, tmp_path: Path) -> None:
    """A driver that holds its own CPU while its workers wait for theirs is how sweeps under Train V2 block each other."""
    config = sweep_of(
        tmp_path, data, grid={"optim.lr": [1e-3]}, settings={"resources.nodes": 2, "resources.processes_per_node": 2}
    )
    table = expand(load(config))
    sweep = Sweep(table)
    needs = bundles(sweep, table.rows[0])
    assert needs == [{"CPU": 2.0}, {"CPU": 2.0}]
    asked = placement({"bundles": needs, "nodes": 2})
    assert (asked.bundles, asked.strategy) == (needs, "STRICT_SPREAD")


def test_rows_of_mixed_sizes_cannot_be_oversubscribed_or_block_each_other(
    data: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """Rows of 1, 2 and 4 CPUs on 4: each asks for one bundle with all of its CPUs, the trial's own process among them, so
    that it holds nothing while it waits; and none is refused but one that could never run."""
    sizes = {"resources.processes_per_node": [1, 2, 4], "seed": [0, 1, 2]}
    config = sweep_of(tmp_path, data, zip=[sizes])
    table = expand(load(config))
    sweep = Sweep(table)
    asked = [placement({"bundles": bundles(sweep, row), "nodes": row.nodes}) for row in table.rows]
    assert [one.bundles for one in asked] == [[{"CPU": 1.0}], [{"CPU": 2.0}], [{"CPU": 4.0}]]
    assert [one.required_resources["CPU"] for one in asked] == [1.0, 2.0, 4.0] and asked[0].strategy == "PACK"
    assert not any(one.head_bundle_is_empty for one in asked)  # or the trial would run where nothing is reserved
    tune = Tune(0)
    monkeypatch.setattr(tune, "_connect", lambda: None)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    tune.check(sweep, table.rows)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}] * 2)
    with pytest.raises(ValueError, match=r"needs 1 nodes with 4 CPU each; the Ray cluster has 2 CPU; 2 CPU"):
        tune.check(sweep, table.rows)


def test_rows_of_mixed_sizes_share_four_cores_and_all_end(data: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Really: whatever is there first, the row of four waits for all of them, and none waits for ever."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    sizes = [2, 4, 1]
    config = sweep_of(tmp_path, data, zip=[{"resources.processes_per_node": sizes, "seed": [0, 1, 2]}])
    config["base"]["train"] |= {"max_steps": 2, "global_batch": 4}
    driver = subprocess.Popen(command(tmp_path, config, "--workers", "4"), stderr=subprocess.PIPE, text=True)
    seen: list[int] = []
    try:
        while driver.poll() is None:
            seen.append(workers(str(tmp_path)))
            time.sleep(0.1)
    finally:
        driver.kill()
    assert driver.returncode == 0, driver.communicate()[1]
    assert [row["status"] for row in read_results(Store(config["url"]))] == ["ok"] * len(sizes)
    assert max(seen) == 4


def workers(folder: str) -> int:
    """Processes that train a run below a folder; what one of them forks, to run something else, looks like it at first."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            said = (process / "cmdline").read_text()
            if "-m\0trainer\0fit" in said and folder in said:
                found[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    return sum(parent not in found for parent in found.values())


def test_a_tuner_over_a_trainer_of_ray_train_cannot_be_asked_for(data: str, tmp_path: Path) -> None:
    """Tune fails at it with "Improper 'run' - not string nor trainable". Trials here are functions; what else takes a class
    of Ray's says which kind it must be."""
    trainer = "ray.train.torch:TorchTrainer"
    grid = {"optim.lr": [1e-3]}
    options = to_dict(load(sweep_of(tmp_path, data, grid=grid, tune={"scheduler": trainer})))
    with pytest.raises(
        ValueError, match=r"tune\.scheduler=ray\.train\.torch:TorchTrainer is no TrialScheduler of Ray Tune"
    ):
        scheduler(options)
    drawn = {"samples": 1, "axes": {"optim.lr": {"choice": [1e-3]}}}
    table = expand(load(sweep_of(tmp_path, data, random=drawn, tune={"search": trainer})))
    with pytest.raises(ValueError, match=r"tune\.search=ray\.train\.torch:TorchTrainer is no Searcher of Ray Tune"):
        Suggested(Sweep(table))
    with pytest.raises(ValueError, match=r"executor=ray\.train\.torch:TorchTrainer: must be one of local, packed, ray"):
        load(sweep_of(tmp_path, data, grid=grid) | {"executor": trainer})


@pytest.mark.parametrize("search", [False, True])
def test_the_stop_section_is_asked_under_ray_too(data: str, tmp_path: Path, monkeypatch: Any, search: bool) -> None:
    """By itself, and by the judge that tells a searcher of each validation."""
    axes = {"grid": {"optim.lr": [1e-3, 2e-3]}}
    if search:
        axes = {"random": {"samples": 2, "axes": {"optim.lr": {"choice": [1e-3]}}}, "tune": {"search": "optuna"}}
    table = expand(load(sweep_of(tmp_path, data, stop={"first": 2, "factor": 2}, grid={"optim.lr": [1e-3, 2e-3]})))
    table.sweep = to_dict(load(sweep_of(tmp_path, data, stop={"first": 2, "factor": 2}, **axes)))
    sweep = Sweep(table)
    found = [environment(sweep, row) for row in table.rows]
    if not search:
        assert all(one[JUDGE] == "cluster.sweep.stopping:halving" for one in found)
        return
    said = []
    for row, one in zip(table.rows, found, strict=True):
        assert one[JUDGE] == "cluster.sweep.tune_trial:judge"
        monkeypatch.setenv(JUDGE_SETTINGS, one[JUDGE_SETTINGS])
        run = Store(table.run_url(row))
        said.append(judge(run, 2, {"val/loss": 1.0 + len(said)}))
        assert run.list("reports")
    assert said[0] is None and said[1] == "val/loss=2 at step 2: 1 of 2 runs were better"


def test_no_judge_where_nobody_asks(data: str, tmp_path: Path) -> None:
    table = expand(load(sweep_of(tmp_path, data, grid={"optim.lr": [1e-3]})))
    assert JUDGE not in environment(Sweep(table), table.rows[0])


def test_two_searches_at_once_lose_no_row_and_make_no_more_than_were_asked_for(data: str, tmp_path: Path) -> None:
    """The second driver suggests between what the first one reads and what it then writes."""
    axes = {"optim.lr": {"log_uniform": [1e-4, 1e-1]}}
    config = sweep_of(
        tmp_path, data, random={"samples": 3, "axes": axes}, tune={"search": f"{__name__}:{Counting.__name__}"}
    )
    store = Store(config["url"])
    expand(load(config)).save(store)
    made: list[Row | None] = []
    with Sweep(read_table(store)) as one, Sweep(read_table(store)) as two:
        first, second = Suggested(one), Suggested(two)
        create = one.store.create

        def interrupted(path: str, content: bytes) -> bool:
            if not made and path.partition("/")[0] in ("added", "tables"):
                made.append(second.next("b0"))
            return create(path, content)

        one.store.create = interrupted  # type: ignore[method-assign]
        made.append(first.next("a0"))
        assert {row.id for row in read_table(store).rows} == {row.id for row in made if row} and len(made) == 2
        made.append(second.next("b1"))
        assert first.next("a1") is None and second.next("b2") is None
        assert [row.id for row in read_table(store).rows] == [row.id for row in made if row]
        assert len(made) == 3 and not first.over
    other = Sweep(expand(load({**config, "base": {**config["base"], "seed": 8}})))
    assert Suggested(other).left == 3  # of another base


@pytest.mark.parametrize("search", [False, True])
def test_a_finished_sweep_starts_no_ray(data: str, tmp_path: Path, monkeypatch: Any, search: bool) -> None:
    axes: dict[str, Any] = {"grid": {"optim.lr": [1e-3]}}
    if search:
        drawn = {"samples": 1, "axes": {"optim.lr": {"choice": [1e-3]}}}
        axes = {"random": drawn, "tune": {"search": f"{__name__}:{Counting.__name__}"}}
    table = expand(load(sweep_of(tmp_path, data, **axes)))
    table.save(Store(table.url))
    started: list[bool] = []
    monkeypatch.setattr(Tune, "_connect", lambda self: started.append(True) or sys.exit("Ray was started"))
    with pytest.raises(SystemExit):
        drive_table(table, "ray")
    if search:
        with Sweep(table) as sweep:
            assert Suggested(sweep).next("a0") is not None
        table = read_table(Store(table.url))
    Sweep(table).results.add([failed(row, "for some reason") for row in table.rows])
    assert drive_table(table, "ray") == 0 and len(started) == 1


def test_bad_schedulers(data: str, tmp_path: Path) -> None:
    def options(**tune: Any) -> dict[str, Any]:
        return to_dict(load(sweep_of(tmp_path, data, grid={"optim.lr": [1e-3]}, tune=tune)))

    with pytest.raises(ValueError, match=r"tune\.scheduler=ahsa: choose one of asha, hyperband, median"):
        scheduler(options(scheduler="ahsa"))
    with pytest.raises(ValueError, match=r"tune\.scheduler_options: .*unexpected keyword argument 'grace'"):
        scheduler(options(scheduler="asha", scheduler_options={"grace": 1}))
    with pytest.raises(ValueError, match=r"no such class"):
        scheduler(options(scheduler="ray.tune.schedulers:Asha"))
    with pytest.raises(ValueError, match=r"scheduler_options have no effect without scheduler"):
        options(scheduler_options={"a": 1})
    assert type(scheduler(options())).__name__ == "FIFOScheduler"
    assert Tune(2).workers == 2

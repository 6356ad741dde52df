"""Losses and gradients that are no numbers, losses that jump: what the policies do, against runs that do it by hand."""

import math
import signal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from datamodules.position import StreamPosition
from datamodules.store import Store
from modules.tasks.base import Task
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import fno_config, tiny_fields
from trainer import config as configs
from trainer.callbacks.guard import NONFINITE, SPIKE, Guard, not_finite
from trainer.checkpoint import committed_steps
from trainer.lifecycle import prepare_new
from trainer.records import read_attempts, read_metrics, read_record, read_trace, write_record
from trainer.run import fit

BATCH, WORLD = 4, 2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: URL} of runs on two ranks, made in one start of the processes."""
    folder = tmp_path_factory.mktemp("recovery")
    data = tiny_fields(str(folder / "fields"), trajectories=16)
    skip, back = "recovery.nonfinite=skip", "recovery.nonfinite=rollback"
    plans: dict[str, tuple[list[str], dict[str, Any]]] = {
        "whole": (["train.max_steps=20", "train.val_every=10"], {}),
        "left_out": ([], {"bad": {5: 1.0}, "no_step": 5}),
        "skip": ([skip], {"bad": {5: math.nan}}),
        "skip_ddp": ([skip, "strategy.name=ddp", "train.micro_batch=1"], {"bad": {5: math.nan}}),
        "left_out_ddp": (["strategy.name=ddp", "train.micro_batch=1"], {"bad": {5: 1.0}, "no_step": 5}),
        "capped": ([skip, "recovery.max_events=1"], {"bad": {3: math.nan, 5: math.nan}}),
        "stop": ([], {"bad": {5: math.nan}}),
        "spike_skip": (["recovery.spike=skip"], {"bad": {12: 50.0}}),
        "spike_left_out": ([], {"bad": {12: 1.0}, "no_step": 12}),
        "lower": (["recovery.spike=lower_rate", "log.every=1"], {"bad": {12: 50.0, 13: 50.0}, "crash": 17}),
        "rollback": ([back], {"bad": {7: math.nan}}),
        "rollback_killed": ([back], {"bad": {7: math.nan}, "crash": 7, "crash_attempt": 2}),
        "rollback_told": ([back], {"bad": {7: math.nan}, "signal": 7}),
    }
    jobs = []
    for name, (overrides, plan) in plans.items():
        config = fno_config(str(folder / name), data, max_steps=12 if name[0] in "srlc" else 20) | {"diagnostics": {}}
        if name.startswith(("spike", "lower")):
            config["train"]["max_steps"] = 20
        config["schedule"] = {"name": "constant"}
        config["checkpoint"], config["log"]["every"] = {"every": 2, "keep_last": 9}, 3
        resources = f"resources.processes_per_node={WORLD}"
        loaded = configs.load(config, ["recovery.window=8", "recovery.threshold=20", resources, *overrides])
        prepare_new(loaded)
        jobs.append((loaded, plan))
    run_distributed(train_all, WORLD, jobs, timeout=300)
    return {name: str(folder / name) for name in plans}


def train_all(jobs: list[Any]) -> None:
    """Worker function."""
    step, advance = Task.training_step, StreamPosition.on_train_batch_end
    for config, plan in jobs:
        bad, attempts = plan.get("bad", {}), 0

        def poisoned(self: Task, batch: Any, index: int, bad: Any = bad, plan: Any = plan) -> Any:
            """On rank 1 the loss of the n-th global batch of the data is multiplied."""
            out = step(self, batch, index)
            number = self.trainer.datamodule.position // BATCH + 1
            if number == plan.get("signal") and self.trainer.global_rank == 1:
                signal.raise_signal(signal.SIGTERM)
            if number in bad and self.trainer.global_rank == 1:
                out["loss"] = out["loss"] * bad[number]
            return out

        def crashes(self: Any, trainer: Any, *rest: Any, plan: Any = plan, config: Any = config) -> None:
            attempt = len(read_attempts(Store(config.url)))
            if trainer.global_step == plan.get("no_step", 0) - 1:  # the update of that step is undone by hand
                self.kept = [tensor.clone() for tensor in changed(trainer)]
            if trainer.global_step == plan.get("no_step"):
                for tensor, kept in zip(changed(trainer), self.kept, strict=True):
                    tensor.copy_(kept)
            advance(self, trainer, *rest)
            if trainer.global_step == plan.get("crash") and attempt == plan.get("crash_attempt", 1):
                raise RuntimeError("crash")

        Task.training_step = poisoned  # type: ignore[method-assign, assignment]
        StreamPosition.on_train_batch_end = crashes  # type: ignore[method-assign]
        try:
            while True:
                try:
                    record = fit(config, resume=attempts > 0)
                    if record["status"] != "preempted":
                        break
                    assert "signal" in plan and attempts == 0, record
                    attempts += 1
                except RuntimeError as error:
                    assert str(error) == "crash" and attempts == 0, error
                    attempts += 1
        finally:
            Task.training_step, StreamPosition.on_train_batch_end = step, advance  # type: ignore[method-assign]
    end_again(jobs[0][0])


def end_again(config: Any) -> None:
    """Worker function: what a run that is done becomes when it is started again, with other records than its own."""
    store = Store(config.url)
    own = read_record(store)
    stale = {
        "none": None,
        "preempted": own | {"status": "preempted", "steps": 10},
        "failed": {"url": config.url, "status": "failed", "error": "the worker was killed by SIGKILL"},
        "shorter": own | {"steps": 10},  # of the end before train.max_steps was raised
        "own": own,
    }
    for name, record in stale.items():
        dist.barrier()
        if dist.get_rank() == 0:
            store.delete("record.jsonl") if record is None else write_record(store, record)
        dist.barrier()
        found = fit(config, resume=True)
        if dist.get_rank() == 0:
            assert read_record(store) == found
            store.write_json(f"again/{name}.json", found)


def changed(trainer: Any) -> list[torch.Tensor]:
    optimizer = trainer.optimizers[0]
    tensors = [p.data for group in optimizer.param_groups for p in group["params"]]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]


def rows(url: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(Store(url)) if "loss" in row]


def losses(url: str) -> list[float]:
    return [row["loss"] for row in rows(url)]


def events(url: str) -> list[tuple[int, str]]:
    return [(row["step"], row["event"]) for row in read_metrics(Store(url)) if "event" in row]


@pytest.mark.parametrize(("run", "by_hand"), [("skip", "left_out"), ("skip_ddp", "left_out_ddp")])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(runs, run, by_hand) -> None:
    found, expected = losses(runs[run]), losses(runs[by_hand])
    assert math.isnan(found[4]) and not math.isnan(expected[4])
    assert found[:4] + found[5:] == expected[:4] + expected[5:]  # bitwise, with two micro-batches per step, too
    assert found[5:] != losses(runs["whole"])[5:12]  # the update matters
    assert events(runs[run]) == [(5, "skipped")]
    record = read_record(Store(runs[run]))
    assert record["status"] == "ok" and record["recovery"] == {"skipped": 1, "lowered_rate": 0, "rollbacks": 0}
    assert math.isfinite(record["loss"])
    assert [row[NONFINITE] for row in rows(runs[run])] == [float(n == 5) for n in range(1, 13)]


def test_by_default_the_run_is_over_and_the_cap_ends_a_run_that_skips(runs) -> None:
    assert events(runs["stop"]) == [(5, "diverged")]
    assert read_record(Store(runs["stop"]))["status"] == "diverged"
    assert committed_steps(Store(runs["stop"]).sub("checkpoints")) == [2, 4]
    assert events(runs["capped"]) == [(3, "skipped"), (5, "diverged")]
    (end,) = (row for row in read_metrics(Store(runs["capped"])) if row.get("event") == "diverged")
    assert end["why"] == "loss nan, after recovery.max_events=1 events"
    assert read_record(Store(runs["capped"]))["diverged_step"] == 5


def test_a_spike_is_skipped(runs) -> None:
    found, expected = losses(runs["spike_skip"]), losses(runs["spike_left_out"])
    assert found[11] > 10 * expected[11]
    assert found[:11] + found[12:] == expected[:11] + expected[12:]
    assert events(runs["spike_skip"]) == [(12, "skipped")]
    assert [row["step"] for row in rows(runs["spike_skip"]) if row[SPIKE]] == [12]


def test_a_spike_lowers_the_rate_once_and_a_resume_keeps_it(runs) -> None:
    url, whole = runs["lower"], runs["whole"]
    assert events(url) == [(12, "lowered_rate")]  # though step 13 was a spike, too
    assert [row["resumed_from"] for row in read_attempts(Store(url))] == [0, 16]
    rates = [[row["lr"] for row in rows(at)] for at in (whole, url)]
    factors = [low / high for low, high in zip(rates[1], rates[0], strict=True)]
    assert factors == pytest.approx([1.0] * 12 + [0.5] * 8)
    assert read_record(Store(url))["recovery"]["lowered_rate"] == 1


def test_a_rollback_leaves_out_the_samples_since_the_commit(runs) -> None:
    url = runs["rollback"]
    first, second = read_attempts(Store(url))
    # Step 7 is bad and found before the save of step 8; batches 7 and 8 are left out.
    assert (first["resumed_from"], second["resumed_from"]) == (0, 6)
    assert second["skip_to"] == 8 * BATCH and second["rollback"] == "loss nan"
    used, whole = samples(url), samples(runs["whole"])
    assert [used[n] for n in range(1, 7)] == [whole[n] for n in range(1, 7)]
    assert [used[n] for n in range(7, 13)] == [whole[n] for n in range(9, 15)]
    assert losses(url)[:6] == losses(runs["whole"])[:6] and np.isfinite(losses(url)).all()
    record = read_record(Store(url))
    assert (record["status"], record["steps"], record["attempts"]) == ("ok", 12, 2)
    assert record["recovery"]["rollbacks"] == 1
    assert record["faults"] == [{"attempt": 2, "resumed_from": 6, "rollback": "loss nan"}]
    assert committed_steps(Store(url).sub("checkpoints")) == [2, 4, 6, 8, 10, 12]


def test_a_kill_before_the_next_commit_does_not_bring_the_samples_back(runs) -> None:
    url = runs["rollback_killed"]
    assert [row["resumed_from"] for row in read_attempts(Store(url))] == [0, 6, 6]
    assert losses(url) == losses(runs["rollback"]) and samples(url) == samples(runs["rollback"])


def test_a_signal_in_the_moment_of_a_rollback_is_not_dropped(runs) -> None:
    url = runs["rollback_told"]
    _, second, third = read_attempts(Store(url))
    # The run goes back, does one step or two, saves, ends; and goes on when it is started again.
    assert second["resumed_from"] == 6 and second["rollback"] == "loss nan"
    assert third["resumed_from"] in (7, 8) and "rollback" not in third
    assert losses(url) == losses(runs["rollback"]) and samples(url) == samples(runs["rollback"])
    assert read_record(Store(url))["status"] == "ok"


@pytest.mark.parametrize("left", ["none", "preempted", "failed", "shorter"])
def test_a_run_killed_before_its_record_ends_well_when_it_is_started_again(runs, left: str) -> None:
    store = Store(runs["whole"])
    own, found = read_record(store), store.read_json(f"again/{left}.json")
    assert "rebuilt" not in own and found.pop("rebuilt") is True
    of_the_process = {"attempt_seconds", "throughput", "recovery"}
    assert found.pop("throughput") == {} and found.keys() == own.keys() - of_the_process
    assert found["metrics"] and found == {name: value for name, value in own.items() if name in found}
    assert store.read_json("again/own.json") == own  # nothing is rebuilt for nothing


def samples(url: str) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in read_trace(Store(url)):
        found.setdefault(row["step"], []).extend(row["index"])
    return found


def _guard(**options: Any) -> tuple[Guard, dict[str, Any]]:
    pushed: dict[str, Any] = {}
    log: Any = SimpleNamespace(push=pushed.update)
    defaults = {"skip_nonfinite": True, "skip_spike": True, "threshold": 10.0, "window": 8}
    return Guard(log, **(defaults | options)), pushed


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
)
def test_a_skipped_step_leaves_nothing_behind(make: Any) -> None:
    """Steps 0 (when the state is made) and 3 are bad; the rest equals a loop that never sees them."""
    made = []
    for guarded in (True, False):
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        optimizer = make(network.parameters())
        guard, pushed = _guard()
        trainer: Any = SimpleNamespace(optimizers=[optimizer], precision_plugin=None)
        if guarded:
            with_group(guard, trainer)
        for number in range(6):
            bad = number in (0, 3)
            if bad and not guarded:
                continue
            loss = network(torch.full((1, 3), float(number + 1))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if bad:
                network.bias.grad[0] = float("inf")  # type: ignore[index]
            if guarded:
                guard.on_before_backward(trainer, None, loss)  # type: ignore[arg-type]
                guard.on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
                assert bool(pushed[NONFINITE]) == bad
            optimizer.step()
        made.append([p.detach().clone() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_step_counts_come_to_where_they_can_be_undone() -> None:
    """The guard found an optimiser whose counts were loaded on the host; `meta` stands in for another device."""
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, foreach=False)
    optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, device="meta")}
    trainer: Any = SimpleNamespace(optimizers=[optimizer], precision_plugin=None)
    with_group(_guard()[0], trainer)
    assert not optimizer.state[parameter]["step"].is_meta  # as the optimiser wants it
    optimizer.param_groups[0]["capturable"] = True
    with_group(_guard()[0], trainer)
    assert optimizer.state[parameter]["step"].is_meta


def with_group(guard: Guard, trainer: Any) -> None:
    torch.distributed.is_initialized() or torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    guard.on_train_start(trainer, None)  # type: ignore[arg-type]


def test_every_value_that_is_no_number_is_found_and_no_large_one() -> None:
    inf, nan = math.inf, math.nan
    bad = [[1, nan], [inf, 1], [-inf, 1], [-inf, inf], [complex(1, nan)], [inf, inf]]
    good = [[3e38, 3e38], [3e38, -3e38], [1 + 2j], []]
    tensors = [torch.tensor(values) for values in (*bad, *good)] + [torch.tensor([nan, 1], dtype=torch.bfloat16)]
    assert float(not_finite(tensors, torch.device("cpu"))) == len(bad) + 1
    assert float(not_finite([], torch.device("cpu"))) == 0


def test_the_judge_is_robust_and_asks_no_device() -> None:
    guard, pushed = _guard(skip_nonfinite=False, skip_spike=False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    trainer: Any = SimpleNamespace(optimizers=[optimizer], precision_plugin=None)
    with_group(guard, trainer)
    noise = np.random.default_rng(0).normal(1.0, 0.05, 200)
    noise[[20, 21, 22, 100]] = [5.0, 7.0, 6.0, 2.5]
    noise[4] = 90.0  # before the window is full nothing is judged
    found = []
    for number, value in enumerate(noise):
        guard.on_before_backward(trainer, None, torch.tensor(value))  # type: ignore[arg-type]
        guard.on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
        if pushed[SPIKE]:
            found.append(number)
    assert found == [20, 21, 22, 100]
    # On the meta device every read of a value raises.
    guard, pushed = _guard()
    parameter = nn.Parameter(torch.zeros(2, device="meta"))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    trainer.optimizers = [optimizer]
    guard.on_train_start(trainer, None)  # type: ignore[arg-type]
    for _ in range(10):
        loss = parameter.square().sum()
        loss.backward()
        guard.on_before_backward(trainer, None, loss)  # type: ignore[arg-type]
        guard.on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
        optimizer.step()
    assert pushed[SPIKE].is_meta

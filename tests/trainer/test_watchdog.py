"""Hangs: who is named, what is left behind, and what is no hang. Replicas that drift apart are named, too."""

import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from datamodules.position import StreamPosition
from datamodules.store import Store
from modules.tasks.base import Task
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import fno_config, tiny_fields
from trainer import config as configs
from trainer.callbacks import parity, watchdog
from trainer.callbacks.watchdog import Watchdog, describe
from trainer.checkpoint import CheckpointError, committed_steps
from trainer.lifecycle import prepare_new
from trainer.records import read_record, start_attempt
from trainer.restarts import EXIT_HANG
from trainer.run import fit


def hang_in_forward(config: configs.RunConfig) -> None:
    """Worker function."""
    step = Task.training_step

    def stuck(self: Task, batch: Any, index: int) -> Any:
        if self.trainer.global_step == 5 and self.trainer.global_rank == 1:
            time.sleep(600)
        return step(self, batch, index)

    Task.training_step = stuck  # type: ignore[method-assign]
    fit(config)


def test_a_hang_names_the_rank_and_the_phase_and_leaves_all_stacks(tmp_path) -> None:
    url = str(tmp_path / "run")
    config = fno_config(url, tiny_fields(str(tmp_path / "fields")), max_steps=20) | {"diagnostics": {}}
    overrides = ["recovery.step_timeout_seconds=1.5", "resources.processes_per_node=2"]
    loaded = configs.load(config, overrides)
    prepare_new(loaded)
    with pytest.raises(RuntimeError, match=f"a rank ended with exit code {EXIT_HANG}"):
        run_distributed(hang_in_forward, 2, loaded)
    record = read_record(Store(url))
    host = os.uname().nodename
    assert f"rank 1 on {host} is in forward of step 6; the others wait in " in record["error"]
    assert f"stacks of 2 of 2 ranks in {url}/hangs/0001" in record["error"] and record["status"] == "failed"
    stuck, waiting = ((tmp_path / "run/hangs/0001" / f"rank-0000{rank}.txt").read_text() for rank in (1, 0))
    assert stuck.startswith(f"rank 1 on {host}") and "in stuck" in stuck
    assert "time.sleep" not in waiting and "torch/distributed" in waiting
    if hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"):  # records gloo, too
        for rank in (0, 1):
            recorded = json.loads((tmp_path / f"run/hangs/0001/rank-0000{rank}-collectives.json").read_text())
            assert {entry["profiling_name"] for entry in recorded["entries"]} & {"gloo:all_reduce", "gloo:barrier"}
    assert committed_steps(Store(url).sub("checkpoints")) == [4]


def test_an_attempt_that_was_replaced_stops_before_it_commits(tmp_path) -> None:
    url = str(tmp_path / "run")
    config = configs.load(fno_config(url, tiny_fields(str(tmp_path / "fields"))))
    prepare_new(config)
    with pytest.raises(RuntimeError, match=r"attempt 2 of the run at .* has started; this one, attempt 1, stops"):
        run_distributed(replaced, 1, config)
    store = Store(url)
    assert committed_steps(store.sub("checkpoints")) == []
    assert not store.exists("record.jsonl"), "the record is that of the attempt that goes on"
    assert not store.exists("status/run.json") or store.read_json("status/run.json")["status"] is None


def replaced(config: configs.RunConfig) -> None:
    """Worker function: another attempt starts while this one trains."""
    advance = StreamPosition.on_train_batch_end

    def rival(self: StreamPosition, trainer: Any, *arguments: Any) -> None:
        advance(self, trainer, *arguments)
        if trainer.global_step == 2:
            start_attempt(Store(config.url), {"resumed_from": 0})
            (watchdog,) = (callback for callback in trainer.callbacks if isinstance(callback, Watchdog))
            with pytest.raises(CheckpointError, match="attempt 2 of the run"):
                watchdog.tell("it hangs")

    StreamPosition.on_train_batch_end = rival  # type: ignore[method-assign]
    fit(config)


# A Python that never gets the interpreter back: a regular expression that runs for ever in C.
STUCK = """
import sys, time, types, re
from trainer.callbacks.watchdog import Watchdog
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
dog = Watchdog(None, 1, init_seconds=-29, step_seconds=0.5)
dog.setup(types.SimpleNamespace(global_step=0), None, "fit")
dog._now = ("forward", 1, 1e9, object())
time.sleep(0.3)
re.match(r"(a+)+$", "a" * 60 + "b")
"""


def test_a_process_whose_interpreter_is_stuck_ends_all_the_same(tmp_path) -> None:
    found = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=60, cwd=os.getcwd())
    assert found.returncode == 1
    assert "Timeout" in found.stderr and "re/__init__.py" in found.stderr


def test_a_flight_recorder_that_fails_is_told(monkeypatch, caplog) -> None:
    def broken() -> bytes:
        raise RuntimeError("no recorder")

    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace_json", broken, raising=False)
    assert list(watchdog._flight_recorder()) == [] and "the last collectives are not told: no recorder" in caplog.text


class Recorded(Watchdog):
    """Notes hangs instead of ending the process."""

    def _hang(self, *args: Any) -> None:
        self.hung = args[:2]
        self._stop.set()


def test_time_in_which_the_process_was_stopped_is_no_hang(tmp_path, monkeypatch) -> None:
    dist.is_initialized() or dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    now = [0.0]
    monkeypatch.setattr("trainer.callbacks.watchdog.time.monotonic", lambda: now[0])
    dog = Recorded(Store(str(tmp_path)), 1, init_seconds=100, step_seconds=10)
    ticks = iter([1.0, 1.0, 3600.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    waits: list[float] = []
    limit = 9

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        now[0] += next(ticks, 0.0)
        return len(waits) > limit or hasattr(dog, "hung")

    dog._stop = SimpleNamespace(wait=wait, set=lambda: None)  # type: ignore[assignment]
    dog._now = ("forward", 3, 10.0, object())
    dog._watch()
    assert not hasattr(dog, "hung")  # 1 + 1 + (2 of 3600) + 6 seconds are not more than 10
    now[0], waits[:], limit = 0.0, [], 12
    ticks = iter([1.0] * 12)
    dog._watch()
    assert dog.hung == ("forward", 3)


class Silent:
    """The store of a process group whose holder stands still: no question is ever answered."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def check(self, *_: Any) -> Any:
        self.asked.set()
        threading.Event().wait()

    set = add = get = check


def test_a_rank_that_holds_the_groups_store_and_stands_still_is_named(tmp_path, monkeypatch) -> None:
    ended, lines, codes = threading.Event(), [], []
    store = Silent()
    monkeypatch.setattr(watchdog, "_shared_store", lambda: store)
    monkeypatch.setattr(watchdog, "_EXCHANGE_S", 0.2)
    monkeypatch.setattr(watchdog.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(watchdog.dist, "get_rank", lambda: 1)

    class Ends(Watchdog):
        def _hang(self, *args: Any) -> None:
            assert store.asked.wait(10), "the other rank was not asked"
            super()._hang(*args)

    def leave(code: int) -> None:
        codes.append(code)
        dog._stop.set()
        ended.set()

    monkeypatch.setattr(watchdog.os, "_exit", leave)
    dog = Ends(Store(str(tmp_path)), 1, init_seconds=0.3, step_seconds=0.3, tell=lines.append)
    dog.setup(SimpleNamespace(global_step=0), None, "fit")  # type: ignore[arg-type]
    try:
        assert ended.wait(30) and codes == [EXIT_HANG]
    finally:
        dog._end()
    assert "rank 0 does not answer; the others are in start-up of step 1" in lines[0]
    assert (tmp_path / "hangs/0001/rank-00001.txt").exists()


def test_each_phase_has_its_limit() -> None:
    dog = Watchdog(None, 1, init_seconds=100, step_seconds=10)  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(global_step=4)
    dog.on_train_start(trainer, None)  # type: ignore[arg-type]
    dog.on_train_batch_start(trainer, None, {}, 0)
    assert dog._now[:3] == ("forward", 5, 100)  # the first step of a resumed run compiles, too
    trainer.global_step = 5
    dog.on_train_batch_end(trainer, None, {}, {}, 0)
    assert dog._now[:3] == ("end of step", 6, 10)
    with dog.saving():
        assert dog._now[:3] == ("save", 6, 100)
    assert dog._now[:3] == ("end of step", 6, 10)
    dog.ready.on_train_batch_end(trainer)
    assert dog._now[:3] == ("data wait", 6, 10)


def test_the_line_names_who_keeps_the_others_waiting() -> None:
    def at(rank: int, phase: str, step: int = 7, seconds: float = 30.0, waits: bool = False) -> dict[str, Any]:
        return {"rank": rank, "host": f"node{rank}", "phase": phase, "step": step, "seconds": seconds, "waits": waits}

    two = describe({0: at(0, "backward"), 1: at(1, "data wait"), 2: at(2, "backward")}, 3, "s3://b/hangs/0001")
    assert two == (
        "no progress for 30 s: rank 1 on node1 is in data wait of step 7; the others wait in backward of step 7; "
        "stacks of 3 of 3 ranks in s3://b/hangs/0001"
    )
    assert "rank 1 does not answer; the others are in backward of step 7" in describe({0: at(0, "backward")}, 2, "x")
    assert "all 2 ranks are in save of step 7" in describe({0: at(0, "save"), 1: at(1, "save")}, 2, "x")
    assert "rank 0 on node0 is in validation of step 7" in describe({0: at(0, "validation")}, 1, "x")
    both = describe({0: at(0, "forward", waits=True), 1: at(1, "forward")}, 2, "x")
    assert "rank 1 on node1 is in forward of step 7; the others wait in forward of step 7" in both
    behind = describe({0: at(0, "forward", 8), 1: at(1, "end of step", 7)}, 2, "x")
    assert "rank 1 on node1 is in end of step of step 7; the others wait in forward of step 8" in behind


def drifted(flip: dict[int, int]) -> list[str]:
    """Worker function: which rank's bit is flipped where, and what the check says of replicas and of shards."""
    rank, said = dist.get_rank(), []
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    whole = torch.randn(8, 3)
    for make in (
        lambda: nn.Linear(3, 8),
        lambda: sharded(whole, mesh, [Replicate(), Shard(0)]),
        lambda: sharded(whole, mesh, [Shard(0), Shard(0)]),
    ):
        torch.manual_seed(1)
        module = make()
        parity.check(module, 3)  # whole
        weight = module.weight.to_local() if isinstance(module.weight, DTensor) else module.weight
        if rank in flip:
            weight.data.view(torch.int32).view(-1)[flip[rank]] ^= 1
        try:
            parity.check(module, 3)
            said.append("")
        except parity.DivergedReplicas as error:
            said.append(str(error))
    return said


def sharded(whole: torch.Tensor, mesh: Any, placements: list[Any]) -> nn.Module:
    from torch.distributed.tensor import distribute_tensor

    module = nn.Module()
    module.weight = nn.Parameter(distribute_tensor(whole, mesh, placements))
    return module


def test_replicas_that_differ_are_named_and_shards_are_not_compared() -> None:
    found = run_distributed(drifted, 4, {2: 1})
    assert all(each == found[0] for each in found)
    host = os.uname().nodename
    full, hybrid, shards = found[0]
    assert full.startswith(f"step 3: rank 2 ({host}) of ranks 0, 1, 2, 3 holds other parameters than its replicas")
    assert hybrid.startswith(f"step 3: ranks 0 ({host}), 2 ({host}), of which none is in the majority, holds")
    assert shards == ""


def test_the_fingerprint_sees_order_and_place() -> None:
    a, b = torch.randn(5), torch.randn(7)
    base = parity.fingerprint([a, b])
    assert base == parity.fingerprint([a.clone(), b.clone()])
    swapped = a.clone()
    swapped[0], swapped[1] = a[1], a[0]
    assert base != parity.fingerprint([swapped, b]) and base != parity.fingerprint([b, a])
    long = torch.randn(parity._AT_ONCE[True] * 2 + 1)  # hashed in pieces: both ends of each count
    base = parity.fingerprint([long])
    for place in (0, parity._AT_ONCE[True] - 1, parity._AT_ONCE[True], len(long) - 1):
        flipped = long.clone()
        flipped.view(torch.int32)[place] ^= 1 << 31
        assert parity.fingerprint([flipped]) != base
    assert parity.fingerprint([torch.zeros(3, dtype=torch.complex64)]) != parity.fingerprint(
        [torch.full((3,), -0.0, dtype=torch.complex64)]
    )

"""What the ranks of a node tell the store, with two ranks in one process and no training."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from datamodules.store import Store, StoreError
from trainer import status
from trainer.callbacks import heartbeat
from trainer.callbacks.heartbeat import Heartbeat, memory
from trainer.callbacks.metrics import MetricsLog
from trainer.callbacks.watchdog import Watchdog
from trainer.records import MetricsWriter

Make = Callable[..., Heartbeat]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(heartbeat.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def made(rank: int, attempt: int = 1, **options: Any) -> Heartbeat:
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        store = Store(f"{tmp_path}/run")
        metrics = MetricsLog(MetricsWriter(store, 1, rank == 0), 1)
        watchdog = Watchdog(store, 1, init_seconds=60, step_seconds=60)
        about = {"name": "x", "attempt": attempt, "max_steps": 9}
        beat = Heartbeat(store, metrics, watchdog, about=about, seconds=30, **options)
        metrics._hand_out(
            [{"step": 1, "loss": 0.5, "time": 1.0, "val/a/b": 1.0, "throughput/mfu": 0.5, "gradients/x": 3.0}]
        )
        metrics.writer.close()
        return beat

    return made


def trainer(step: int, device: str = "cpu") -> Any:
    return SimpleNamespace(global_step=step, strategy=SimpleNamespace(root_device=torch.device(device)))


def steps(beat: Heartbeat, count: int) -> None:
    beat.on_train_start(trainer(0), None)  # type: ignore[arg-type]
    for step in range(1, count + 1):
        beat.on_train_batch_start()
        beat.on_before_backward()
        beat.on_train_batch_end(trainer(step))


def test_each_node_writes_one_object_and_rank_zero_that_of_the_run(make: Make) -> None:
    ranks = [make(rank, committed=lambda: (4, 5.0)) for rank in (1, 0, 3, 2)]
    for beat in ranks:
        steps(beat, 3)
        beat._beat()
    store = ranks[0].store
    assert store.list("status") == ["status/run.json", "status/workers-0.json", "status/workers-1.json"]
    for node in range(2):
        told = store.read_json(f"status/workers-{node}.json")
        assert [rank["rank"] for rank in told["ranks"]] == [2 * node, 2 * node + 1] and told["heartbeat_s"] == 30
        first = told["ranks"][0]
        assert first["step_s"] > first["forward_s"] > 0 and first["memory_peak"] >= first["memory"] > 1 << 20
    run = store.read_json("status/run.json")
    assert (run["step"], run["status"], run["nodes"], run["processes"]) == (3, None, 2, 2)
    assert run["row"] == {"loss": 0.5, "throughput/mfu": 0.5} and run["commit"] == {"step": 4, "time": 5.0}
    # What a rank of an attempt that was killed has left is not taken for news.
    make(0, attempt=2)._beat()
    assert [rank["rank"] for rank in store.read_json("status/workers-0.json")["ranks"]] == [0]


def test_the_thread_goes_on_without_a_store_and_ends_with_a_last_word(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beat = make(0)
    beat.seconds = 0.01
    real, calls = Store.write_json, []

    def write(self: Store, path: str, value: Any) -> None:
        calls.append(path)
        if len(calls) < 5:
            raise StoreError("away")
        real(self, path, value)

    monkeypatch.setattr(Store, "write_json", write)
    beat.setup(None, None, "fit")  # type: ignore[arg-type]
    deadline = time.monotonic() + 30
    while not beat.store.exists(status.RUN):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    beat.seconds = 60  # the next one would come too late
    beat._step = 7
    beat.teardown(None, None, "fit")  # type: ignore[arg-type]
    assert beat.store.read_json(status.RUN)["step"] == 7
    assert caplog.text.count("cannot tell how it fares: away") == 1
    assert not list(tmp_path.glob("keel-heartbeat-*"))


def test_a_request_to_end_is_obeyed_once(make: Make) -> None:
    asked: list[int] = []
    beat = make(0, obey=lambda: asked.append(1))
    beat._beat()
    assert not status.requested(beat.store) and not asked
    beat.store.write_json(status.CANCEL, {})
    beat._beat()
    beat._beat()
    assert status.requested(beat.store) and asked == [1]


def test_how_a_run_ended_is_told_and_keeps_what_was_known(make: Make) -> None:
    beat = make(0)
    beat._beat()
    record = {"name": "x", "status": "ok", "error": None, "steps": 9, "attempts": 3, "loss": float("nan")}
    status.ended(beat.store, record)
    told = beat.store.read_json(status.RUN)
    assert (told["status"], told["step"], told["attempt"], told["loss"], told["max_steps"]) == ("ok", 9, 3, "NaN", 9)
    status.ended(beat.store, {"name": "x", "status": "failed", "error": "no space"})
    assert beat.store.read_json(status.RUN)["reason"] == "no space"


class Event:
    """A CUDA event that is over when the test says so."""

    over = False

    def __init__(self, enable_timing: bool) -> None:
        self.records = 0

    def record(self) -> None:
        self.records += 1

    def query(self) -> bool:
        return Event.over

    def elapsed_time(self, other: Event) -> float:
        assert Event.over and self.records == other.records
        return 250.0


def test_on_a_device_only_events_that_are_over_are_asked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "over", False)
    beat = make(0)
    beat.on_train_start(trainer(0, "cuda"), None)  # type: ignore[arg-type]
    for step in range(1, 11):
        Event.over = step in (5, 9)  # the device is behind the host
        beat.on_train_batch_start()
        beat.on_before_backward()
        beat.on_train_batch_end(trainer(step))
    assert beat._events is not None and beat._events[0].records == 3  # in steps 1, 5 and 9
    assert beat._mine_now(0.0)["forward_s"] == pytest.approx(0.25)


def test_memory_is_that_of_the_process() -> None:
    before = memory()["memory"]
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert memory()["memory"] - before > 48 << 20 and memory()["memory_peak"] >= memory()["memory"] - (1 << 20)

"""Rows survive exactly, in order, through failures; attempts merge into one history."""

from __future__ import annotations

import json
import math
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datamodules.store import NotFound, Store, StoreError
from trainer import records
from trainer.environment import environment
from trainer.records import MetricsWriter, TraceWriter, read_attempts, read_metrics, read_trace, start_attempt


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_floats_survive_bitwise(value: float) -> None:
    line = records.encode({"loss": value})
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    (row,) = records.decode(line)
    if math.isnan(value):
        assert math.isnan(row["loss"])
    else:
        assert struct.pack("d", row["loss"]) == struct.pack("d", value)


def test_rows_hold_numpy_numbers_and_nested_values() -> None:
    row = {"a": np.float32(0.1), "b": {"c": [np.int64(3), -math.inf]}, "d": None, "e": "text", "f": True}
    (read,) = records.decode(records.encode(row))
    assert read == {"a": float(np.float32(0.1)), "b": {"c": [3, -math.inf]}, "d": None, "e": "text", "f": True}
    with pytest.raises(TypeError, match="cannot hold"):
        records.encode({"a": object()})


def test_flush_writes_what_was_appended_and_readers_see_it_in_order(store: Store) -> None:
    writer = MetricsWriter(store, 1, flush_seconds=1000)
    for step in (1, 2):
        writer.append({"step": step, "loss": step / 3})
    assert read_metrics(store) == []
    writer.flush()
    assert read_metrics(store) == [{"step": s, "attempt": 1, "loss": s / 3} for s in (1, 2)]
    writer.extend({"step": step, "loss": 0.0} for step in (3, 4))
    writer.close()
    writer.close()
    assert [row["step"] for row in read_metrics(store)] == [1, 2, 3, 4]
    assert store.list("metrics") == ["metrics/0001-000000.jsonl", "metrics/0001-000001.jsonl"]
    with pytest.raises(RuntimeError, match="closed"):
        writer.append({"step": 5})


def test_rows_leave_by_themselves_after_flush_seconds(store: Store) -> None:
    written = threading.Event()

    class Watched(Store):
        def write(self, path: str, data: Any) -> None:
            super().write(path, data)
            written.set()

    writer = MetricsWriter(Watched(store.url), 1, flush_seconds=0.05)
    writer.append({"step": 1})
    assert written.wait(10)
    assert read_metrics(store) == [{"step": 1, "attempt": 1}]
    writer.close()


def test_other_ranks_write_nothing(store: Store) -> None:
    writer = MetricsWriter(store, 1, rank0=False)
    writer.append({"step": 1})
    writer.flush()
    writer.close()
    assert store.list("metrics") == []


class Faulty(Store):
    failures = 1

    def write(self, path: str, data: Any) -> None:
        if self.failures:
            self.failures -= 1
            raise StoreError("no room")
        super().write(path, data)


def test_a_failed_upload_surfaces_once_and_loses_no_row(store: Store) -> None:
    writer = MetricsWriter(Faulty(store.url), 1, flush_seconds=1000)
    writer.append({"step": 1})
    with pytest.raises(StoreError, match="no room"):
        writer.flush()
    writer.append({"step": 2})
    writer.close()
    assert [row["step"] for row in read_metrics(store)] == [1, 2]
    assert store.list("metrics") == ["metrics/0001-000000.jsonl"]


def test_a_failure_in_the_background_surfaces_at_the_next_call(store: Store) -> None:
    faulty = Faulty(store.url)
    faulty.failures = 1000
    writer = MetricsWriter(faulty, 1, flush_seconds=1000)
    writer.append({"step": 1})
    writer.flush(wait=False)
    for _ in range(1000):  # the thread has failed as soon as it has tried
        if faulty.failures < 1000:
            break
        threading.Event().wait(0.01)
    with pytest.raises(StoreError, match="no room"):
        for _ in range(1000):
            writer.append({"step": 2})
            threading.Event().wait(0.01)
    with pytest.raises(StoreError, match="no room"):
        writer.close()


def test_a_waiting_flush_sends_again_what_an_earlier_upload_could_not(store: Store) -> None:
    faulty = Faulty(store.url)
    writer = MetricsWriter(faulty, 1, flush_seconds=0.01)
    writer.append({"step": 1})
    for _ in range(1000):  # by itself: `flush_seconds` are over
        if not faulty.failures:
            break
        threading.Event().wait(0.01)
    writer.flush()
    assert [row["step"] for row in read_metrics(store)] == [1]
    writer.close()


def test_a_waiting_flush_is_not_failed_by_an_upload_that_had_begun(store: Store) -> None:
    began, go = threading.Event(), threading.Event()

    class Slow(Faulty):
        def write(self, path: str, data: Any) -> None:
            if not began.is_set():
                began.set()
                assert go.wait(60)
            super().write(path, data)

    writer = MetricsWriter(Slow(store.url), 1, flush_seconds=0.01)
    writer.append({"step": 1})
    assert began.wait(60)
    waiting = threading.Timer(0.2, go.set)  # the upload fails while the flush waits
    waiting.start()
    writer.flush()
    assert [row["step"] for row in read_metrics(store)] == [1]
    writer.close()


def _attempt(store: Store, resumed_from: int, steps: range) -> int:
    attempt = start_attempt(store, {"resumed_from": resumed_from, "host": "h"})
    with_trace = TraceWriter(store, attempt, rank=0, flush_seconds=1000)
    writer = MetricsWriter(store, attempt, flush_seconds=1000)
    for step in steps:
        writer.append({"step": step, "loss": float(attempt)})
        with_trace.append(step, [step * 10, attempt])
    writer.close()
    with_trace.close()
    return attempt


def test_a_later_attempt_replaces_what_came_after_its_checkpoint(store: Store) -> None:
    assert _attempt(store, 0, range(1, 8)) == 1
    assert _attempt(store, 4, range(5, 9)) == 2
    assert _attempt(store, 4, range(5, 5)) == 3  # died at once: the run stands at step 4 again
    assert [(row["step"], row["attempt"]) for row in read_metrics(store)] == [(s, 1) for s in (1, 2, 3, 4)]
    assert _attempt(store, 2, range(3, 5)) == 4
    expected = [(1, 1), (2, 1), (3, 4), (4, 4)]
    assert [(row["step"], row["attempt"]) for row in read_metrics(store)] == expected
    assert [(row["step"], row["index"][1]) for row in read_trace(store)] == expected
    assert [(row["attempt"], row["resumed_from"], row["host"]) for row in read_attempts(store)] == [
        (1, 0, "h"),
        (2, 4, "h"),
        (3, 4, "h"),
        (4, 2, "h"),
    ]


def test_traces_of_ranks_merge_by_step_and_rank(store: Store) -> None:
    for rank in (1, 0):
        writer = TraceWriter(store, 1, rank)
        for step in (1, 2):
            writer.append(step, [step * 10 + rank])
        writer.close()
    assert [(row["step"], row["rank"], row["index"]) for row in read_trace(store)] == [
        (1, 0, [10]),
        (1, 1, [11]),
        (2, 0, [20]),
        (2, 1, [21]),
    ]


def test_two_starters_never_share_an_attempt(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        attempts = list(pool.map(lambda n: start_attempt(store, {"n": n}), range(8)))
    assert sorted(attempts) == list(range(1, 9))
    assert records.next_attempt(store) == 9


def test_next_attempt_counts_what_left_only_rows(store: Store) -> None:
    assert records.next_attempt(store) == 1
    writer = MetricsWriter(store, 12)
    writer.append({"step": 1})
    writer.close()
    assert records.next_attempt(store) == 13 and records.newest_attempt(store) == 0
    assert start_attempt(store, {}) == records.newest_attempt(store) == 13


def test_record(store: Store) -> None:
    with pytest.raises(NotFound):
        records.read_record(store)
    records.write_record(store, {"status": "diverged", "loss": math.inf})
    assert records.read_record(store) == {"status": "diverged", "loss": math.inf}
    assert store.read("record.jsonl").count(b"\n") == 1


def test_environment_fits_into_an_attempt(store: Store) -> None:
    start_attempt(store, environment())
    (attempt,) = read_attempts(store)
    assert attempt["python"].startswith("3.") and attempt["world_size"] >= 1 and attempt["cpus"] >= 1
    assert attempt["keel"] and attempt["torch"] and attempt["lightning"] and attempt["host"]
    assert attempt["revision"] is None or len(attempt["revision"]) >= 40

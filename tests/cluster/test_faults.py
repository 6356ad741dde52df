"""Real kills, stops and signals of real workers: the launcher starts them again, and the result is what it would have been."""

import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.store import Store
from scripts.bench import faults as bench
from tests.helpers.runs import tiny_fields
from trainer.checkpoint import committed_steps
from trainer.records import read_record

KILLS = [("sigkill", 7, 1), ("sigkill_in_save", 13, 0), ("sigstop", 22, 1), ("bit_flip", 26, 0), ("sigusr1", 33, 1)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """Rows of a run on two processes with all of `KILLS`, and where it lies."""
    folder = tmp_path_factory.mktemp("faults")
    data = {"fno": tiny_fields(str(folder / "fields"), trajectories=16)}
    faults = [{"id": f"f{i}", "kind": kind, "step": step, "rank": rank} for i, (kind, step, rank) in enumerate(KILLS)]
    case = {"number": 0, "model": "fno", "world": 2, "strategy": "ddp", "numeric": False, "policy": "skip"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STEPS", 40)
        patch.setenv("KEEP", "1")
        rows = bench.carry_out(case | {"faults": faults}, data, folder)
    return rows, folder / "case-0000"


def test_no_fault_ends_the_run_or_changes_its_result(found: tuple[list[dict[str, Any]], Path]) -> None:
    rows, place = found
    log = (place / "log.txt").read_text()
    assert [row["kind"] for row in rows] == [kind for kind, _, _ in KILLS], log
    assert all(row["survived"] and row["equal"] for row in rows), log  # bitwise, all 40 losses
    assert all(row["steps_lost"] <= bench.EVERY for row in rows)


def test_the_record_tells_what_happened(found: tuple[list[dict[str, Any]], Path]) -> None:
    _, place = found
    store = Store(str(place / "run"))
    record = read_record(store)
    assert record["status"] == "ok" and record["retries"] == len(KILLS)
    causes = [fault["cause"] for fault in record["faults"]]  # the preempted one was started by the queue, not again
    assert causes[0] == "rank 1 was killed by SIGKILL" and causes[1] == "rank 0 was killed by SIGKILL"
    assert causes[2].endswith("hung") and causes[3].endswith("failed with exit code 1") and len(causes) == 4
    log = (place / "log.txt").read_text()
    assert "rank 1 does not answer; the others" in log
    assert "holds other parameters than its replicas" in log
    assert committed_steps(store.sub("checkpoints"))[-1] == 40
    assert len(list((place / "run/hangs").iterdir())) == 1
    assert len(json.loads((place / "plan.json").read_text())) == len(KILLS)

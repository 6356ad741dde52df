"""Real kills, stops, signals and outages of real workers: the launcher starts them again, and the result is what it would
have been."""

import dataclasses
from typing import Any

import pytest

from datamodules.store import Store
from scripts.bench import faults as bench
from scripts.services import s3
from tests.helpers.runs import tiny_fields
from trainer.checkpoint import committed_steps
from trainer.records import read_attempts, read_record

STEPS = 60
# (kind, step, rank, phase): of two ranks, on a store that goes away. Nothing strikes in the two intervals after that.
HITS = [
    ("sigterm", 1, 1, "start"),
    ("sigkill", 7, 1, "run"),
    ("sigkill_in_save", 13, 0, "run"),
    ("sigstop", 18, 1, "run"),
    ("bit_flip", 23, 0, "run"),
    ("store_gone", 27, 0, "run"),
    ("sigusr1", 47, 1, "run"),
    ("sigkill_tree", 52, 0, "run"),
    ("sigkill_at_end", STEPS, 0, "run"),
]


@dataclasses.dataclass
class Found:
    """What a run left: a row per fault, and what the store and the processes said."""

    rows: list[dict[str, Any]]
    record: dict[str, Any]
    attempts: list[dict[str, Any]]
    committed: list[int]
    hangs: list[str]
    log: str


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A run on two processes with all of `HITS`."""
    folder = tmp_path_factory.mktemp("faults")
    data = {"fno": tiny_fields(str(folder / "fields"), trajectories=16)}
    names = ("kind", "step", "rank", "phase")
    faults = [{"id": f"f{i}", "delay": 0.0, **dict(zip(names, hit, strict=True))} for i, hit in enumerate(HITS)]
    case = {**bench.plan(1, [1, 2]), "number": 0, "background": False, "forked": True, "faults": faults}
    assert (case["model"], case["world"], case["strategy"], case["store"]) == ("fno", 2, "ddp", "s3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "STEPS", STEPS)
        patch.setenv("KEEP", "1")
        for name, value in s3.up(folder / "s3").items():
            patch.setenv(name, value)
        try:
            rows = bench.carry_out(case, data, folder)
            (url,) = {row["url"] for row in rows}
            store = Store(url)
            return Found(
                rows,
                read_record(store),
                read_attempts(store),
                committed_steps(store.sub("checkpoints")),
                store.list("hangs"),
                (folder / "case-0000/log.txt").read_text(),
            )
        finally:
            s3.down(folder / "s3")


def test_no_fault_ends_the_run_or_changes_its_result(found: Found) -> None:
    assert [row["kind"] for row in found.rows] == [kind for kind, *_ in HITS], found.log
    assert all(row["survived"] and row["equal"] for row in found.rows), found.log  # bitwise, all losses
    assert all(row["steps_lost"] <= bench.EVERY for row in found.rows), found.rows
    assert [row["restarted"] for row in found.rows[:-1]] == [True] * (len(HITS) - 1), found.rows
    assert found.committed[-1] == STEPS


def test_the_record_tells_what_happened(found: Found) -> None:
    assert found.record["status"] == "ok" and found.record["rebuilt"], (
        found.log
    )  # the last process was killed before it
    causes = [fault["cause"] for fault in found.record["faults"]]  # what a queue started again is not among them
    killed = [cause for cause in causes if cause.endswith("was killed by SIGKILL")]
    assert killed[:2] == ["rank 1 was killed by SIGKILL", "rank 0 was killed by SIGKILL"], found.log
    assert any(cause.endswith("could not reach its store") for cause in causes), found.log
    assert any(cause.endswith("hung") for cause in causes), found.log
    assert any(cause.endswith("failed with exit code 1") for cause in causes), found.log
    assert "rank 1 does not answer; the others" in found.log
    assert "holds other parameters than its replicas" in found.log
    assert len(found.hangs) >= 1

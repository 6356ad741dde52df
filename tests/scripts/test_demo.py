"""What the demo claims about traces and killed processes must be able to come out false."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from datamodules.store import Store
from trainer.records import MetricsWriter, TraceWriter, start_attempt

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keel_demo", ROOT / "scripts/demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["keel_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_of(url: Path, batches: dict[int, list[int]], losses: dict[int, float]) -> str:
    """A run of one attempt on two ranks, with this trace and these losses."""
    store = Store(str(url))
    start_attempt(store, {})
    for rank in range(2):
        trace = TraceWriter(store, 1, rank)
        for step, batch in batches.items():
            trace.append(step, batch[rank * len(batch) // 2 : (rank + 1) * len(batch) // 2])
        trace.close()
    metrics = MetricsWriter(store, 1)
    metrics.extend({"step": step, "loss": loss} for step, loss in losses.items())
    metrics.close()
    return store.url


BATCHES = {1: [5, 3, 1, 0], 2: [2, 4, 7, 6], 3: [9, 8, 5, 1]}
LOSSES = {1: 1.0, 2: 0.5, 3: 0.25}


@pytest.mark.parametrize(
    ("batches", "losses", "broken"),
    [
        (BATCHES, LOSSES, set()),
        (BATCHES, {**LOSSES, 3: 0.25 * (1 + 1e-6)}, set()),
        ({**BATCHES, 3: [9, 8, 5, 5]}, LOSSES, {0}),
        ({**BATCHES, 3: [8, 9, 5, 1]}, LOSSES, {0}),
        ({1: BATCHES[1], 2: BATCHES[2]}, LOSSES, {0}),
        (BATCHES, {**LOSSES, 2: 0.5 + 1e-15}, {1}),
        (BATCHES, {**LOSSES, 3: 0.2501}, {2}),
        (BATCHES, {**LOSSES, 3: 0.3}, {2, 3}),
        (BATCHES, {1: 1.0, 2: 0.5}, {2}),
    ],
)
def test_compare_finds_every_difference(
    demo: ModuleType, tmp_path: Path, batches: dict[int, list[int]], losses: dict[int, float], broken: set[int]
) -> None:
    found = demo.Demo(str(tmp_path), {})
    reference = run_of(tmp_path / "reference", BATCHES, LOSSES)
    demo.compare(found, run_of(tmp_path / "run", batches, losses), reference, resumed_from=2)
    assert {i for i, (*_, kept) in enumerate(found.findings) if not kept} == broken
    assert demo.conclude(found) == bool(broken)


def test_kill_tree_leaves_nobody(demo: ModuleType) -> None:
    child = "import subprocess, sys, time; subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", child])
    deadline = time.monotonic() + 20
    while not (below := demo.descendants(parent.pid)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert demo.kill_tree(parent) == 2
    assert not any(demo.alive(pid) for pid in [parent.pid, *below])

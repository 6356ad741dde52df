"""`make` in several processes: they are several, work at the same time, and change no byte."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules import registry
from datamodules.make import MakeConfig, make
from datamodules.simulators.integrators import rk4
from datamodules.simulators.skew_product import STEPS, SkewProduct, System
from datamodules.simulators.wave_1d import Wave1D

MEETING = "KEEL_TEST_MEETING"  # folder where the processes that compute meet
PATIENCE_S = 60.0


def meet() -> None:
    """Say that this process computes a shard, and go on when a second one does so, too; where there is a place to meet."""
    if MEETING not in os.environ:
        return
    folder = Path(os.environ[MEETING])
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + PATIENCE_S
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("no second process came while this one computed a shard")
        time.sleep(0.005)


class MeetingWave(Wave1D):
    def values(self, name: str, k: int) -> np.ndarray:
        meet()
        return super().values(name, k)


class MeetingSkewProduct(SkewProduct):
    """Takes systems by their last number, some are refused, in place of a search for chaotic ones, which takes seconds."""

    def values(self, name: str, k: int) -> np.ndarray:
        meet()
        return super().values(name, k)

    def _references(self, systems: list[System]) -> list[np.ndarray | None]:
        start = torch.from_numpy(np.stack([system.start for system in systems]))
        series = rk4(self.rhs(systems), start, 1 / STEPS, 0, 1, STEPS).numpy()
        return [
            x if system.row[-1] > 1.1 * self.config.strength else None
            for x, system in zip(series, systems, strict=True)
        ]


SMALL = {"train": 2, "validation": 1, "test": 1, "batch": 1, "frames": 3}
CASES: dict[str, tuple[type, dict[str, Any]]] = {
    "wave_1d": (MeetingWave, {"resolution": 16, "dt": 0.125, "modes": 2}),  # a static field: the speed
    "skew_product": (MeetingSkewProduct, {"per_system": 1, "tries": 1}),  # parameters that a process remembers
}


def tree(url: str) -> dict[str, bytes]:
    return {str(path.relative_to(url)): path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_work_at_the_same_time_and_change_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    meeting, (cls, config) = tmp_path / "meeting", CASES[name]
    meeting.mkdir()
    generator = {"name": name, **SMALL, **config}
    monkeypatch.setitem(registry.GENERATORS, name, f"{__name__}:{cls.__name__}")
    here = make(MakeConfig(str(tmp_path / "here"), generator, shard_bytes=1))
    monkeypatch.setenv(MEETING, str(meeting))
    there = make(MakeConfig(str(tmp_path / "there"), generator, shard_bytes=1, workers=2))
    processes = {int(path.name) for path in meeting.iterdir()}
    assert len(processes) == 2 and os.getpid() not in processes
    assert tree(there) == tree(here)
    assert len([path for path in tree(here) if path.startswith("fields/c/")]) == 4

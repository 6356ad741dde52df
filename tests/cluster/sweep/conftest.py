"""Sweeps of tiny transformers, and drivers of them as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.runs import lm_config, tiny_text

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_text(str(tmp_path_factory.mktemp("sweep-text")))


@pytest.fixture
def base(text: str) -> dict[str, Any]:
    """A run's config of which a step takes milliseconds."""
    raw = lm_config("unused", text, max_steps=8)
    raw |= {"strategy": {"name": "ddp"}, "diagnostics": {}, "checkpoint": {"every": 50}}
    raw["model"] = {"name": "transformer", "width": 8, "depth": 1, "heads": 1, "max_seq_len": 16}
    raw["task"] = {"name": "next_token", "seq_len": 16}
    raw["log"] = {"every": 4, "flush_seconds": 0.2, "progress": False}
    return raw


@pytest.fixture
def sweep(base: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A sweep's config but for its axes."""
    return {"name": "tiny", "url": str(tmp_path / "sweep"), "base": base}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts `python -m ...` as a process; none is left when the test ends."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    begun: list[subprocess.Popen[str]] = []

    def begin(*words: object) -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [sys.executable, "-m", *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )
        return begun[-1]

    yield begin
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found.append(int(folder.name))
    return found

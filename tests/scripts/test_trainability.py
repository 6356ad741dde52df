"""The trainability page: what it counts, what it draws, and that picture, table and page are of one sweep."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trainability", ROOT / "scripts" / "experiments" / "trainability.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_outcomes_and_their_boundary(script: ModuleType) -> None:
    of = [("ok", 3.0), ("ok", 5.54), ("ok", 90.0), ("ok", 5.7), ("diverged", float("nan"))]
    found = [script.kind({"status": status, "loss": loss}) for status, loss in of]
    assert found == ["trained", "learned nothing", "exploded", "exploded", "not a number"]
    half = np.zeros((16, 16), dtype=bool)
    half[:8] = True  # a straight line: it has the dimension 1
    edge = script.boundary(half)
    assert edge.sum() == 16 and edge[7].all()
    assert [script.boxes(edge, side) for side in (1, 2, 4, 8)] == [16, 8, 4, 2]
    assert not script.boundary(np.ones((4, 4), dtype=bool)).any()


def test_the_picture_is_drawn(script: ModuleType, tmp_path: Path) -> None:
    axis = list(np.geomspace(1e-2, 1e1, 8))
    kinds = np.arange(64).reshape(8, 8) % 4
    script.draw(axis, axis, np.linspace(2, 6, 64).reshape(8, 8), kinds, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_the_page_counts_what_the_table_holds(script: ModuleType) -> None:
    with open(RESULTS / "trainability.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len({row["row"] for row in rows}) == 64 * 64
    page = (RESULTS / "trainability.md").read_text()
    counts = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|", page, flags=re.MULTILINE))
    assert Counter(row["outcome"] for row in rows) == {name: int(count) for name, count in counts.items() if int(count)}
    assert (RESULTS / "trainability.png").exists()

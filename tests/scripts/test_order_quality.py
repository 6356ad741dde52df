"""The order in use shuffles as well as random draws from its window, and nearly as well as a full shuffle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("order_quality", ROOT / "scripts" / "order_quality.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_usual_window_beside_a_full_shuffle(script: ModuleType) -> None:
    sizes = (script.SHARDS, script.GROUP, script.BATCH, script.EPOCHS)
    found = script.quality(script.windowed(script.USUAL), *sizes)
    full = script.quality(script.shuffled, *sizes)
    ideal = script.expected(script.SHARDS, script.USUAL, script.BATCH)
    assert found["moved"] == pytest.approx(full["moved"], rel=0.03) == pytest.approx(ideal["moved"], rel=0.03)
    assert found["noise"] == pytest.approx(full["noise"], rel=0.03)
    assert found["same"] == pytest.approx(ideal["same"], rel=0.03)
    assert found["shards"] == pytest.approx(ideal["shards"], rel=0.01) and found["shards"] > 15.7
    # 128 windows: the scatter of their means is known to 6 percent.
    assert found["sorted"] == pytest.approx(ideal["sorted"], rel=0.15) and found["sorted"] < 2.5 * full["sorted"]


def test_the_page_is_what_the_script_writes(script: ModuleType) -> None:
    """If this fails: python scripts/order_quality.py"""
    assert script.PAGE.read_text() == script.page()


def test_a_bad_order_is_told(script: ModuleType) -> None:
    import numpy as np

    found = script.quality(lambda e: np.arange(64 * 32), 64, 32, 16, 1)
    assert found["moved"] == 0 and found["shards"] == 1 and found["same"] > 0.9 and found["sorted"] > 3.9

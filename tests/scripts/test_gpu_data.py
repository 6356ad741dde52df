"""The GPU check of simulators and batches, as far as a machine without a GPU can run it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def gpu_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, its children in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.syspath_prepend(str(SCRIPTS / "bench"))
    import gpu_data

    ways = {"simulator": gpu_data.simulate, "stream": gpu_data.stream}
    monkeypatch.setattr(gpu_data, "child", lambda what, *words: ways[what](*words))
    return gpu_data


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu_data.py", *words])
    return int(module.main())


def test_without_a_gpu_it_says_so(gpu_data: Any, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    assert run(gpu_data, monkeypatch) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["wave_1d", "tokens, documents", "mixture"])
def test_it_compares_with_the_cpu(gpu_data: Any, monkeypatch: pytest.MonkeyPatch, capsys, case: str) -> None:
    assert run(gpu_data, monkeypatch, "--tiny", "--only", case) == 0
    assert f"{case}: ok" in capsys.readouterr().out


def test_every_equation_that_a_gpu_can_solve_is_tried(gpu_data: Any) -> None:
    configs = {path.stem for path in (SCRIPTS.parent / "configs/data").glob("*.yaml")}
    assert configs - set(gpu_data.simulators()) == {"stdlib_text", "text_files", "dysts"}


def test_what_is_wrong_is_told(gpu_data: Any, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    well = {"name": "wave_1d", "second": 1e-12, "same": True}
    assert gpu_data.wrong(well) == ""
    assert gpu_data.wrong({**well, "second": 1e-3}) == "far from the CPU"
    assert gpu_data.wrong({**well, "second": 1e-3, "name": "skew_product"}) == ""
    assert gpu_data.wrong({**well, "same": False}) == "twice not the same"
    batches = {"digests": ["a"], "expected": ["a"], "loose": []}
    assert gpu_data.wrong(batches) == ""
    assert gpu_data.wrong({**batches, "loose": ["index"]}) == "not pinned: index"
    assert gpu_data.wrong({**batches, "expected": ["b"]}) == "other values"
    monkeypatch.setattr(gpu_data, "child", lambda *words: {"error": "out of luck"})
    assert run(gpu_data, monkeypatch, "--tiny", "--only", "wave_1d") == 1
    assert "out of luck" in capsys.readouterr().out

"""Tests that are left out for want of other people's tables are named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest
from tests.cluster.laws import reference


def summary(*asked: str) -> list[str]:
    lines: list[str] = []
    reporter: Any = SimpleNamespace(write_line=lambda text, **_: lines.append(text))
    conftest.pytest_terminal_summary(reporter, SimpleNamespace(args=list(asked)))  # type: ignore[arg-type]
    return lines


def test_what_is_not_run_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "nowhere")
    tests = reference.TESTS.parents[2]
    for asked in (str(tests), f"{reference.TESTS}::test_epoch", str(tests.parent)):
        (line,) = summary(asked)
        assert line.startswith("not run: tests/cluster/laws/test_reference.py") and "nowhere" in line
    assert not summary(str(tests / "modules"), str(reference.TESTS.with_name("test_plan.py")))
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    assert not summary(str(tests))

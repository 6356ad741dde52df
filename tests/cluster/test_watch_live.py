"""keel ls --watch and keel top: tables that go on while the store changes, and while it is away."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cluster import cli
from cluster.commands import watch
from datamodules.store import Store, StoreError
from tests.cluster.test_watch import ended, node, put, run


@pytest.mark.parametrize("command", [["ls", "{}", "--watch"], ["top", "{}/a"]])
def test_a_table_goes_on_while_the_store_changes_or_is_away(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = Store(str(tmp_path)), io.StringIO()
    put(root, "a", run(), node())
    frames: list[str] = []

    def ends() -> None:
        put(root, "a", run(1, status="ok"), ended(0))

    def goes() -> None:
        def children(*_: Any) -> Any:
            raise StoreError("the store is away")

        away.setattr(Store, "children", children)

    def comes_back() -> None:
        away.undo()
        put(root, "a", run(1, status="diverged"), ended(0))

    def interrupt() -> None:
        raise KeyboardInterrupt

    happens = [ends, goes, comes_back, interrupt]

    def sleep(seconds: float) -> None:
        assert seconds == 0.25
        frames.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()))
        out.truncate(0)
        happens.pop(0)()

    terminal = Console(file=out, force_terminal=True, width=120, highlight=False, color_system=None)
    monkeypatch.setattr("cluster.watch.show.console", lambda: terminal)
    monkeypatch.setattr(watch, "time", SimpleNamespace(sleep=sleep))
    with pytest.MonkeyPatch.context() as away:
        assert cli.main([word.format(tmp_path) for word in command] + ["--every", "0.25"]) == 0
    shown = [sorted(set(re.findall(r"running|done|diverged|the store is away", frame))) for frame in frames]
    assert shown == [["running"], ["done"], ["done", "the store is away"], ["diverged"]]

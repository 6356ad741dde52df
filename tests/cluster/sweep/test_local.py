"""Admission on this machine: rows of several sizes share the cores, never more than there are, and none waits for ever."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.sweep.executor import open_executor
from cluster.sweep.local import Local, _Running
from cluster.sweep.table import Row


def row(name: str, processes: int = 1, threads: int = 1, **values: Any) -> Row:
    return Row(name, {"x": name}, {"resources.accelerator": "cpu", **values}, 1, 1, 1, 1.0, 1, processes, threads)


class FakeSweep(SimpleNamespace):
    """What an executor asks of a sweep; rows named `taken` belong to somebody else."""

    def __init__(self) -> None:
        start = SimpleNamespace(resources=SimpleNamespace(accelerator="cpu"))
        super().__init__(over=False, ended=[], table=SimpleNamespace(start=start))

    def claim(self, rows: list[Row]) -> list[Row]:
        return [row for row in rows if not row.id.startswith("taken")]

    def end(self, row: Row, code: int, said: str) -> dict[str, Any]:
        self.ended.append((row.id, code, said))
        return {}


def test_rows_of_several_sizes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("a", 1), row("b", 2), row("c", 2, 2), row("taken"), row("d", 1), row("e", 3), row("f", 4), row("g", 1)]
    local, sweep = Local(4), FakeSweep()
    busy: list[int] = []

    def node(_: Any, row: Row, devices: list[int]) -> _Running:
        busy.append(row.cpus + sum(running.row.cpus for running in local._running))
        code = "import sys, time; time.sleep(0.1); print('the end'); sys.exit(3 * (sys.argv[1] == 'd'))"
        log = tempfile.TemporaryFile()  # noqa: SIM115
        return _Running(row, subprocess.Popen([sys.executable, "-c", code, row.id], stdout=log), log, devices)

    monkeypatch.setattr(local, "_node", node)
    local.run(sweep, rows)  # type: ignore[arg-type]
    assert sorted(sweep.ended) == [(r, 3 * (r == "d"), "the end" if r == "d" else "") for r in "abcdefg"]
    assert max(busy) <= 4 and len(busy) == 7 and max(busy) > 1


def test_what_can_never_fit_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match=r"row b \(x=b\) needs 6 cores, and this machine has 4"):
        Local(4).check(FakeSweep(), [row("a"), row("b", 2, 3)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="executor=moon: unknown; one of local, packed"):
        open_executor("moon")
    with pytest.raises(ValueError, match="workers=-1"):
        open_executor("local", -1)


def test_devices_are_given_out_one_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    cuda = {"resources.accelerator": "cuda"}
    local, sweep = Local(1), FakeSweep()
    first = row("a", 2, **cuda)
    assert local._room(sweep, first) == [0, 1]  # type: ignore[arg-type]
    local._running = [_Running(first, None, None, [0, 1])]  # type: ignore[arg-type]
    assert local._room(sweep, row("b", 1, **cuda)) == [2]  # type: ignore[arg-type]
    assert local._room(sweep, row("c", 2, **cuda)) is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs 4 devices, and this machine has 3"):
        local.check(sweep, [row("d", 4, **cuda)])  # type: ignore[arg-type]

"""Reading ahead: in order, bounded, lazy, with threads that end and exceptions that arrive; and the files read."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest

from datamodules.format import DataError
from datamodules.stream.files import OPEN_SECONDS, File, Files, Scratch
from datamodules.stream.prefetch import prefetch

from .samples import stream_threads


def test_prefetch_keeps_order_and_bounds_and_is_lazy() -> None:
    running, peak, done, lock = 0, 0, 0, threading.Lock()

    def work(i: int) -> int:
        nonlocal running, peak, done
        with lock:
            running += 1
            peak = max(peak, running)
        time.sleep(0.002 * (i % 3))
        with lock:
            running -= 1
            done += 1
        return i

    waits: list[float] = []
    generator = prefetch(work, itertools.count(), depth=4, threads=2, waited=waits.append)
    assert stream_threads() == 0
    for i in range(20):
        assert next(generator) == i
        time.sleep(0.002)
        assert done <= i + 1 + 4
    assert peak <= 3 and stream_threads() == 2  # the two threads, and the consumer instead of waiting
    assert len(waits) == 20
    generator.close()
    assert stream_threads() == 0


@pytest.mark.parametrize("depth", [0, 3])
def test_prefetch_ends_and_raises_in_turn(depth: int) -> None:
    def work(i: int) -> int:
        if i == 3:
            raise DataError("number three")
        return i

    assert list(prefetch(work, [0, 1, 2], depth, 2, lambda _: None)) == [0, 1, 2]
    generator = prefetch(work, range(9), depth, 2, lambda _: None)
    assert [next(generator) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="number three"):
        next(generator)
    assert stream_threads() == 0


def test_files_are_reused_then_reopened_and_closed(tmp_path: Path) -> None:
    path, now, opened = tmp_path / "x", [0.0], []
    path.write_bytes(bytes(range(100)))
    files, scratch = Files(clock=lambda: now[0]), Scratch()

    def opener() -> File | None:
        opened.append(File.open(str(path)))
        return opened[-1]

    first = files.get("x", opener)
    assert files.get("x", opener) is first and first is not None
    assert bytes(first.read(10, 20, scratch) or b"") == bytes(range(10, 20))
    assert first.read(90, 101, scratch) is None
    now[0] = OPEN_SECONDS + 1
    assert files.get("x", opener) is not first
    files.forget("x")
    assert files.get("x", opener) is opened[2]
    assert File.open(str(tmp_path / "absent")) is None


def test_quick_work_stays_with_the_consumer_until_it_takes_longer() -> None:
    def work(item: int) -> str:
        if item >= 100:
            time.sleep(0.02)
        return threading.current_thread().name

    names = list(prefetch(work, range(140), 4, 2, lambda seconds: None))
    me = threading.current_thread().name
    assert names[40:100].count(me) > 45  # once two in a row were quick
    assert len(set(names[110:]) - {me}) == 2  # both threads work again

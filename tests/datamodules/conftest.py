"""Fixtures of the data tests."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest

from datamodules.store import Store

from .samples import stream_threads


@pytest.fixture(autouse=True)
def no_thread_leaks() -> Iterator[None]:
    """No test leaves a reading thread behind."""
    yield
    if stream_threads():
        gc.collect()
    deadline = time.monotonic() + 20  # closing a stream waits for its threads for a moment only
    while stream_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stream_threads() == 0


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of an empty place in the memory of this process: the simplest remote store."""
    store = Store("memory://keel-tests/streams")
    store.delete_tree()
    yield store.url
    store.delete_tree()

"""Downloads shards into the cache before a stream needs them, bounded in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue

import numpy as np

from datamodules.format import DataError
from datamodules.store import StoreError

from .cache import Stopped
from .prefetch import THREADS, finish
from .windows import Ids

BLOCK = 64  # batches that are looked at together, and that one step of the stream waits for at most


class Ahead:
    """Walks the batches of a stream ahead of it and has the shards they lie in downloaded, in the order of need.

    Args:
        batches: sample ids of the stream's batches, from where it begins.
        shards: paths and sizes of the shards that samples lie in.
        download: makes a shard available, unless its second argument, asked now and then, says to stop; its failures are
            left to the reader that needs it.
        limit: bytes of shards that may be on their way or waiting for the stream to reach them (one is always allowed).
        horizon: batches to look ahead at most.
        threads: downloads at a time.
    """

    def __init__(
        self,
        batches: Iterator[Ids],
        shards: Callable[[Ids], Mapping[str, int]],
        download: Callable[[str, Callable[[], bool]], object],
        limit: int,
        horizon: int,
        threads: int = 4,
    ) -> None:
        self._batches, self._shards, self._download = batches, shards, download
        self._limit, self._horizon = limit, horizon
        self._step = self._looked = 0  # batches taken by the stream, and looked at
        self._waiting: deque[tuple[int, int]] = deque()  # (batch that needs a shard first, its bytes)
        self._bytes, self._ended = 0, False
        self._recent: dict[str, int] = {}  # shard -> last batch seen to need it
        self._block: deque[Ids] = deque()  # batches of which some need a shard that is not recent
        self._jobs: SimpleQueue[str | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"{THREADS}-ahead-{i}", daemon=True) for i in range(threads)
        ]
        self._stopping = threading.Event()
        for thread in self._threads:
            thread.start()

    def advance(self, batches: int = 1) -> None:
        """The stream takes its next batches."""
        self._step += batches
        while self._waiting and self._waiting[0][0] < self._step:
            self._bytes -= self._waiting.popleft()[1]
        until = min(self._step + self._horizon, self._looked + batches + BLOCK)
        while self._looked < until and (self._block or self._next_block(until)):
            if self._waiting and self._bytes >= self._limit:
                return
            for path, size in self._shards(self._block.popleft()).items():
                if not self._is_recent(path):
                    self._jobs.put(path)
                    self._waiting.append((self._looked, size))
                    self._bytes += size
                self._recent[path] = self._looked
            self._looked += 1

    def _next_block(self, until: int) -> bool:
        """Whether there is a block to look at batch by batch; passes over those that need no other shards than before."""
        while not self._ended and self._looked < until:
            block = list(islice(self._batches, min(BLOCK, until - self._looked)))
            self._ended = not block
            paths = self._shards(np.concatenate(block)) if block else {}
            if not all(map(self._is_recent, paths)):
                self._block.extend(block)
                return True
            self._looked += len(block)
            self._recent |= dict.fromkeys(paths, self._looked - 1)
        return False

    def _is_recent(self, path: str) -> bool:
        """A shard that is still in use was not evicted; one of an earlier epoch may have been."""
        return self._looked - self._recent.get(path, -1 << 60) <= self._horizon

    def _serve(self) -> None:
        while (path := self._jobs.get()) is not None:
            if not self._stopping.is_set():
                with suppress(DataError, StoreError, Stopped, ValueError):
                    self._download(path, self._stopping.is_set)

    def stop(self) -> None:
        """Tell the threads to end, in the middle of a download, too."""
        self._stopping.set()
        for _ in self._threads:
            self._jobs.put(None)

    def close(self) -> None:
        """End the threads."""
        self.stop()
        finish(self._threads)

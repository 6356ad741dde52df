"""Downloads shards into the cache before a stream needs them, bounded in bytes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from queue import SimpleQueue

from datamodules.format import DataError
from datamodules.store import StoreError

from .cache import Stopped
from .prefetch import THREADS, finish
from .windows import Ids


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
        while not self._ended and self._looked < self._step + self._horizon:
            if self._waiting and self._bytes >= self._limit:
                return
            ids = next(self._batches, None)
            if ids is None:
                self._ended = True
                return
            for path, size in self._shards(ids).items():
                # A shard that is still in use was not evicted; one of an earlier epoch may have been.
                if self._looked - self._recent.get(path, -1 << 60) > self._horizon:
                    self._jobs.put(path)
                    self._waiting.append((self._looked, size))
                    self._bytes += size
                self._recent[path] = self._looked
            self._looked += 1

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

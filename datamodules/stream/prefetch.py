"""Ordered read-ahead with a few threads, in which a consumer that finds nothing ready works along instead of waiting."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import islice
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
THREADS = "keel-stream"  # prefix of the names of the threads
PATIENCE_S = 1.0  # that closing waits for threads; they are daemons, so that the program's end does not wait either
QUICK_S = 300e-6  # work that takes less is not worth handing to a thread: they would fight for the interpreter
CONTENDED = 8  # times as long quick work takes while they do
PATIENCE, MOST_PATIENCE = 2, 1024  # items of threads that must look quick before the consumer tries to work alone


class _Job(Generic[T, R]):
    """One item: whoever gets ``claim`` works on it; ``ready`` is free once that is done."""

    __slots__ = ("claim", "error", "item", "offered", "ready", "result", "seconds")

    def __init__(self, item: T, offered: bool) -> None:
        self.item, self.offered = item, offered  # to the threads
        self.claim, self.ready = threading.Lock(), threading.Lock()
        self.ready.acquire()
        self.result: R | None = None
        self.error: BaseException | None = None
        self.seconds = 0.0  # that the work took

    def run(self, work: Callable[[T], R]) -> None:
        begin = time.perf_counter()
        try:
            self.result = work(self.item)
        except BaseException as error:
            self.error = error
        self.seconds = time.perf_counter() - begin
        self.ready.release()

    def take(self) -> R:
        """The result, once; raises what ``work`` raised."""
        if self.error is not None:
            raise self.error
        result, self.result = self.result, None
        return result  # type: ignore[return-value]


def _serve(work: Callable[[T], R], jobs: SimpleQueue[_Job[T, R] | None]) -> None:
    while (job := jobs.get()) is not None:
        if job.claim.acquire(blocking=False):
            job.run(work)
        del job  # while waiting for the next, this thread keeps no batch alive


def finish(threads: Sequence[threading.Thread]) -> None:
    """Wait for threads that were told to end, but not for those whose store does not answer: they end when it fails."""
    if threading.current_thread().name.startswith(THREADS):
        return  # the garbage collector may close a stream in one of its threads, which cannot wait for its own end
    deadline = time.monotonic() + PATIENCE_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def prefetch(
    work: Callable[[T], R],
    items: Iterable[T],
    depth: int,
    threads: int,
    waited: Callable[[float], None],
    quick: float = QUICK_S,
) -> Generator[R, None, None]:
    """``map(work, items)`` in order, with up to ``depth`` items in the making or ready ahead of the consumer.

    Nothing starts before the first ``next``. An item that no thread has begun when its turn comes is worked on in the
    consumer's thread, beside the others; ``depth=0`` does that with all of them and starts no thread. Items that take less
    than ``quick`` seconds, such as small batches from the page cache, are all worked on there, until one takes longer; as
    threads that fight for the interpreter take longer for the same, that is tried now and then, more rarely each time that
    it was in vain. ``waited`` gets the seconds that the consumer spent on each item. An exception of ``work`` reaches the
    consumer as it is, in its turn. The threads end with the generator: at its end, on an exception, on ``close`` and when it
    is garbage collected; see ``finish``.
    """
    source = iter(items)
    jobs: SimpleQueue[_Job[T, R] | None] = SimpleQueue()
    pool = [
        threading.Thread(target=_serve, args=(work, jobs), name=f"{THREADS}-{i}", daemon=True)
        for i in range(min(threads, depth))
    ]
    ahead: deque[_Job[T, R]] = deque()

    alone, row, patience = False, 0, PATIENCE  # row: items in a row that look quick

    def plan(count: int) -> None:
        for item in islice(source, count):
            job: _Job[T, R] = _Job(item, bool(pool) and not alone)
            ahead.append(job)
            if job.offered:
                jobs.put(job)

    try:
        for thread in pool:
            thread.start()
        plan(1)
        first = depth > 0
        while ahead:
            begin = time.perf_counter()
            job = ahead.popleft()
            if depth and not first:
                plan(1)
            if job.claim.acquire(blocking=False):
                job.run(work)
            else:
                job.ready.acquire()
            result = job.take()
            if job.offered and not alone:
                row = row + 1 if job.seconds < CONTENDED * quick else 0
                alone = row >= patience
            elif not job.offered and job.seconds < quick:
                patience = PATIENCE  # it was right to try
            elif not job.offered and pool:
                alone, row, patience = False, 0, min(MOST_PATIENCE, 4 * patience)
                for other in ahead:
                    if not other.offered:
                        other.offered = True
                        jobs.put(other)
            if first:  # it had the disk and the network to itself: whoever waits for it waits for nothing else
                plan(depth)
                first = False
            waited(time.perf_counter() - begin)
            del job
            yield result
            del result  # the consumer alone decides how long a batch lives
            if not depth:
                plan(1)
    finally:
        for job in ahead:
            job.claim.acquire(blocking=False)
        for _ in pool:
            jobs.put(None)
        finish(pool)

"""Ordered read-ahead with a few threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
THREADS = "keel-stream"  # prefix of the names of the threads


def prefetch(
    work: Callable[[T], R], items: Iterable[T], depth: int, threads: int, waited: Callable[[float], None]
) -> Generator[R, None, None]:
    """``map(work, items)`` in order, with up to ``depth`` items in the making or ready ahead of the consumer.

    Nothing starts before the first ``next``. ``depth=0`` works in the consumer's thread. ``waited`` gets the seconds that
    the consumer spent waiting for each item. An exception of ``work`` reaches the consumer as it is, in its turn. The
    threads end with the generator: at its end, on an exception, on ``close`` and when it is garbage collected.
    """
    source = iter(items)
    if depth < 1:
        for item in source:
            begin = time.perf_counter()
            result = work(item)
            waited(time.perf_counter() - begin)
            yield result
        return
    pool = ThreadPoolExecutor(min(threads, depth), thread_name_prefix=THREADS)
    ahead: deque[Future[R]] = deque()
    try:
        ahead.extend(pool.submit(work, item) for item in islice(source, depth))
        while ahead:
            begin = time.perf_counter()
            result = ahead.popleft().result()
            waited(time.perf_counter() - begin)
            ahead.extend(pool.submit(work, item) for item in islice(source, 1))
            yield result
            del result  # the consumer alone decides how long a batch lives
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        # The garbage collector may run this in one of the threads themselves, which cannot wait for its own end.
        if not threading.current_thread().name.startswith(THREADS):
            pool.shutdown(wait=True)

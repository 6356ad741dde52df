"""What the machine could do with the same bytes: plain positional reads of the files, and 16 concurrent range GETs."""

from __future__ import annotations

import http.client
import os
import random
import re
import threading
import time
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from stream_cases import BATCH, Case, forget

from datamodules.format import Dataset
from datamodules.store import Store

CONNECTIONS = 16
RANGE = 4 << 20  # bytes of a GET where whole shards are read
Span = tuple[str, int, int]


def spans(case: Case, url: str) -> list[Span]:
    """Object and stored bytes [start, end) of each sample, inner checksums included, in the order of the samples."""
    array = Dataset.open(url).main
    spec, found = array.spec, []
    if spec.window_axis == 0:  # tokens: the entries themselves; a few sequences run over the end of a chunk
        step, width = case.shape[0] - 1, spec.numpy_dtype.itemsize
        for i in range(case.items):
            k, first = divmod(i * step, spec.shard_length)
            start = first // spec.chunk_length * spec.chunk_bytes + first % spec.chunk_length * width
            found.append((array.shard_path(k), start, start + step * width))
        return found
    length = spec.shape[1]
    frames = (case.window or length) // spec.chunk_length
    for i in range(case.items):
        k, at = divmod(i, spec.shard_length)
        start = at * (length // spec.chunk_length) * spec.chunk_bytes
        found.append((array.shard_path(k), start, start + frames * spec.chunk_bytes))
    return found


def readinto(case: Case, folder: str, cold: bool, seconds: float) -> float:
    """Samples/s of `preadv` into one preallocated batch, in random order; cold: once, out of the page cache."""
    todo = spans(case, folder)
    if cold:
        forget(folder)
    handles = {path: os.open(os.path.join(folder, path), os.O_RDONLY) for path in {path for path, _, _ in todo}}
    largest = max(end - start for _, start, end in todo)
    rows = [memoryview(bytearray(largest)) for _ in range(BATCH)]
    for row in rows:
        row[:] = bytes(largest)  # touch the memory
    order, done = random.Random(0), 0
    began = time.perf_counter()
    while True:
        order.shuffle(todo)
        for i, (path, start, end) in enumerate(todo):
            os.preadv(handles[path], [rows[i % BATCH][: end - start]], start)
        done += len(todo)
        took = time.perf_counter() - began
        if cold or took > seconds:
            break
    for handle in handles.values():
        os.close(handle)
    return done / took


def range_gets(case: Case, url: str, shards: bool) -> float:
    """Samples/s of 16 connections that GET ranges: of RANGE bytes over whole shards, or the bytes of each sample."""
    dataset = Dataset.open(url)
    if shards:
        paths = sorted({path for path, _, _ in spans(case, url)})
        sizes = {path: dataset.objects[path].size for path in paths}
        todo = [(path, a, min(a + RANGE, sizes[path])) for path in paths for a in range(0, sizes[path], RANGE)]
    else:
        todo = spans(case, url)
        random.Random(0).shuffle(todo)
    return case.items / gets(url, dataset.store, todo)


def gets(url: str, store: Store, todo: list[Span]) -> float:
    """Seconds that CONNECTIONS plain connections take for these ranges of objects below `url`."""
    filesystem = store._client().filesystem
    signed = {
        path: urlsplit(filesystem.url(f"{url.removeprefix('s3://')}/{path}", expires=3600))
        for path in {path for path, _, _ in todo}
    }
    left, lock, faults = iter(todo), threading.Lock(), []

    def work() -> None:
        connection = http.client.HTTPConnection(next(iter(signed.values())).netloc, timeout=60)
        try:
            while True:
                with lock:
                    span = next(left, None)
                if span is None:
                    return
                path, start, end = span
                target = signed[path]
                connection.request(
                    "GET", f"{target.path}?{target.query}", headers={"Range": f"bytes={start}-{end - 1}"}
                )
                if len(connection.getresponse().read()) != end - start:
                    raise OSError(f"{path}: short answer")
        except Exception as error:
            faults.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    if faults:
        raise faults[0]
    return took


REQUEST = re.compile(r'^(\S+)\s.* beast: .*"GET /\S+ HTTP/1\.1" 20[06] (\d+) ')


def fetched(log: Path, prefix: str, begin: float, end: float) -> tuple[int, int]:
    """Requests and bytes that the server answered below `/bucket/prefix` from `begin` to `end` (seconds of the epoch)."""
    requests = total = 0
    with log.open(errors="replace") as lines:
        for line in lines:
            if f'"GET /{prefix}/' not in line:
                continue
            found = REQUEST.match(line)
            if found and begin <= datetime.strptime(found.group(1), "%Y-%m-%dT%H:%M:%S.%f%z").timestamp() <= end + 0.01:
                requests, total = requests + 1, total + int(found.group(2))
    return requests, total

"""The records of a run: what it writes while it trains, and how that is read back as one history.

A run is a sequence of attempts (the first start and every resume). Attempt `a` writes

- `attempts/AAAA.json`                      who, where, when, and `resumed_from`: the step it continued from (0: fresh)
- `metrics/AAAA-SSSSSS.jsonl`               segments of rows `{"step", "attempt", "time", "loss", ...}`, by rank 0
- `trace/AAAA-RRRRR-SSSSSS.jsonl`           segments of rows `{"step", "attempt", "rank", "index"}`, by every rank
- `record.jsonl`                            one line, the outcome of the run

Segments are whole objects, never appended to, so that a kill at any instant leaves only whole rows. An attempt that
resumed from step r makes everything that earlier attempts wrote for steps > r void: readers drop those rows.

Numbers survive bitwise (shortest round-trip decimals). JSON has no NaN or infinities: they are the strings "NaN",
"Infinity" and "-Infinity" in a file, and floats again when read.
"""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datamodules.store import Store

Row = dict[str, Any]

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


# ------------------------------------------------------------------------------------------------------------ encoding
def strict(value: Any) -> Any:
    """`value` as JSON takes it: non-finite numbers as strings, arrays as lists. Raises TypeError for what JSON cannot hold."""
    if isinstance(value, float):
        return (
            value
            if math.isfinite(value)
            else "NaN"
            if math.isnan(value)
            else ("Infinity" if value > 0 else "-Infinity")
        )
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch
        return strict(value.tolist())
    raise TypeError(
        f"a record cannot hold {value!r} of type {type(value).__name__}; use numbers, strings, lists, dicts"
    )


def _loose(value: Any) -> Any:
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, dict):
        return {key: _loose(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_loose(item) for item in value]
    return value


def encode(row: Mapping[str, Any]) -> bytes:
    """One row as one line of strict JSON with its newline. Raises TypeError for what JSON cannot hold."""
    return json.dumps(strict(row), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def decode(data: bytes) -> list[Row]:
    """The rows of a segment written by `encode`."""
    return [_loose(json.loads(line)) for line in data.splitlines() if line.strip()]


# ------------------------------------------------------------------------------------------------------------- writing
class _SegmentWriter:
    """Rows in, numbered objects out, by one background thread, in order.

    Rows leave for the store when the oldest has waited `flush_seconds`, or at `flush`. A failed upload loses nothing:
    its rows stay in the buffer, the error is raised by the next append, and a later flush tries again.
    """

    def __init__(self, store: Store, stem: str, flush_seconds: float, enabled: bool = True) -> None:
        if not flush_seconds > 0:
            raise ValueError(f"flush_seconds={flush_seconds}: must be positive")
        self._store, self._stem, self._seconds, self._enabled = store, stem, flush_seconds, enabled
        self._lines: list[bytes] = []
        self._oldest = 0.0
        self._appended = self._written = self._sequence = 0
        self._asked = 0  # rows up to this count are to be written at once
        self._uploads = self._failed = 0  # begun so far; the one of them that raised `_error`
        self._error: Exception | None = None
        self._closing = False
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None

    def _extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        if not self._enabled:
            return
        lines = [encode(row) for row in rows]
        with self._wake:
            if self._closing:
                raise RuntimeError(f"the writer of {self._stem}* is closed")
            self._raise()
            if not lines:
                return
            if not self._lines:
                self._oldest = time.monotonic()
            self._lines += lines
            self._appended += len(lines)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=f"keel-{self._stem}", daemon=True)
                self._thread.start()
            self._wake.notify_all()

    def flush(self, wait: bool = True) -> None:
        """Sends the buffered rows. `wait`: returns only when everything appended so far is in the store.

        An upload that failed, or fails, but had begun before a waiting flush is not its failure: the rows are sent again.
        """
        with self._wake:
            if not wait:
                self._raise()
                self._ask()
                return
            target, begun = self._appended, self._uploads
            while self._written < target:
                self._error = None
                self._ask()
                self._wake.wait_for(lambda: self._written >= target or self._error is not None)
                if self._error is not None and self._failed > begun:
                    self._raise()

    def _ask(self) -> None:
        self._asked = self._appended
        self._wake.notify_all()

    def close(self) -> None:
        """Writes what is left, ends the thread, raises the error of an upload that failed. May be called twice."""
        try:
            self.flush(wait=True)
        finally:
            with self._wake:
                self._closing = True
                self._wake.notify_all()
            if self._thread is not None:
                self._thread.join()
                self._thread = None

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            self._asked = 0  # the rows stay buffered; whoever handles the error decides when to try again
            self._oldest = time.monotonic()
            self._wake.notify_all()
            raise error

    def _due(self) -> bool:
        if not self._lines or self._error is not None:
            return False
        return self._asked > self._written or time.monotonic() - self._oldest >= self._seconds

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._closing and not self._due():
                    idle = not self._lines or self._error is not None
                    left = self._seconds - (time.monotonic() - self._oldest)
                    self._wake.wait(None if idle else max(left, 0.0))
                if self._closing:
                    return
                lines = list(self._lines)
                self._uploads += 1
                path = f"{self._stem}{self._sequence:06d}.jsonl"
            try:
                self._store.write(path, b"".join(lines))
            except Exception as error:  # the thread must live on: the error belongs to the training thread
                with self._wake:
                    self._error, self._failed = error, self._uploads
                    self._wake.notify_all()
                continue
            with self._wake:
                del self._lines[: len(lines)]
                self._oldest = time.monotonic()
                self._sequence += 1
                self._written += len(lines)
                self._wake.notify_all()


class MetricsWriter(_SegmentWriter):
    """Rows of metrics of one attempt. On ranks other than 0 every method does nothing.

    Args:
        store: root of the run.
        attempt: number of this attempt, from `start_attempt`.
        rank0: whether this process writes.
        flush_seconds: a row waits at most this long before its upload starts.
    """

    def __init__(self, store: Store, attempt: int, rank0: bool = True, flush_seconds: float = 10.0) -> None:
        super().__init__(store, f"metrics/{attempt:04d}-", flush_seconds, rank0)
        self.attempt = attempt
        self.rank0 = rank0

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends rows; each has at least `step`. Raises what an earlier upload raised."""
        self._extend({"step": row["step"], "attempt": self.attempt, **row} for row in rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Appends one row."""
        self.extend([row])


class TraceWriter(_SegmentWriter):
    """The ids of the samples that one rank really trained on, step by step."""

    def __init__(self, store: Store, attempt: int, rank: int, flush_seconds: float = 10.0) -> None:
        super().__init__(store, f"trace/{attempt:04d}-{rank:05d}-", flush_seconds)
        self.attempt = attempt
        self.rank = rank

    def append(self, step: int, index: list[int]) -> None:
        """Appends the sample ids of step `step` (1-based) in the order in which they were used."""
        self._extend([{"step": step, "attempt": self.attempt, "rank": self.rank, "index": index}])


def start_attempt(store: Store, info: Mapping[str, Any]) -> int:
    """Claims the next attempt number and writes `attempts/AAAA.json`; two starters never get the same number.

    One rank calls it, before anything else of the attempt is written. `info` should hold `resumed_from` (step, 0 for a
    fresh start; default 0).
    """
    attempt = next_attempt(store)
    while not store.create(
        f"attempts/{attempt:04d}.json", encode({"attempt": attempt, "time": time.time(), "resumed_from": 0, **info})
    ):
        attempt += 1
    return attempt


def rewrite_attempt(store: Store, attempt: int, info: Mapping[str, Any]) -> None:
    """Replaces what `start_attempt` wrote, once more is known."""
    store.write(f"attempts/{attempt:04d}.json", encode({"attempt": attempt, **info}))


def write_record(store: Store, record: Mapping[str, Any]) -> None:
    """Writes the outcome of the run, replacing an earlier one."""
    store.write("record.jsonl", encode(record))


# ------------------------------------------------------------------------------------------------------------- reading
def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", name))


def _segments(store: Store, folder: str) -> list[tuple[int, list[Row]]]:
    """(attempt, rows) of all segments of a folder, in the order of (attempt, rank, sequence)."""
    names = sorted((path.rsplit("/", 1)[-1] for path in store.list(folder)), key=_numbers)
    with ThreadPoolExecutor(max_workers=8) as pool:  # latency, not bandwidth, dominates: segments are small
        data = pool.map(store.read, [f"{folder}/{name}" for name in names])
        return [(_numbers(name)[0], decode(item)) for name, item in zip(names, data, strict=True)]


def read_attempts(store: Store) -> list[Row]:
    """All attempts in order; each has at least `attempt` and `resumed_from`."""
    return [
        {"attempt": attempt, "resumed_from": 0} | row for attempt, rows in _segments(store, "attempts") for row in rows
    ]


def newest_attempt(store: Store) -> int:
    """The last attempt that has started; 0 for none. One listing of few names, for those who ask often."""
    return max((_numbers(name)[0] for name in store.children("attempts")[1]), default=0)


def next_attempt(store: Store) -> int:
    """1 for a new run, else the number after the last attempt that left anything."""
    names = [path.rsplit("/", 1)[-1] for folder in ("attempts", "metrics", "trace") for path in store.list(folder)]
    return 1 + max((_numbers(name)[0] for name in names), default=0)


def _history(store: Store, folder: str) -> list[Row]:
    rows_of: dict[int, list[Row]] = {}
    for attempt, rows in _segments(store, folder):
        rows_of.setdefault(attempt, []).extend(rows)
    resumed = {row["attempt"]: int(row["resumed_from"] or 0) for row in read_attempts(store)}
    merged: list[Row] = []
    for attempt in sorted(rows_of.keys() | resumed.keys()):
        if attempt in resumed:  # also when the attempt died before its first row: the run stood at that step
            merged = [row for row in merged if row["step"] <= resumed[attempt]]
        merged += rows_of.get(attempt, [])
    return sorted(merged, key=lambda row: row["step"])


def read_metrics(store: Store) -> list[Row]:
    """The history of a run as if it had never been interrupted: rows sorted by step, void ones dropped.

    Training rows (with `loss`), validation rows (`val/...`) and events of the same step are separate rows.
    """
    return _history(store, "metrics")


def read_trace(store: Store) -> list[Row]:
    """The samples that made the present state: rows `{"step", "attempt", "rank", "index"}` sorted by (step, rank)."""
    return sorted(_history(store, "trace"), key=lambda row: (row["step"], row["rank"]))


def read_evaluation(store: Store) -> Row:
    """What `keel evaluate` wrote last. Raises the store's NotFound when there is none."""
    return decode(store.read("evaluation.json"))[0]


def read_record(store: Store) -> Row:
    """The outcome of the run. Raises the store's NotFound when it has none yet."""
    return decode(store.read("record.jsonl"))[0]

"""What workers print, from the store: `logs/attempt-A/node-N/rank-R.log`, each an object that is sent again as it grows."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.watch.seen import each
from datamodules.store import NotFound, Store

_PATH = re.compile(r"logs/attempt-(\d+)/node-(\d+)/rank-(\d+)\.log")
_CUT = re.compile(rb"\[(\d+) bytes before this are left out\]\n")


@dataclass(frozen=True, order=True)
class Log:
    """One worker's output in one attempt of a run."""

    attempt: int
    rank: int
    node: int

    @property
    def path(self) -> str:
        return f"logs/attempt-{self.attempt}/node-{self.node}/rank-{self.rank}.log"


def choose(store: Store, *, attempt: int | None = None, node: int | None = None, rank: int | None = None) -> list[Log]:
    """The logs of an attempt (default: the last): those of a node or a rank, else that of the lowest rank."""
    found = [Log(int(m[1]), int(m[3]), int(m[2])) for path in store.list("logs") if (m := _PATH.fullmatch(path))]
    wanted = max((log.attempt for log in found), default=0) if attempt is None else attempt
    logs = sorted(log for log in found if log.attempt == wanted)
    logs = [log for log in logs if node in (None, log.node) and rank in (None, log.rank)]
    return logs[:1] if node is None and rank is None else logs


def lines(store: Store, logs: list[Log], tail: int | None = None) -> Iterator[str]:
    """The lines of `logs`, the last `tail` of each; with the rank before each line where there are several."""
    for log, data in zip(logs, each(store.read, [log.path for log in logs]), strict=True):
        text = data.decode(errors="replace").splitlines()
        for line in text if tail is None else text[max(0, len(text) - tail) :]:
            yield _marked(log, line, len(logs))


def follow(
    store: Store,
    find: Callable[[], list[Log]],
    over: Callable[[], bool],
    *,
    tail: int | None = None,
    pause_s: float = 2.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """`lines`, then what is added to these logs and to those of later attempts, until `over()` and all is told."""
    told: dict[str, int] = {}  # bytes of each log
    followed: list[Log] = []
    first, ending = True, False
    while True:
        logs = find()
        newest = max((log.attempt for log in logs), default=0)
        # What an attempt prints last comes with what the next one prints first.
        before = [log for log in followed if log.attempt < newest]
        for log in [*before, *logs]:
            text = _new(store, log, told, to_end=ending or log.attempt < newest)
            if first and tail is not None:
                text = text[max(0, len(text) - tail) :]
            for line in text:
                yield _marked(log, line, len(before if log.attempt < newest else logs))
        if ending:
            return
        followed = logs or followed
        first = first and not logs
        ending = over()  # asked before the last look: what came between is told, too
        if not ending:
            sleep(pause_s)


def _new(store: Store, log: Log, told: dict[str, int], *, to_end: bool) -> list[str]:
    """The lines of `log` that are not told yet; the last one only if it is whole, or `to_end`."""
    try:
        raw = store.read(log.path)
    except NotFound:  # the run was started again from nothing
        return []
    start, data = _whole(raw)
    seen = told.get(log.path, 0)
    new = data[max(0, seen - start) :]
    new = new if to_end else new[: new.rfind(b"\n") + 1]  # the rest of the line comes later
    told[log.path] = max(seen, start) + len(new)
    return new.decode(errors="replace").splitlines()


def _whole(raw: bytes) -> tuple[int, bytes]:
    """(how many bytes are left out, the rest)."""
    cut = _CUT.match(raw)
    return (int(cut[1]), raw[cut.end() :]) if cut else (0, raw)


def _marked(log: Log, line: str, count: int) -> str:
    return f"[rank {log.rank}] {line}" if count > 1 else line

"""Reads what a run has said of itself: the objects below `status/`, its record, its job."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from cluster.launch.job import FILE as JOB
from datamodules.store import NotFound, Store, StoreError
from trainer.records import read_record
from trainer.status import CANCEL, RUN

NODE = "status/node-{}.json"
RECORD = "record.jsonl"
THREADS = 32  # requests at once; latency, not bandwidth, counts

_NUMBERED = re.compile(r"(node|workers)-(\d+)\.json")
# A clock that is off by less matters to nobody, and a store may tell whole seconds only.
_SKEW_S = 5.0


@dataclass(frozen=True)
class Said:
    """The content of one object that is overwritten at each heartbeat.

    Attributes:
        age: seconds since it was written.
        skew: seconds by which its writer's clock is ahead of the store's; None where the store does not tell its time.
    """

    content: Mapping[str, Any]
    age: float
    skew: float | None = None

    @property
    def period(self) -> float:
        """Seconds between two heartbeats."""
        return float(self.content.get("heartbeat_s") or 10.0)

    @property
    def late(self) -> bool:
        """Whether several heartbeats in a row are missing."""
        return self.age > 3 * self.period + 5

    @property
    def odd_clock(self) -> bool:
        return self.skew is not None and abs(self.skew) > _SKEW_S


@dataclass(frozen=True)
class Seen:
    """What the store held of a run, at one time.

    Attributes:
        run: where it stands, by its rank 0.
        nodes: by number: what the launcher on each node says.
        workers: by number of the node: how its ranks fare (empty unless asked for).
        record: the outcome; read only where nothing else tells how the run ended.
        job: the content of `job.json`.
        cancelled: it was asked to end.
        earlier: the record is older than the job: it tells of what ran before.
    """

    url: str
    run: Said | None = None
    nodes: Mapping[int, Said] = field(default_factory=dict)
    workers: Mapping[int, Said] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None
    job: Mapping[str, Any] | None = None
    cancelled: bool = False
    earlier: bool = False

    @property
    def silent(self) -> bool:
        """Whether nobody has said a word since the run was started last."""
        return self.run is None and not self.nodes


def look(store: Store, *, workers: bool = False, now: float | None = None) -> Seen:
    """Everything about one run; with how its ranks fare, if `workers`.

    Args:
        now: seconds since the epoch, for those who have frozen time.
    """
    names = store.children("status")[1]
    wanted = [f"status/{name}" for name in names if name == RUN.rpartition("/")[2] or _wanted(name, workers)]
    said = dict(zip(wanted, each(lambda path: _said(store, path, now, ask=True), wanted), strict=True))
    numbered: dict[str, dict[int, Said]] = {"node": {}, "workers": {}}
    for path, content in said.items():
        match = _NUMBERED.fullmatch(path.rpartition("/")[2])
        if match and content:
            numbered[match[1]][int(match[2])] = content
    run, nodes = said.get(RUN), numbered["node"]
    record = None if run is not None and run.content.get("status") else _record(store)
    job = _json(store, JOB)
    earlier = run is None and not nodes and _earlier(store, record, job)
    cancelled = CANCEL.rpartition("/")[2] in names
    return Seen(store.url, run, nodes, numbered["workers"], record, job, cancelled, earlier)


def glance(store: Store, *, now: float | None = None) -> Seen:
    """The little that a line in a list needs: two or three small reads."""
    run, node = _said(store, RUN, now), _said(store, NODE.format(0), now)
    ended = run is not None and run.content.get("status")
    job = _json(store, JOB) if run is None and node is None else None
    record = None if ended or (run and not run.late) else _record(store)
    nodes = {} if node is None else {0: node}
    return Seen(store.url, run, nodes, {}, record, job, earlier=_earlier(store, record, job))


def find(root: Store, *, depth: int = 3) -> list[str]:
    """The paths of all runs below `root`, sorted ("" is `root` itself); folders that hold a run are not looked into, nor
    are data sets. `depth`: how many folders deep."""
    found: list[str] = []
    level = [""]
    for left in range(depth, -1, -1):
        below: list[str] = []
        for path, (folders, objects) in zip(level, each(root.children, level), strict=True):
            if "config.yaml" in objects:
                found.append(path)
            elif "zarr.json" not in objects and left:
                below += [f"{path}/{name}".lstrip("/") for name in folders if not name.startswith(".")]
        level = below
    return sorted(found)


def last_commit(store: Store) -> tuple[int, float] | None:
    """(step, seconds since the epoch) of the newest committed checkpoint, by its marker."""
    for folder in reversed(store.children("checkpoints")[0]):
        marker = _json(store, f"checkpoints/{folder}/COMMITTED")
        if marker is not None:
            return int(marker["step"]), float(marker.get("created") or 0)
    return None


def each(call: Any, items: Iterable[Any]) -> list[Any]:
    """`call` of each item, many at once."""
    items = list(items)
    if len(items) < 2:
        return [call(item) for item in items]
    with ThreadPoolExecutor(min(THREADS, len(items))) as pool:
        return list(pool.map(call, items))


def _wanted(name: str, workers: bool) -> bool:
    match = _NUMBERED.fullmatch(name)
    return bool(match) and (workers or match[1] == "node")  # type: ignore[index]


def _said(store: Store, path: str, now: float | None, ask: bool = False) -> Said | None:
    """`ask`: let the store tell the age in any case, else only where the clocks leave a doubt."""
    content = _json(store, path)
    if content is None:
        return None
    moment = time.time() if now is None else now
    said = Said(content, moment - float(content["time"]))
    if now is not None or not (ask or said.late or said.age < -1):
        return said
    try:
        times = store.times(path)
    except NotFound:
        times = None
    if times is None:
        return Said(content, max(said.age, 0.0))
    written, there = times
    return Said(content, max(there - written, 0.0), None if store.is_local else float(content["time"]) - written)


def _json(store: Store, path: str) -> Any:
    try:
        return store.read_json(path)
    except NotFound:
        return None


def _earlier(store: Store, record: Any, job: Any) -> bool:
    """Whether the record was there before the job. Nothing but the store's own clock is that of both."""
    if record is None or job is None:
        return False
    try:
        written, submitted = store.times(RECORD), store.times(JOB)
    except NotFound:
        return False
    return written is not None and submitted is not None and written[0] <= submitted[0]


def _record(store: Store) -> Mapping[str, Any] | None:
    try:
        return read_record(store)
    except NotFound:
        return None
    except (ValueError, IndexError) as error:
        raise StoreError(f"{store.join(RECORD)}: is damaged ({error})") from error

"""Who does which row: a log of claims that any number of drivers append to, and heartbeats.

Entry `claims/NNNNNNNN.json` names the rows that one driver takes (or gives back). It is created on the condition that
there is none of that number, after all entries before it were read: so the log is one order that all drivers agree on, and
of two that want the same row one reads the other's entry first. An entry holds one row or hundreds.

A driver tells in `owners/<driver>.json` that it lives. One of this machine whose process is gone is given up at once, any
other when it was silent for `expiry_s`. Whoever gives a driver up first creates `owners/<driver>.dead`; then the rows are
free. A driver that finds such a note about itself (it was stopped for long, or cut off from the store) stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.launch.local_backend import started_at
from datamodules.store import NotFound, Store, StoreError, canonical_json

_BEATS = 4  # heartbeats in an expiry


class Lost(RuntimeError):
    """This driver was given up by another one: its rows are no longer its own."""


@dataclass
class Holder:
    """The last claim of a row: by whom, together with how many others, and how many drivers died with it before: in all,
    and when it was the only row of its claim."""

    owner: str
    together: int = 1
    deaths: int = 0
    alone: int = 0


@dataclass
class _Log:
    """The claims so far: row -> holder, and the number of entries read."""

    holders: dict[str, Holder] = field(default_factory=dict)
    entries: int = 0

    def add(self, entry: Mapping[str, Any]) -> None:
        self.entries += 1
        for row in entry.get("released", ()):
            if row in self.holders and self.holders[row].owner == entry["owner"]:
                self.holders[row].owner = ""
        rows = entry.get("rows", ())
        for row in rows:
            before = self.holders.get(row, Holder(""))
            died = bool(before.owner)  # what is not done is given back, unless the driver died
            alone = before.alone + (died and before.together == 1)
            self.holders[row] = Holder(entry["owner"], len(rows), before.deaths + died, alone)


class Claims:
    """The claims of a sweep, as one driver makes and sees them.

    Args:
        store: the sweep's URL.
        expiry_s: a driver that is silent for so long is given up.
        name: of this driver; made up when empty.
    """

    def __init__(self, store: Store, expiry_s: float, name: str = "") -> None:
        self.store, self.expiry_s = store, expiry_s
        self.owner = name or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.lost = threading.Event()
        self._log = _Log()
        self._alive: set[str] = set()  # asked for in this call
        self._dead: set[str] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # -------------------------------------------------------------------------------------------------------- this one
    def open(self) -> None:
        """Begins the heartbeat."""
        self._beat()
        self._thread = threading.Thread(target=self._beats, name="keel-sweep-heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the heartbeat. What is still claimed is free from now on."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(StoreError):
            if not self.lost.is_set():
                self.store.create(f"owners/{self.owner}.dead", canonical_json({"by": self.owner}))
                self.store.delete(f"owners/{self.owner}.json")

    def check(self) -> None:
        """Raises Lost where another driver has given this one up."""
        if self.lost.is_set() or self.given_up(self.owner):
            self.lost.set()
            raise Lost(
                f"driver {self.owner} was silent for more than {self.expiry_s:g} s and was given up; start it again"
            )

    # ------------------------------------------------------------------------------------------------------------ rows
    def claim(self, rows: Iterable[str]) -> set[str]:
        """Takes those of `rows` that are free, in one entry of the log; returns them.

        Whether they still lack a result is for the caller to see, after the claim: who had them may have finished.

        Raises:
            Lost: another driver has given this one up.
        """
        wanted = list(rows)
        with self._lock:
            self._alive.clear()
            while True:
                self._read()
                free = [row for row in wanted if self._free(row)]
                if not free:
                    return set()
                self.check()
                if self._append({"owner": self.owner, "rows": free}):
                    return set(free)

    def release(self, rows: Iterable[str]) -> None:
        """Gives rows back. Those of a driver that has closed are free anyway."""
        mine = list(rows)
        with self._lock:
            while mine and not self.lost.is_set():
                self._read()
                if self._append({"owner": self.owner, "released": mine}):
                    return

    def deaths(self, row: str) -> tuple[int, int]:
        """How many drivers died holding the row, as of the last claim, and how many of them while they held no other."""
        found = self._log.holders.get(row, Holder(""))
        return found.deaths, found.alone

    def held(self) -> set[str]:
        """The rows that live drivers hold, this one included."""
        with self._lock:
            self._read()
            return {
                row for row, holder in self._log.holders.items() if holder.owner and not self._is_dead(holder.owner)
            }

    def begun(self) -> set[str]:
        """The rows that any driver has ever claimed."""
        with self._lock:
            self._read()
            return set(self._log.holders)

    # ------------------------------------------------------------------------------------------------------- internals
    def _free(self, row: str) -> bool:
        holder = self._log.holders.get(row)
        if holder is None or not holder.owner:
            return True
        return holder.owner != self.owner and self._is_dead(holder.owner)

    def _read(self) -> None:
        """Reads the entries that came since."""
        _follow(self.store, self._log)

    def _append(self, entry: Mapping[str, Any]) -> bool:
        """Adds the next entry; False where another driver was faster."""
        content = canonical_json({**entry, "time": time.time(), "nonce": uuid.uuid4().hex[:8]})
        if not self.store.create(_entry(self._log.entries), content):
            return False
        self._log.add(entry)
        return True

    def _is_dead(self, owner: str) -> bool:
        """Whether a driver is gone; gives it up if so."""
        if owner == self.owner:
            return self.lost.is_set()
        if owner in self._dead:
            return True
        if owner in self._alive:
            return False
        if self.given_up(owner) or self._silent(owner):
            self.store.create(f"owners/{owner}.dead", canonical_json({"by": self.owner}))
            self._dead.add(owner)
            return True
        self._alive.add(owner)
        return False

    def given_up(self, owner: str) -> bool:
        """Whether a driver was given up, or has closed."""
        return self.store.exists(f"owners/{owner}.dead")

    def beats(self, owner: str) -> bool:
        """Whether a driver's last heartbeat is recent and, if it is on this machine, its process is there."""
        beat = self._last(owner)
        return beat is not None and not _is_gone(beat) and time.time() - beat["time"] <= beat["expiry_s"]

    def _silent(self, owner: str) -> bool:
        beat = self._last(owner)
        if beat is None or _is_gone(beat):
            return True
        if time.time() - beat["time"] <= beat["expiry_s"]:
            return False
        # Clocks may differ by more than that: it is silent if nothing comes while it is watched.
        deadline = time.monotonic() + 2 * beat["expiry_s"] / _BEATS
        while time.monotonic() < deadline:
            time.sleep(min(0.5, beat["expiry_s"] / _BEATS))
            if self._last(owner) != beat:
                return False
        return True

    def _last(self, owner: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = self.store.read_json(f"owners/{owner}.json")
        except NotFound:
            return None
        return found

    def _beat(self) -> None:
        beat = {
            "machine": _machine(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "ticks": started_at(os.getpid()),
            "time": time.time(),
            "expiry_s": self.expiry_s,
        }
        self.store.write_json(f"owners/{self.owner}.json", beat)

    def _beats(self) -> None:
        while not self._stop.wait(self.expiry_s / _BEATS):
            # A store that does not answer for a while is no reason to stop: if it lasts, others will have given us up.
            with contextlib.suppress(StoreError):
                if self.given_up(self.owner):
                    self.lost.set()
                    return
                self._beat()


def running(store: Store) -> dict[str, bool]:
    """Row -> whether its driver lives, of all rows that are claimed. For looking on: it needs no driver and gives none up."""
    log = _Log()
    _follow(store, log)
    claims = Claims(store, 1.0)
    held = {row: holder.owner for row, holder in log.holders.items() if holder.owner}
    alive = {owner: not claims.given_up(owner) and claims.beats(owner) for owner in set(held.values())}
    return {row: alive[owner] for row, owner in held.items()}


def _follow(store: Store, log: _Log) -> None:
    if not log.entries:  # many at once: latency, not bandwidth, dominates
        names = store.list("claims")
        with ThreadPoolExecutor(max_workers=16) as pool:
            for entry in pool.map(store.read_json, names):
                log.add(entry)
    while True:
        try:
            entry = store.read_json(_entry(log.entries))
        except NotFound:
            return
        log.add(entry)


def _is_gone(beat: Mapping[str, Any]) -> bool:
    return beat["machine"] == _machine() and started_at(beat["pid"]) != beat["ticks"]


def _entry(number: int) -> str:
    return f"claims/{number:08d}.json"


def _machine() -> str:
    """Which machine this is, in this start of it: process ids mean nothing on another."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        spaces = [os.readlink("/proc/self/ns/pid"), boot.read_text().strip()]
    except OSError:
        spaces = []
    return json.dumps([socket.gethostname(), *spaces])

"""Faults from outside of a run: signals and kills by process id, a store that really fails, a disk that is really full."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from scripts.services import s3
from tests.helpers.faulty_proxy import FaultyProxy

SIGNALS = {"sigterm": signal.SIGTERM, "sigusr1": signal.SIGUSR1, "sigkill": signal.SIGKILL, "sigstop": signal.SIGSTOP}
STORE = {"store_slow": "late", "store_throttled": "slow_down", "store_full": "full", "store_down": "", "store_gone": ""}
OUTSIDE = (*SIGNALS, "sigkill_tree", "damaged", "disk_full", *STORE)
LONGEST_S = 30.0  # a store or disk that nobody asks for so long is mended without having mattered

# What S3 clients of a run may take, so that an outage of seconds is longer than it.
DEADLINE_S = 2.0


class Place:
    """Where a run of a case lies: a folder, with `store=small` a file system of its own, with `store=s3` behind a proxy."""

    def __init__(self, folder: Path, store: str) -> None:
        self.folder, self.store = folder, store
        self.url = str(folder / "run")
        self.fault = ""  # what the proxy does to each request
        self.proxy: FaultyProxy | None = None
        self.environment: dict[str, str] = {}

    def __enter__(self) -> Place:
        for part in ("pids", "fired"):
            (self.folder / part).mkdir(parents=True)
        for part in ("steps", "events.jsonl"):
            (self.folder / part).touch()
        if self.store == "small":
            disk = self.folder / "disk"
            disk.mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], check=True, timeout=30)
            self.url = str(disk / "run")
        if self.store == "s3":
            server = s3.up(self.folder.parent / "s3")
            self.proxy = FaultyProxy(server["AWS_ENDPOINT_URL"], lambda *_: self.fault or None)
            limits = {"deadline": DEADLINE_S, "connect_deadline": DEADLINE_S}
            self.environment = server | {"AWS_ENDPOINT_URL": self.proxy.endpoint, "FSSPEC_KEEL": json.dumps(limits)}
            self.url = f"s3://{s3.BUCKET}/{self.folder.name}-{os.getpid()}"
            os.environ |= server  # for this process, past the proxy
        return self

    def __exit__(self, *_: object) -> None:
        if self.proxy is not None:
            self.proxy.close()
        if self.store == "small":
            subprocess.run(["umount", "-l", str(self.folder / "disk")], check=True, timeout=30)


class Injector(threading.Thread):
    """Strikes, one after another, the faults of a case that come from outside, each some time after its step was done.

    `struck`: {id: when it began to matter}; a fault of a store or a disk is there until it has, and nothing strikes in the
    `apart` steps after it, in which the next commits are made.
    """

    def __init__(self, place: Place, faults: list[dict[str, Any]], world: int, seed: str, apart: int) -> None:
        super().__init__(daemon=True)
        self.place, self.faults, self.world, self.apart, self.earliest = place, faults, world, apart, 0
        self.launcher = 0  # its process id
        self.struck: dict[str, float] = {}
        self.tree_killed = False  # the launcher's end was this one's doing
        self.over = threading.Event()
        self.random = random.Random(seed)

    def run(self) -> None:
        last = 0.0
        for fault in self.faults:
            if fault["kind"] not in OUTSIDE:
                continue
            while not self._ripe(fault, last):
                if self.over.wait(0.01):
                    return
            if self.over.wait(fault["delay"]):
                return
            when = self._strike(fault)
            if when is not None:
                last = self.struck[fault["id"]] = when
            if fault["kind"] in (*STORE, "disk_full"):  # saves that failed in it are another fault's loss otherwise
                self.earliest = self._progress()[0] + self.apart

    def _ripe(self, fault: dict[str, Any], last: float) -> bool:
        if fault["phase"] == "run":
            step, when = self._progress()
            return step >= max(fault["step"], self.earliest) and when > last  # goes on after what struck before
        return all(self._pid(rank) is not None for rank in range(self.world)) and self._fresh(last)

    def _fresh(self, last: float) -> bool:
        """Whether the processes were started after `last`."""
        return last == 0.0 or any(started(self._pid(rank) or 0) > last for rank in range(self.world))

    def _progress(self) -> tuple[int, float]:
        """(last step that was done, when)"""
        with open(self.place.folder / "steps", "rb") as file:
            file.seek(max(os.path.getsize(file.name) - 200, 0))
            lines = file.read().splitlines()
        if not lines:
            return 0, 0.0
        when, step, _ = lines[-1].split()
        return int(step), float(when)

    def _pid(self, rank: int) -> int | None:
        """The process that is this rank, if it lives."""
        try:
            pid = int((self.place.folder / f"pids/rank-{rank}").read_text())
            os.kill(pid, 0)
        except (OSError, ValueError):
            return None
        return pid

    def _strike(self, fault: dict[str, Any]) -> float | None:
        """When it began to matter; None: it did not."""
        kind, now = fault["kind"], time.monotonic()
        if kind in STORE:
            return self._store(kind)
        if kind == "disk_full":
            return self._disk()
        pid = self._pid(fault["rank"])
        if fault["rank"] == self.world:  # the launcher, which passes it on
            pid = self.launcher
        if pid is None or (kind == "damaged" and len(self._commits()) < 2):  # nothing to fall back to
            return None
        if kind == "sigkill_tree":
            self.tree_killed = True
            for victim in (self.launcher, *(self._pid(rank) for rank in range(self.world))):
                _kill(victim, signal.SIGKILL)
            return now
        _kill(pid, signal.SIGKILL if kind == "damaged" else SIGNALS[kind])
        if kind == "damaged":
            self._damage()
        return now

    def _commits(self) -> list[Path]:
        return sorted(path.parent for path in Path(self.place.url).glob("checkpoints/step-*/COMMITTED"))

    def _damage(self) -> None:
        """A bit of the newest commit flips, or a file is cut or goes."""
        path = self.random.choice(sorted(self._commits()[-1].glob("[!.]*")))
        how = self.random.choice(["flip", "cut", "remove"])
        if how == "remove" and path.name != "COMMITTED":  # without its marker it is none
            path.unlink()
        elif how == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            raw = bytearray(path.read_bytes())
            raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
            path.write_bytes(raw)

    def _store(self, kind: str) -> float | None:
        assert self.place.proxy is not None
        begin, before = time.monotonic(), len(self.place.proxy.requests)
        pid = self._pid(0)
        self.place.fault = STORE[kind]
        if not self.place.fault:
            self.place.proxy.stop_listening()
        try:
            noticed = self._until(lambda: self._hit(begin, before))
            if kind == "store_gone":  # until it has ended the processes, and while the next ones start
                self._until(lambda: self._pid(0) != pid)
                self.over.wait(self.random.uniform(0, 10))
            else:
                self.over.wait(self.random.uniform(0, 0.6 * DEADLINE_S))
        finally:
            if not self.place.fault:
                self.place.proxy.listen()
            self.place.fault = ""
        return noticed

    def _hit(self, begin: float, before: int) -> bool:
        assert self.place.proxy is not None
        return any(fault for *_, fault in self.place.proxy.requests[before:]) or self._failed(begin)

    def _disk(self) -> float | None:
        begin, ballast = time.monotonic(), self.place.folder / "disk/ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        noticed = self._until(lambda: self._failed(begin))
        self.over.wait(self.random.uniform(0, 0.3))
        ballast.unlink()
        return noticed

    def _failed(self, begin: float) -> bool:
        """Whether the run has noticed since `begin` that a request failed."""
        found = events(self.place.folder)
        return any(event["time"] > begin for event in found if "failed" in event)

    def _until(self, condition: Any) -> float | None:
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            if condition():
                return time.monotonic()
            if self.over.wait(0.02):
                return None
        return None


def events(folder: Path) -> list[dict[str, Any]]:
    """What the processes said so far (a line that is being written is left out)."""
    lines = (folder / "events.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def started(pid: int) -> float:
    """When a process was started, on the monotonic clock; 0 if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    since_boot = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return since_boot - (time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic())


def _kill(pid: int | None, signum: int) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)

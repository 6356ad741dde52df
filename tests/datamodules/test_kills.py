"""SIGKILL in any write of kept byte ranges and of statistics, and of a run with its workers: nothing wrong is left."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.data import FieldsConfig, FieldsData
from datamodules.stream import fetch as fetch_module
from datamodules.stream.fetch import Reader
from datamodules.stream.ranges import RangeCache

from .samples import field_values, fields_reader, write_fields

SIDE = 16
IDS = np.array([0, 3])  # in two shards
CALLS = {"fcntl": "flock", "os": "open makedirs link pwrite ftruncate replace unlink utime", "json": "dump"}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def torn(name: str, *args: Any) -> bool:
    """Do the first half of a write; whether the call is one."""
    if name == "pwrite":
        descriptor, data, start = args
        os.pwrite(descriptor, data[: len(data) // 2], start)
    elif name == "dump":
        text = json.dumps(args[0])
        args[1].write(text[: len(text) // 2])
        args[1].flush()
    return name in ("pwrite", "dump")


def survives(work: Callable[[], None], fatal: int) -> bool:
    """Do it in a process that is killed before the fatal-th call of the system, or in the middle if that is a write."""

    def child() -> None:
        count = 0

        def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == fatal:
                    die()
                if name in ("pwrite", "dump"):
                    count += 1
                    if count == fatal and torn(name, *args):
                        die()
                return call(*args, **options)

            return run

        for module, names in CALLS.items():
            for name in names.split():
                setattr(sys.modules[module], name, watched(name, getattr(sys.modules[module], name)))
        work()
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def left(root: Path, what: str) -> list[str]:
    return sorted(p.name for p in root.rglob("*") if p.is_file() and what in p.name and p.parent.name != "locks")


def reader_of(url: str, root: Path, bound: int) -> Reader:
    """The first two of seven frames of each trajectory."""
    return fields_reader(url, RangeCache(str(root), bound), frames=2, stride=7)


def test_kept_ranges(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that evicts, makes copies and keeps ranges of two shards in them, killed at each call in turn."""
    monkeypatch.setattr(fetch_module, "REMOTE_GAP", 0)
    old, new = f"{memory}/old", f"{memory}/new"
    for i, url in enumerate((old, new)):
        write_fields(url, trajectories=12, side=SIDE, extra={"nu": np.full(12, i, np.float32)})
    right = torch.from_numpy(field_values(12, 7, side=SIDE)[IDS, :2])
    bound, fatal, survived, fetched, used = 48 << 10, 0, False, set(), []
    while not survived:
        fatal += 1
        root = tmp_path / str(fatal)
        reader_of(old, root, bound).batch(np.arange(10))
        survived = survives(lambda root=root: reader_of(new, root, bound).batch(IDS), fatal)  # type: ignore[misc]
        reader = reader_of(new, root, bound)
        assert left(root, ".part") == [] and reader.ranges is not None
        used.append(reader.ranges.used())
        assert torch.equal(reader.batch(IDS)["fields"], right)
        fetched.add(reader.metrics.fetched)
        again = reader_of(new, root, bound)
        assert torch.equal(again.batch(IDS)["fields"], right) and again.metrics.fetched == 0  # room there is as before
        shutil.rmtree(root)
    window = 2 * (2 * SIDE * SIDE * 4 + 4)
    assert fetched == {0, window, 2 * window} and fatal > 40
    assert max(used) <= bound and min(np.diff(used)) < 0  # at one of the calls what was there before had left


def test_what_is_forgotten(memory: str, tmp_path: Path) -> None:
    write_fields(memory, trajectories=12, side=SIDE)
    right, outcomes, fatal, survived = torch.from_numpy(field_values(12, 7, side=SIDE)[IDS, :2]), set(), 0, False
    while not survived:
        fatal += 1
        root = tmp_path / str(fatal)
        (reader := reader_of(memory, root, 1 << 20)).batch(IDS)
        ranges, fingerprint = reader.ranges, reader.dataset.fingerprint
        assert ranges is not None
        survived = survives(lambda ranges=ranges, fingerprint=fingerprint: ranges.forget(fingerprint), fatal)  # type: ignore[misc]
        outcomes.add(len(left(root, ".some")))
        assert ranges.partial(fingerprint, "any", 1000) is None
        for _ in range(2):
            later = reader_of(memory, root, 1 << 20)
            assert torch.equal(later.batch(IDS)["fields"], right)
        assert later.metrics.fetched == 0
    assert outcomes == {2, 1, 0}


def test_statistics(memory: str, tmp_path: Path) -> None:
    write_fields(memory, trajectories=12, side=SIDE)

    def mean(root: Path) -> list[float]:
        config = FieldsConfig(url=memory, cache=str(root), train="train, frames=0:4")  # the data set's own do not serve
        data = FieldsData(config, global_batch=4)
        data.configure(1, 0)
        return data.spec()["mean"]  # type: ignore[no-any-return]

    expected, fatal, survived, outcomes = field_values(12, 7, side=SIDE)[:10, :4].mean((0, 1, 3, 4)), 0, False, set()
    while not survived:
        fatal += 1
        root = tmp_path / str(fatal)
        survived = survives(lambda root=root: mean(root), fatal)  # type: ignore[misc]
        names = left(root, "statistics-")
        whole = [name for name in names if not name.endswith(".part")]
        outcomes.add((len(whole), len(names)))
        for name in whole:
            assert json.loads(next(root.rglob(name)).read_text())["mean"] == pytest.approx(expected)
        np.testing.assert_allclose(mean(root), expected)
        RangeCache(str(root), 1 << 20)
        (name,) = left(root, "statistics-")  # what was half written is gone
        assert json.loads(next(root.rglob(name)).read_text())["mean"] == pytest.approx(expected)
    assert outcomes == {(0, 0), (0, 1), (1, 1)}


# A run with its workers


class Names:
    """Names that are made below /dev/shm meanwhile."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        assert libc.inotify_add_watch(self.descriptor, b"/dev/shm", 0x100) >= 0  # IN_CREATE

    def of(self, processes: set[int]) -> list[str]:
        """Those of torch in these processes; call it once."""
        found, at = b"", 0
        with suppress(BlockingIOError):
            while piece := os.read(self.descriptor, 1 << 16):
                found += piece
        os.close(self.descriptor)
        names = []
        while at < len(found):
            (length,) = struct.unpack_from("I", found, at + 12)
            names.append(found[at + 16 : at + 16 + length].rstrip(b"\0").decode())
            at += 16 + length
        return [name for name in names if name.startswith(tuple(f"torch_{process}_" for process in processes))]


def _train(url: str, root: str, tell: int) -> None:
    os.setsid()
    config = FieldsConfig(url=url, frames=2, stride=7, cache=root, cache_bytes=1 << 20, input_frames=1)
    data = FieldsData(config, global_batch=4, micro_batch=2)
    data.configure(1, 0)
    loader = iter(DataLoader(data.train_dataloader(), batch_size=None, num_workers=2, multiprocessing_context="fork"))
    os.write(tell, struct.pack("2i", *(worker.pid for worker in loader._workers)))  # type: ignore[attr-defined]
    for batch in loader:
        assert batch["input"].is_shared() and batch["index"].is_shared()
        os.write(tell, b".")


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this Python has no memfd_create")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_with_workers(memory: str, tmp_path: Path) -> None:
    """Trainer and workers are killed at once. Their shared memory never had a name, and their cache is sound."""
    write_fields(memory, trajectories=12, side=SIDE)
    told, tell = os.pipe()
    names = Names()
    control = torch.zeros(1).share_memory_()  # PyTorch's own way
    process = multiprocessing.get_context("fork").Process(target=_train, args=(memory, str(tmp_path), tell))
    process.start()
    os.close(tell)
    try:
        workers = struct.unpack("2i", os.read(told, 8))
        batches = sum(len(os.read(told, 1)) for _ in range(12))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join(20)
        os.close(told)
    found = names.of({os.getpid(), *workers})
    assert batches == 12 and len(found) == 1 and found[0].startswith(f"torch_{os.getpid()}_"), found
    del control
    assert left(tmp_path, ".some")
    reader = reader_of(memory, tmp_path, 1 << 20)
    assert torch.equal(reader.batch(IDS)["fields"], torch.from_numpy(field_values(12, 7, side=SIDE)[IDS, :2]))
    assert left(tmp_path, ".part") == []

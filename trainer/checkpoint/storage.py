"""Reading Keel's format with `torch.distributed.checkpoint`: raw tensor bytes and a JSON index, over any `Store`.

The stock readers unpickle their metadata; here it is plain data that says where each chunk lies, so that a checkpoint
can be read by anybody and executed by nobody. Every chunk carries its crc32c, checked when it is read.
"""

import contextlib
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future as Promise
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from datamodules.store import Store
from trainer.checkpoint.checksum import combine, crc32c
from trainer.checkpoint.errors import CorruptCheckpoint
from trainer.checkpoint.staging import as_bytes, fill

_BATCH = 64 << 20  # bytes asked for at once; two batches are on their way
_RANGE = 8 << 20  # a larger chunk comes over several connections

Chunk = dict[str, Any]


class Job(NamedTuple):
    """A chunk of a tensor that is to be read, into `place` if that is given."""

    name: str
    chunk: Chunk
    place: np.ndarray | None = None
    tag: Any = None


class ShardReader(StorageReader):
    """Reads chunks by the manifest's entries; several ranges per request, each chunk verified.

    Args:
        folder: store of one step.
        tensors: the manifest's `tensors`.
    """

    def __init__(self, folder: Store, tensors: dict[str, Any]) -> None:
        self.folder, self.tensors = folder, tensors

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=getattr(torch, entry["dtype"])),
                    torch.Size(entry["shape"]),
                    [ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["shape"])) for c in entry["chunks"]],
                )
                for name, entry in self.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        jobs: list[Job] = []
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR
            name = item.storage_index.fqn
            chunk, first = _trim(_find_chunk(self.tensors[name], item.storage_index), item)
            target = planner.resolve_tensor(item).detach()
            jobs.append(Job(name, chunk, self._place(name, chunk, target, item), (item, first, target)))
        with contextlib.closing(_fetch(self.folder, jobs)) as fetched:  # or reads might outlive an error, and write on
            for job, raw in fetched:
                if job.place is None:
                    self._copy(job, raw)
                planner.commit_tensor(job.tag[0], job.tag[2])
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _copy(self, job: Job, raw: np.ndarray) -> None:
        """The wanted part of a chunk into its tensor."""
        item, first, target = job.tag
        source = decode(raw, self.tensors[job.name]["dtype"], job.chunk["shape"])
        starts = (item.storage_offsets[0] - first, *item.storage_offsets[1:]) if first else item.storage_offsets
        for dim, (start, length) in enumerate(zip(starts, item.lengths, strict=True)):
            source = source.narrow(dim, start, length)
        fill(target, source)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False

    def _place(self, name: str, chunk: Chunk, target: torch.Tensor, item: Any) -> np.ndarray | None:
        """Memory of a tensor that takes a chunk as it is, as a sharded tensor's part mostly does."""
        whole = not any(item.storage_offsets) and list(item.lengths) == list(chunk["shape"])
        plain = target.device.type == "cpu" and target.is_contiguous()
        same = target.dtype == getattr(torch, self.tensors[name]["dtype"])
        return as_bytes(target) if whole and plain and same else None


class _Range:
    """Bytes of a chunk on their way into memory, summed while they are in the processor's cache."""

    def __init__(self, job: Job, memory: np.ndarray, start: int, stop: int) -> None:
        self.request = (job.chunk["file"], job.chunk["start"] + start, job.chunk["start"] + stop)
        self.memory, self.crc, self.sums = memory[start:stop], 0, job.chunk["crc32c"] is not None

    def __call__(self, offset: int, piece: memoryview) -> None:
        self.memory[offset : offset + len(piece)] = np.frombuffer(piece, np.uint8)
        if self.sums:
            self.crc = crc32c(piece, self.crc if offset else 0)


def decode(raw: np.ndarray, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """A chunk's bytes as a tensor of its shape, which shares their memory."""
    kind = getattr(torch, dtype)
    return torch.from_numpy(raw).view(kind).reshape(shape) if raw.size else torch.empty(shape, dtype=kind)


def read_full(folder: Store, tensors: dict[str, Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Whole tensors assembled on the CPU of one process, without a process group."""
    out = {name: torch.empty(tensors[name]["shape"], dtype=getattr(torch, tensors[name]["dtype"])) for name in names}
    jobs = []
    for name, tensor in out.items():
        for chunk in tensors[name]["chunks"]:
            place = as_bytes(tensor) if list(chunk["shape"]) == list(tensor.shape) else None
            jobs.append(Job(name, chunk, place))
    for (name, chunk, place, _), raw in _fetch(folder, jobs):
        if place is not None:
            continue
        view = out[name]
        for dim, (start, length) in enumerate(zip(chunk["offsets"], chunk["shape"], strict=True)):
            view = view.narrow(dim, start, length)
        fill(view, decode(raw, tensors[name]["dtype"], chunk["shape"]))
    return out


def _fetch(folder: Store, jobs: list[Job]) -> Generator[tuple[Job, np.ndarray], None, None]:
    """Each job with its bytes, in the order of the files; reads ahead.

    Raises:
        CorruptCheckpoint: wrong checksum; names file and tensor.
    """
    batches = _batches(sorted(jobs, key=lambda job: (job.chunk["file"], job.chunk["start"])))
    with ThreadPoolExecutor(2) as pool:
        ahead: list[Promise[list[np.ndarray]]] = []
        try:
            for index, batch in enumerate(batches):
                later = batches[index + len(ahead) : index + 2]
                ahead += [pool.submit(_read, folder, jobs) for jobs in later]
                yield from zip(batch, ahead.pop(0).result(), strict=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _read(folder: Store, jobs: list[Job]) -> list[np.ndarray]:
    """The verified bytes of each chunk; a large one comes in ranges, side by side."""
    out, parts = [], []
    for job in jobs:
        size = job.chunk["bytes"]
        memory = np.empty(size, np.uint8) if job.place is None else job.place
        if memory.size != size:
            raise _corrupt(folder, job, f"{size} bytes instead of {memory.size}")
        step = max(size, 1) if folder.is_local else _RANGE
        out.append(memory)
        parts.append([_Range(job, memory, at, min(at + step, size)) for at in range(0, size, step)])
    ranges = [part for some in parts for part in some]
    folder.read_ranges([part.request for part in ranges], ranges)
    for job, some in zip(jobs, parts, strict=True):
        found = some[0].crc if some else 0
        for part in some[1:]:
            found = combine(found, part.crc, part.memory.size)
        if job.chunk["crc32c"] not in (None, found):
            raise _corrupt(folder, job, "crc32c differs")
    return out


def _corrupt(folder: Store, job: Job, why: str) -> CorruptCheckpoint:
    where = f"{folder.join(job.chunk['file'])} is corrupt at byte {job.chunk['start']} (tensor {job.name})"
    return CorruptCheckpoint(f"{where}: {why}")


def _find_chunk(entry: dict[str, Any], index: MetadataIndex) -> Chunk:
    if index.offset is None:
        return entry["chunks"][0]
    offsets = list(index.offset)
    return next(chunk for chunk in entry["chunks"] if chunk["offsets"] == offsets)


def _trim(chunk: Chunk, item: Any) -> tuple[Chunk, int]:
    """(the rows of a chunk without a checksum that `item` wants, the first of them): of a whole foreign file a rank reads
    its own part only. A chunk with a checksum is read as a whole, to be verified."""
    if chunk["crc32c"] is not None or not chunk["shape"] or not chunk["bytes"]:
        return chunk, 0
    first, rows = int(item.storage_offsets[0]), int(item.lengths[0])
    row_bytes = chunk["bytes"] // chunk["shape"][0]
    part = {
        "shape": [rows, *chunk["shape"][1:]],
        "start": chunk["start"] + first * row_bytes,
        "bytes": rows * row_bytes,
    }
    return {**chunk, **part}, first


def _batches(jobs: list[Job]) -> list[list[Job]]:
    batches: list[list[Job]] = []
    size = _BATCH
    for job in jobs:
        if size >= _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(job)
        size += job.chunk["bytes"]
    return batches

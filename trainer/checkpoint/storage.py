"""Reading Keel's format with `torch.distributed.checkpoint`: raw tensor bytes and a JSON index, over any `Store`.

The stock readers unpickle their metadata; here it is plain data that says where each chunk lies, so that a checkpoint
can be read by anybody and executed by nobody. Every chunk carries its crc32c, checked when it is read.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future as Promise
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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
from trainer.checkpoint.checksum import crc32c
from trainer.checkpoint.errors import CorruptCheckpoint
from trainer.checkpoint.staging import fill

_BATCH = 64 << 20  # bytes asked for at once; two batches are on their way
_RANGE = 8 << 20  # a larger chunk comes over several connections

Chunk = dict[str, Any]


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
        jobs: list[tuple[str, Chunk, Any]] = []
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR
            name = item.storage_index.fqn
            chunk, first = _trim(_find_chunk(self.tensors[name], item.storage_index), item)
            jobs.append((name, chunk, (item, first)))
        for name, chunk, raw, (item, first) in _fetch(self.folder, jobs):
            source = decode(raw, self.tensors[name]["dtype"], chunk, self.folder.join(chunk["file"]), name)
            starts = (item.storage_offsets[0] - first, *item.storage_offsets[1:]) if first else item.storage_offsets
            for dim, (start, length) in enumerate(zip(starts, item.lengths, strict=True)):
                source = source.narrow(dim, start, length)
            target = planner.resolve_tensor(item).detach()
            fill(target, source)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False


def decode(raw: Any, dtype: str, chunk: Chunk, path: str, name: str) -> torch.Tensor:
    """One chunk's bytes as a tensor of its shape, without a copy: to be read only.

    Raises:
        CorruptCheckpoint: wrong length or checksum; names file and tensor.
    """
    if len(raw) != chunk["bytes"] or (chunk["crc32c"] is not None and crc32c(raw) != chunk["crc32c"]):
        raise CorruptCheckpoint(f"{path} is corrupt at byte {chunk['start']} (tensor {name}): crc32c differs")
    kind = getattr(torch, dtype)
    if not len(raw):
        return torch.empty(chunk["shape"], dtype=kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(raw, dtype=torch.uint8)
    if flat.data_ptr() % kind.itemsize:
        flat = flat.clone()
    return flat.view(kind).reshape(chunk["shape"])


def read_full(folder: Store, tensors: dict[str, Any], names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Whole tensors assembled on the CPU of one process, without a process group."""
    out = {name: torch.empty(tensors[name]["shape"], dtype=getattr(torch, tensors[name]["dtype"])) for name in names}
    jobs = [(name, chunk, None) for name in out for chunk in tensors[name]["chunks"]]
    for name, chunk, raw, _ in _fetch(folder, jobs):
        view = out[name]
        for dim, (start, length) in enumerate(zip(chunk["offsets"], chunk["shape"], strict=True)):
            view = view.narrow(dim, start, length)
        fill(view, decode(raw, tensors[name]["dtype"], chunk, folder.join(chunk["file"]), name))
    return out


def _fetch(folder: Store, jobs: list[tuple[str, Chunk, Any]]) -> Iterator[tuple[str, Chunk, Any, Any]]:
    """(tensor, chunk, bytes, tag) of each job (tensor, chunk, tag), in the order of the files; reads ahead."""
    batches = _batches(sorted(jobs, key=lambda job: (job[1]["file"], job[1]["start"])))
    with ThreadPoolExecutor(2) as pool:
        ahead: list[Promise[list[Any]]] = []
        try:
            for index, batch in enumerate(batches):
                later = batches[index + len(ahead) : index + 2]
                ahead += [pool.submit(_read, folder, [chunk for _, chunk, _ in jobs]) for jobs in later]
                found = ahead.pop(0).result()
                for (name, chunk, tag), raw in zip(batch, found, strict=True):
                    yield name, chunk, raw, tag
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _read(folder: Store, chunks: list[Chunk]) -> list[Any]:
    """The bytes of each chunk; a large one comes in ranges, side by side."""
    step = max((chunk["bytes"] for chunk in chunks), default=1) if folder.is_local else _RANGE
    pieces = [(at, start) for at, chunk in enumerate(chunks) for start in range(0, max(chunk["bytes"], 1), step)]
    ranges = [
        (chunks[at]["file"], chunks[at]["start"] + start, chunks[at]["start"] + min(start + step, chunks[at]["bytes"]))
        for at, start in pieces
    ]
    out: list[Any] = [None] * len(chunks)
    for (at, start), raw in zip(pieces, folder.read_ranges(ranges), strict=True):
        if chunks[at]["bytes"] <= step:
            out[at] = raw
            continue
        if start == 0:
            out[at] = np.empty(chunks[at]["bytes"], dtype=np.uint8)
        out[at][start : start + len(raw)] = np.frombuffer(raw, dtype=np.uint8)
    return out


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


def _batches(jobs: list[tuple[str, Chunk, Any]]) -> list[list[tuple[str, Chunk, Any]]]:
    batches: list[list[tuple[str, Chunk, Any]]] = []
    size = _BATCH
    for job in jobs:
        if size >= _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(job)
        size += job[1]["bytes"]
    return batches

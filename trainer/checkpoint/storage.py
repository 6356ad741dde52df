"""Storage of `torch.distributed.checkpoint` in Keel's format: raw tensor bytes and a JSON index, over any `Store`.

The stock writers pickle their metadata; this one keeps where each chunk lies as plain data, so that a checkpoint can
be read by anybody and executed by nobody. Every chunk carries its crc32c, checked when it is read.
"""

import os
from dataclasses import dataclass
from typing import Any

import google_crc32c
import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from datamodules.store import Store
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint

_READ_BATCH = 64 << 20


@dataclass(frozen=True)
class Chunk:
    """Where one chunk of a tensor lies. Sizes in bytes."""

    file: str
    start: int
    size: int
    crc32c: int


@dataclass(frozen=True)
class File:
    """One object of a checkpoint, as the manifest lists it."""

    path: str
    size: int
    crc32c: int


class ShardWriter(StorageWriter):
    """Writes each rank's chunks into its own objects of at most `part_bytes` (one part is held in memory at a time).

    After a save, on the coordinator, `tensors` and `files` hold the entries for the manifest.
    """

    def __init__(self, folder: Store, rank: int, part_bytes: int) -> None:
        self.folder, self.rank, self.part_bytes = folder, rank, part_bytes
        self.tensors: dict[str, Any] = {}
        self.files: list[File] = []

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        self.tensors, self.files = {}, []

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        pending: list[tuple[MetadataIndex, int, int, int]] = []
        buffer = bytearray()
        parts = 0

        def flush() -> None:
            nonlocal parts
            if not buffer:
                return
            file = File(f"rank-{self.rank:05d}-{parts:03d}.bin", len(buffer), google_crc32c.value(bytes(buffer)))
            self.folder.write(file.path, memoryview(buffer))
            for index, start, size, crc in pending:
                results.append(WriteResult(index, size, (Chunk(file.path, start, size, crc), file)))
            parts += 1
            pending.clear()
            buffer.clear()

        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise CheckpointError(f"{item.index.fqn} is not a tensor; only tensors are sharded")
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor)
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if buffer and len(buffer) + len(raw) > self.part_bytes:
                flush()
                buffer = bytearray()
            pending.append((item.index, len(buffer), len(raw), google_crc32c.value(raw)))
            buffer += raw
        flush()
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored: dict[tuple[str, Any], Chunk] = {}
        files: dict[str, File] = {}
        for result in (result for rank in results for result in rank):
            chunk, file = result.storage_data
            stored[result.index.fqn, _key(result.index.offset)] = chunk
            files[file.path] = file
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            chunks = []
            for part in entry.chunks:
                chunk = stored.get((name, _key(part.offsets))) or stored[name, None]
                chunks.append(
                    {
                        "offsets": list(part.offsets),
                        "shape": list(part.sizes),
                        "file": chunk.file,
                        "start": chunk.start,
                        "bytes": chunk.size,
                        "crc32c": chunk.crc32c,
                    }
                )
            self.tensors[name] = {
                "dtype": str(entry.properties.dtype).removeprefix("torch."),
                "shape": list(entry.size),
                "chunks": chunks,
            }
        self.files = sorted(files.values(), key=lambda file: file.path)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False


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
        jobs = []
        for item in plan.items:
            assert item.type == LoadItemType.TENSOR
            entry = self.tensors[item.storage_index.fqn]
            jobs.append((item, entry, _find_chunk(entry, item.storage_index)))
        jobs.sort(key=lambda job: (job[2]["file"], job[2]["start"]))
        for batch in _batches(jobs):
            ranges = [(chunk["file"], chunk["start"], chunk["start"] + chunk["bytes"]) for _, _, chunk in batch]
            for (item, entry, chunk), raw in zip(batch, self.folder.read_ranges(ranges), strict=True):
                source = decode(raw, entry["dtype"], chunk, self.folder.join(chunk["file"]), item.storage_index.fqn)
                for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                    source = source.narrow(dim, start, length)
                target = planner.resolve_tensor(item).detach()
                target.copy_(source)
                planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return False


def decode(raw: bytes, dtype: str, chunk: dict[str, Any], path: str, name: str) -> torch.Tensor:
    """One chunk's bytes as a tensor of its shape.

    Raises:
        CorruptCheckpoint: wrong length or checksum; names file and tensor.
    """
    if len(raw) != chunk["bytes"] or google_crc32c.value(bytes(raw)) != chunk["crc32c"]:
        raise CorruptCheckpoint(f"{path} is corrupt at byte {chunk['start']} (tensor {name}): crc32c differs")
    kind = getattr(torch, dtype)
    if not raw:
        return torch.empty(chunk["shape"], dtype=kind)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(kind).reshape(chunk["shape"])


def read_full(folder: Store, tensors: dict[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
    """Whole tensors assembled on the CPU of one process, without a process group."""
    out = {}
    for name in names:
        entry = tensors[name]
        whole = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        ranges = [(chunk["file"], chunk["start"], chunk["start"] + chunk["bytes"]) for chunk in entry["chunks"]]
        for chunk, raw in zip(entry["chunks"], folder.read_ranges(ranges), strict=True):
            part = decode(raw, entry["dtype"], chunk, folder.join(chunk["file"]), name)
            view = whole
            for dim, (start, length) in enumerate(zip(chunk["offsets"], chunk["shape"], strict=True)):
                view = view.narrow(dim, start, length)
            view.copy_(part)
        out[name] = whole
    return out


def _find_chunk(entry: dict[str, Any], index: MetadataIndex) -> dict[str, Any]:
    if index.offset is None:
        return entry["chunks"][0]
    offsets = list(index.offset)
    return next(chunk for chunk in entry["chunks"] if chunk["offsets"] == offsets)


def _batches(jobs: list[Any]) -> list[list[Any]]:
    batches: list[list[Any]] = []
    size = _READ_BATCH
    for job in jobs:
        if size >= _READ_BATCH:
            batches.append([])
            size = 0
        batches[-1].append(job)
        size += job[2]["bytes"]
    return batches


def _key(offset: torch.Size | None) -> tuple[int, ...] | None:
    return None if offset is None else tuple(offset)

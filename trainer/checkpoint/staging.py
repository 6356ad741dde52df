"""From live tensors to objects in a store: copied to host memory, hashed, uploaded by a few threads.

A background save copies all that a rank writes into one host buffer (`Image`: kept and reused, pinned where the tensors lie on
CUDA) that already has the layout of the files, so that nothing is copied or converted again. A blocking save goes
through a few buffers of one file each.
"""

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import torch

from datamodules.store import Store
from trainer.checkpoint.plan import FilePlan, Placed, Plan, held

T = TypeVar("T")
R = TypeVar("R")

_HASHED_AT_ONCE = 4 << 20  # bytes; the hash holds the interpreter lock, which training wants too
_THREADS = 4  # uploads at once and rank


@dataclass(frozen=True)
class Written:
    """What one rank has put into the store: entries of the manifest."""

    files: list[dict[str, Any]]
    chunks: list[tuple[str, dict[str, Any]]]  # (tensor, chunk)


class Image:
    """The bytes of one rank in host memory, laid out as its files."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)

    @property
    def bytes(self) -> int:
        return self._buffer.numel()

    def fill(self, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copies what `plan` says; returns when all of it is there."""
        end = plan.files[-1].begin + plan.files[-1].size if plan.files else 0
        device = next((tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"), None)
        if self._buffer.numel() != end:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # freed before the new one is made
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device is not None)
        for file in plan.files:
            copy(file, tensors, self._buffer[file.begin : file.begin + file.size], wait=False)
        if device is not None:
            torch.cuda.current_stream(device).synchronize()

    @contextmanager
    def content(self, file: FilePlan) -> Iterator[np.ndarray]:
        yield self._buffer[file.begin : file.begin + file.size].numpy()


class Buffers:
    """A few file buffers through which a blocking save goes; content is copied when an upload asks for it.

    They are kept for the next save: to touch fresh memory costs more than to write it.
    """

    def __init__(self) -> None:
        self._tensors: Mapping[str, torch.Tensor] = {}
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._size = self._count = 0

    def prepare(self, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> None:
        """What the next upload reads."""
        self._tensors = tensors
        size = max((file.size for file in plan.files), default=0)
        if size > self._size:
            self._free, self._size, self._count = queue.SimpleQueue(), size, 0
        while self._count < min(_THREADS, len(plan.files)):
            self._free.put(torch.empty(self._size, dtype=torch.uint8))
            self._count += 1

    @contextmanager
    def content(self, file: FilePlan) -> Iterator[np.ndarray]:
        buffer = self._free.get()
        try:
            copy(file, self._tensors, buffer[: file.size], wait=True)
            yield buffer[: file.size].numpy()
        finally:
            self._free.put(buffer)


def copy(file: FilePlan, tensors: Mapping[str, torch.Tensor], target: torch.Tensor, *, wait: bool) -> None:
    """The content of a file from live tensors into `target` (uint8, `file.size` elements)."""
    end = 0
    for placed in file.chunks:
        piece = placed.piece
        target[end : placed.start].zero_()
        end = placed.start + piece.bytes
        source = held(tensors[piece.name], placed.box)
        for dim, (start, length) in enumerate(zip(placed.local, piece.sizes, strict=True)):
            source = source.narrow(dim, start, length)
        fill(target[placed.start : end].view(source.dtype).view(piece.sizes), source, wait=wait)


def fill(target: torch.Tensor, source: torch.Tensor, *, wait: bool = True) -> None:
    """`target` becomes a copy of `source`, of the same shape. Between plain memory of one dtype torch is gone around: it
    would start and join its threads for every tensor, which on a busy machine costs more than the copy."""
    plain = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (target, source))
    if plain and target.dtype == source.dtype:
        np.copyto(_bytes(target), _bytes(source))
    else:
        target.copy_(source, non_blocking=not wait)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.reshape(-1).view(torch.uint8).numpy()


def upload(folder: Store, plan: Plan, source: Image | Buffers, prefix: str = "") -> Written:
    """Hashes and writes all files of a rank, under names that begin with `prefix`.

    Raises:
        StoreError: the store refused; uploads that had begun are over by then, the others are not begun.
    """

    def one(file: FilePlan) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
        with source.content(file) as data:
            path = prefix + file.path
            chunks = [(placed.piece.name, _entry(path, placed, data)) for placed in file.chunks]
            folder.write(path, data.data)
            return {"path": path, "size": file.size, "crc32c": crc32c(data)}, chunks

    done = in_parallel(one, plan.files, _THREADS)
    return Written([file for file, _ in done], [chunk for _, chunks in done for chunk in chunks])


def in_parallel(call: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """`call` of each item by some threads; after the first error nothing further is begun, and it is raised."""
    if len(items) <= 1:
        return [call(item) for item in items]
    with ThreadPoolExecutor(max_workers=min(threads, len(items))) as pool:
        try:
            return list(pool.map(call, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _entry(path: str, placed: Placed, data: np.ndarray) -> dict[str, Any]:
    piece = placed.piece
    return {
        "offsets": list(piece.offsets),
        "shape": list(piece.sizes),
        "file": path,
        "start": placed.start,
        "bytes": piece.bytes,
        "crc32c": crc32c(data[placed.start : placed.start + piece.bytes]),
    }


def crc32c(data: Any) -> int:
    """CRC-32C of anything with the buffer protocol; without a copy, in pieces."""
    view = np.frombuffer(data, dtype=np.uint8) if len(data) else np.empty(0, dtype=np.uint8)
    value = 0
    for start in range(0, len(view), _HASHED_AT_ONCE):
        value = google_crc32c.extend(value, view[start : start + _HASHED_AT_ONCE])
    return value


def tensor_table(plan: Plan, written: list[Written]) -> dict[str, Any]:
    """The manifest's `tensors`: name -> dtype, shape and where each chunk lies."""
    table: dict[str, Any] = {
        name: {"dtype": dtype, "shape": list(shape), "chunks": []} for name, (dtype, shape) in plan.tensors.items()
    }
    for part in written:
        for name, chunk in part.chunks:
            table[name]["chunks"].append(chunk)
    for entry in table.values():
        entry["chunks"].sort(key=lambda chunk: chunk["offsets"])
    return table

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

import numpy as np
import torch

from datamodules.store import Store
from trainer.checkpoint.checksum import combine, crc32c
from trainer.checkpoint.plan import FilePlan, Placed, Plan, held

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 4  # uploads at once and rank
_COPIERS = 8  # threads at most that fill an image
_HASHED_AGAIN = 1 << 20  # bytes up to which to hash a chunk twice costs less than to combine hashes


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
        plain: Copies = []
        for file in plan.files:
            copy(file, tensors, self._buffer[file.begin : file.begin + file.size], wait=False, plain=plain)
        _copy_all(plain)
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


Copies = list[tuple[np.ndarray, np.ndarray]]  # (target, source), bytes in plain memory


def copy(
    file: FilePlan,
    tensors: Mapping[str, torch.Tensor],
    target: torch.Tensor,
    *,
    wait: bool,
    plain: Copies | None = None,
) -> None:
    """The content of a file from live tensors into `target` (uint8, `file.size` elements). What is in `plain` afterwards
    is left to the caller."""
    end = 0
    for placed in file.chunks:
        piece = placed.piece
        target[end : placed.start].zero_()
        end = placed.start + piece.bytes
        source = held(tensors[piece.name], placed.box)
        for dim, (start, length) in enumerate(zip(placed.local, piece.sizes, strict=True)):
            source = source.narrow(dim, start, length)
        fill(target[placed.start : end].view(source.dtype).view(piece.sizes), source, wait=wait, plain=plain)


def fill(target: torch.Tensor, source: torch.Tensor, *, wait: bool = True, plain: Copies | None = None) -> None:
    """`target` becomes a copy of `source`, of the same shape. Between plain memory of one dtype torch is gone around: it
    would start and join its threads for every tensor, which on a busy machine costs more than the copy. With `plain` such
    a copy is noted there in place of being made."""
    simple = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in (target, source))
    if simple and target.dtype == source.dtype:
        if plain is None:
            np.copyto(as_bytes(target), as_bytes(source))
        else:
            plain.append((as_bytes(target), as_bytes(source)))
    else:
        target.copy_(source, non_blocking=not wait)


def _copy_all(copies: Copies) -> None:
    """Makes them, in as many threads as torch computes with: one alone does not fill the path to memory."""
    total, threads = sum(len(target) for target, _ in copies), min(torch.get_num_threads(), _COPIERS)
    shares: list[Copies] = [[] for _ in range(threads)]
    done = 0
    for target, source in copies:
        at = 0
        while at < len(target):  # a large one is cut where a share is full
            share = min(done * threads // max(total, 1), threads - 1)
            size = max(1, min(len(target) - at, -(-(share + 1) * total // threads) - done))
            shares[share].append((target[at : at + size], source[at : at + size]))
            at, done = at + size, done + size

    def make(share: Copies) -> None:
        for target, source in share:
            np.copyto(target, source)

    in_parallel(make, [share for share in shares if share], threads)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
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
            value = _of_file([chunk for _, chunk in chunks], data)
            return {"path": path, "size": file.size, "crc32c": value}, chunks

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


def _of_file(chunks: Sequence[Mapping[str, Any]], data: np.ndarray) -> int:
    """The CRC-32C of a file, from those of its chunks: large ones are not read again."""
    value = end = 0
    for chunk in chunks:
        value = crc32c(data[end : chunk["start"]], value)
        end = chunk["start"] + chunk["bytes"]
        if chunk["bytes"] > _HASHED_AGAIN:
            value = combine(value, chunk["crc32c"], chunk["bytes"])
        else:
            value = crc32c(data[chunk["start"] : end], value)
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

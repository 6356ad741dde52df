"""From sample ids to a batch: plan the byte ranges, read them together, verify and decode them into one tensor."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.format import DataError, Dataset, Piece
from datamodules.store import NoBucket, NotFound, ShortRead

from .cache import ShardCache
from .files import File, Files, Scratch
from .windows import Windows

REMOTE_GAP = 256 << 10  # bytes that cost less to read and drop than a second request does
MAX_BLOCK = 16 << 20  # bytes of one coalesced request


@dataclass
class Metrics:
    """Counters of a stream since it was made; ``snapshot`` copies them.

    ``fetched``: bytes that came from the store; ``used``: bytes of the batches made; ``wait``: seconds that the consumer
    waited for a batch; ``hits`` and ``misses``: cached shards opened and downloaded.
    """

    batches: int = 0
    samples: int = 0
    fetched: int = 0
    used: int = 0
    wait: float = 0.0
    hits: int = 0
    misses: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def snapshot(self) -> dict[str, float]:
        with self._lock:
            return {name: value for name, value in vars(self).items() if not name.startswith("_")}


class Block(NamedTuple):
    """One byte range ``[start, stop)`` of an object, and the pieces of it with the rows of the batch they go to."""

    path: str
    start: int
    stop: int
    members: list[tuple[Piece, int]]


def coalesce(pieces: Sequence[tuple[Piece, int]], gap: int) -> list[Block]:
    """Ranges that cover all (piece, row), merging those of one object that are at most ``gap`` bytes apart.

    Blocks grow to ``MAX_BLOCK`` bytes at most, unless a single piece is larger or pieces overlap.
    """
    blocks: list[Block] = []
    for piece, row in sorted(pieces, key=lambda p: (p[0].path, p[0].start, p[0].stop)):
        last = blocks[-1] if blocks else None
        if last is not None and last.path == piece.path and piece.start <= last.stop + gap:
            stop = max(last.stop, piece.stop)
            if piece.start < last.stop or stop - last.start <= MAX_BLOCK:
                last.members.append((piece, row))
                blocks[-1] = last._replace(stop=stop)
                continue
        blocks.append(Block(piece.path, piece.start, piece.stop, [(piece, row)]))
    return blocks


class Reader:
    """Reads batches of ``windows`` of ``dataset``; safe to use from several threads.

    ``batch`` raises ``DataError`` for bytes that do not match their checksum (after reading them once more, unless the
    data set is local), and for missing or truncated objects, and ``StoreError`` where the store fails.
    """

    def __init__(self, dataset: Dataset, windows: Windows, cache: ShardCache | None, metrics: Metrics) -> None:
        self.dataset, self.windows, self.metrics = dataset, windows, metrics
        self.cache = None if dataset.store.is_local else cache
        self.gap = 0 if dataset.store.is_local or cache else REMOTE_GAP
        self._files = Files()
        self._scratch = Scratch()

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample in a batch."""
        return int(np.prod(self.windows.shape)) * self.windows.dtype.itemsize

    def batch(self, samples: NDArray[np.int64]) -> dict[str, Tensor]:
        """``{key: [B, *shape], "index": int64 [B]}`` in this order of samples; pinned once CUDA is in use."""
        pin = torch.cuda.is_initialized()
        data = torch.empty((len(samples), *self.windows.shape), dtype=self.windows.dtype, pin_memory=pin)
        index = torch.from_numpy(np.array(samples, np.int64))
        rows, plan, window = data.numpy(), self.windows.array.plan, self.windows.window
        pieces = [(piece, row) for row, sample in enumerate(samples.tolist()) for piece in plan(*window(sample))]
        blocks = coalesce(pieces, self.gap)
        for block, content in self._contents(blocks):
            try:
                self._decode(block, content, rows)
            except DataError:
                if self.dataset.store.is_local:
                    raise  # the file is what it is
                self._decode(block, self._again(block), rows)
        local = sum(block.stop - block.start for block in blocks) if self.dataset.store.is_local else 0
        self.metrics.add(batches=1, samples=len(samples), used=data.nbytes, fetched=local)
        return {self.windows.key: data, "index": index.pin_memory() if pin else index}

    def _decode(self, block: Block, content: memoryview, rows: NDArray[np.generic]) -> None:
        for piece, row in block.members:
            self.windows.array.decode(piece, content[piece.start - block.start : piece.stop - block.start], rows[row])

    def _contents(self, blocks: Sequence[Block]) -> Iterator[tuple[Block, memoryview]]:
        """Each block with its bytes, valid until the next: from files where there are any, the others in one request."""
        remote: list[Block] = []
        for path, group in groupby(blocks, key=lambda block: block.path):
            members = list(group)
            file = self._file(path)
            for block in members:
                content = file.read(block.start, block.stop, self._scratch) if file else None
                if content is None:
                    remote.append(block)
                    continue
                yield block, content
        if not remote:
            return
        try:
            fetched = self.dataset.store.read_ranges([(block.path, block.start, block.stop) for block in remote])
        except NoBucket:
            raise
        except (ShortRead, NotFound) as error:  # the manifest lists the object, so the data set is damaged
            raise DataError(str(error)) from error
        self.metrics.add(fetched=sum(map(len, fetched)))
        for block, data in zip(remote, fetched, strict=True):
            yield block, memoryview(data)

    def _again(self, block: Block) -> memoryview:
        """The bytes of a block from the store once more, past a cached copy, which is dropped."""
        if self.cache is not None:
            self.cache.drop(self.dataset.fingerprint, block.path)
            self._files.forget(block.path)
        return next(self._contents([block]))[1]

    def _file(self, path: str) -> File | None:
        """The shard as a file: the data set's own or the cached copy. ``None``: ask the store, which also tells what is wrong."""
        store, cache = self.dataset.store, self.cache
        if store.is_local:
            return self._files.get(path, lambda: File.open(store.local_path(path)))
        if cache is None:
            return None
        info = self.dataset.objects[path]

        def fetch() -> File | None:
            descriptor, fetched = cache.open(store, self.dataset.fingerprint, path, info.size, info.crc32)
            self.metrics.add(
                fetched=fetched, misses=int(fetched > 0), hits=int(fetched == 0 and descriptor is not None)
            )
            return None if descriptor is None else File(descriptor)

        return self._files.get(path, fetch)

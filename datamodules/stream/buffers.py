"""Memory of batches, used again once nobody can see it any more.

Fresh memory costs a page fault for every 4 KiB, which is more than reading the bytes. A slab is therefore lent as a numpy
array that views it, and comes back when that array is destroyed: a tensor made of the array, all views of it and all
arrays of those keep it alive, so a consumer that holds on to a batch keeps its values, and simply costs new memory.
"""

from __future__ import annotations

import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from datamodules.format.codecs import CHECKSUM_BYTES

PAGE = 4096
KEEP = 8  # free slabs that a pool keeps; more than the batches that a stream reads ahead by default
Bytes = NDArray[np.uint8]


class Slab:
    """``rows`` rows of ``chunks`` payloads of ``payload`` bytes back to back, and a place for the checksum of each.

    ``parts``: memoryviews ``[payload 0, checksum 0, payload 1, ...]``, for scattered reads. ``payloads``: the payloads as
    arrays.
    """

    def __init__(self, memory: Bytes, rows: int, chunks: int, payload: int) -> None:
        self.memory = memory
        count = rows * chunks
        self.payloads = list(memory[: count * payload].reshape(count, payload))
        tails = np.zeros((count, CHECKSUM_BYTES), np.uint8)
        self.parts = [part for i, body in enumerate(self.payloads) for part in (body.data, tails[i].data)]
        self.shape = (chunks, payload)

    def fits(self, chunks: int, payload: int) -> bool:
        """Whether rows consist of so many payloads of so many bytes."""
        return self.shape == (chunks, payload)

    def select(self, rows: NDArray[np.int64]) -> Rows:
        """Some rows of this slab, as if they were all."""
        return Rows(self, rows)


class Rows:
    """``rows`` of a slab: what a read needs of ``Slab``."""

    def __init__(self, slab: Slab, rows: NDArray[np.int64]) -> None:
        chunks = slab.shape[0]
        slots = (rows[:, None] * chunks + np.arange(chunks)).reshape(-1).tolist()
        self.payloads = [slab.payloads[i] for i in slots]
        self.parts = [part for i in slots for part in slab.parts[2 * i : 2 * i + 2]]


def aligned(size: int) -> Bytes:
    """``size`` bytes that begin at a page."""
    memory = np.empty(size + PAGE, np.uint8)
    skip = -memory.ctypes.data % PAGE
    return memory[skip : skip + size]


class Pool:
    """Slabs by (rows, chunks, payload). Thread-safe; picklable and fork-safe, as neither carries memory along."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, int, int], list[Slab]] = {}
        self._lock = threading.RLock()  # a slab may come back by garbage collection inside `take`

    def take(self, rows: int, chunks: int, payload: int) -> tuple[Slab, Bytes]:
        """A slab, and the array uint8 [rows * chunks * payload] whose end of life gives it back."""
        key = (rows, chunks, payload)
        with self._lock:
            free = self._free.get(key)
            slab = free.pop() if free else None
        if slab is None:
            slab = Slab(aligned(rows * chunks * payload), *key)
        lent: Bytes = np.frombuffer(slab.memory, np.uint8)
        weakref.finalize(lent, self._give_back, key, slab).atexit = False
        return slab, lent

    def _give_back(self, key: tuple[int, int, int], slab: Slab) -> None:
        with self._lock:
            free = self._free.setdefault(key, [])
            if len(free) < KEEP:
                free.append(slab)

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        Pool.__init__(self)

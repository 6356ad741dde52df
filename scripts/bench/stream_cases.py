"""What the stream benchmark reads: needs numpy alone, as it is imported in the environments of all libraries."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass

import numpy as np

BATCH = 16
SHARD_BYTES = 16 << 20
SEQUENCE = 2048


@dataclass(frozen=True)
class Case:
    """One kind of samples.

    shape: of a stored item; `items` of them. dtype: as stored.
    window: leading frames of an item that make a sample; 0 for the whole item.
    """

    name: str
    items: int
    shape: tuple[int, ...]
    dtype: str
    window: int = 0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        return (self.window, *self.shape[1:]) if self.window else self.shape

    @property
    def item_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    @property
    def sample_bytes(self) -> int:
        return int(np.prod(self.sample_shape)) * np.dtype(self.dtype).itemsize

    @property
    def per_shard(self) -> int:
        return max(1, SHARD_BYTES // self.item_bytes)

    @property
    def data(self) -> str:
        """Cases of the same data share files."""
        return f"{'trajectories' if self.name == 'windows' else self.name}-{self.items}"


def cases(quick: bool) -> dict[str, Case]:
    """All cases; `quick` shrinks the numbers of items."""
    n = 320 if quick else 2000
    t = 32 if quick else 384
    found = [
        Case("fields", n, (4, 128, 128), "float32"),
        Case("trajectories", t, (64, 2, 64, 64), "float32"),
        Case("windows", t, (64, 2, 64, 64), "float32", window=8),
        Case("tokens", 1024 if quick else 32768, (SEQUENCE + 1,), "uint16"),
    ]
    return {case.name: case for case in found}


def item(case: Case, i: int) -> np.ndarray:
    """Item i: noise, with i itself as the first entry, so that readers can be checked.

    Sequences overlap in one token, as inputs and targets do: the last token of i is the first of i + 1.
    """
    generator = np.random.default_rng(i)
    if case.dtype == "uint16":
        values = generator.integers(0, 50000, case.shape, dtype="u2")
        values[0], values[-1] = i, i + 1
        return values
    values = generator.standard_normal(case.shape, dtype="f4")
    values.reshape(-1)[0] = i
    return values


def cpu_since(before: resource.struct_rusage) -> float:
    """CPU seconds of this process, user and system, since `before`."""
    now = resource.getrusage(resource.RUSAGE_SELF)
    return now.ru_utime + now.ru_stime - before.ru_utime - before.ru_stime


def forget(folder: str) -> None:
    """Drop the files below a folder from the page cache (they must have been written out)."""
    for parent, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(handle)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)

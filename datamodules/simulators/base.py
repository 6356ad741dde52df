"""What `make` needs of a generator."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import numpy as np

from datamodules.format import ArraySpec

_worker: int | None = None


def worker() -> int | None:
    """The number of this process among the workers of `make`, from 0; None in any other process."""
    return _worker


def set_worker(number: int) -> None:
    """Say which worker of `make` this process is."""
    global _worker
    _worker = number


class Generator(Protocol):
    """Computes a data set shard by shard. The values of a shard are a pure function of (config, seed, array, k).

    It is pickled to the processes that compute shards, after specs, attributes and source were asked for.
    """

    config_class: ClassVar[type]
    version: ClassVar[int]  # raised when the same config and seed give other bytes
    config: Any

    def __init__(self, config: Any, seed: int, shard_bytes: int) -> None: ...

    def specs(self) -> dict[str, ArraySpec]:
        """The arrays by name."""
        ...

    def attributes(self) -> dict[str, Any]:
        """Group attributes: `kind`, `array`, `splits` and what describes the data; plain JSON."""
        ...

    def source(self) -> dict[str, Any]:
        """What the values depend on besides config and seed (a digest of input files); {} if nothing."""
        ...

    def values(self, name: str, k: int) -> np.ndarray:
        """Shard k of an array, [extent of shard k, *shape[1:]]."""
        ...


def split_ranges(**lengths: int) -> dict[str, list[int]]:
    """Consecutive [start, stop) for each split in the order given; empty splits are left out."""
    ranges, start = {}, 0
    for name, length in lengths.items():
        if length:
            ranges[name] = [start, start + length]
        start += length
    return ranges

"""Counters of a stream."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Metrics:
    """Counters of a stream since it was made; ``snapshot`` copies them. Each process counts what it does itself.

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

    def __getstate__(self) -> dict[str, Any]:
        return self.snapshot()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

"""Notices that a data set was replaced while it is being read."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable

from datamodules.format import DataError, Dataset
from datamodules.format.dataset import MANIFEST
from datamodules.store import NoBucket, NotFound, StoreError

SECONDS = 60.0  # between two looks at the manifest


class Watch:
    """Looks at the manifest now and then: ``check`` raises ``DataError`` once it is not the one that was opened.

    Checksums tell a damaged chunk from an intact one, but not an intact chunk of other data. Thread-safe.
    """

    def __init__(self, dataset: Dataset, seconds: float = SECONDS, clock: Callable[[], float] = time.monotonic) -> None:
        self.dataset, self.seconds, self.clock = dataset, seconds, clock
        self._next = clock() + (0 if dataset.store.is_local else seconds)  # a local look costs a few microseconds
        self._seen: tuple[int, int, int] | None = None
        self._lock = threading.Lock()

    def check(self, now: bool = False) -> None:
        """Look if it is time to, or ``now``."""
        if not now and self.clock() < self._next:
            return
        with self._lock:
            if not now and self.clock() < self._next:
                return
            self._look()
            self._next = self.clock() + self.seconds

    def _look(self) -> None:
        store, expected = self.dataset.store, self.dataset.fingerprint
        seen = None
        try:
            if store.is_local:
                status = os.stat(store.local_path(MANIFEST))
                seen = (status.st_ino, status.st_size, status.st_mtime_ns)
                if seen == self._seen:
                    return
            found = hashlib.sha256(store.read(MANIFEST)).hexdigest()
        except (FileNotFoundError, NotFound) as error:
            if isinstance(error, NoBucket):
                raise
            raise DataError(f"{store.url}: the data set was removed while it was read; restore it and resume") from None
        except StoreError:
            return  # what is needed may be cached; a store that is really gone shows where it is needed
        if found != expected:
            raise DataError(
                f"{store.url}: the data set changed while it was read (fingerprint {expected[:12]} is now {found[:12]}); "
                f"put the old one back and resume, or begin a new run"
            )
        self._seen = seen

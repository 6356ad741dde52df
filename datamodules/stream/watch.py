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
        self._turn = threading.Lock()
        self._found: Exception | None = None

    def check(self, now: bool = False) -> None:
        """Raise what the last look found; look if it is time to, or ``now``.

        Nobody waits for a look at a remote store that is not ``now``: while the store is out, which may take a minute to
        find, training goes on from the cache.
        """
        if now:
            self._look()
            return
        if self.clock() >= self._next and self._turn.acquire(blocking=False):
            if self.dataset.store.is_local:
                self._take_turn()
            else:
                threading.Thread(target=self._take_turn, name="keel-watch", daemon=True).start()
        found = self._found
        if found is not None:
            self._found, self._next = None, self.clock()  # whoever goes on nevertheless is told again
            raise found

    def _take_turn(self) -> None:
        try:
            self._look()
        except Exception as error:
            self._found = error
        finally:
            self._next = self.clock() + self.seconds
            self._turn.release()

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

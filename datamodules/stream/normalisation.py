"""Per-channel statistics of the samples that a run trains on, where the data set does not tell them."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from typing import Any

from datamodules.format import Array, Dataset, statistics

from .cache import default_root
from .fetch import Reader
from .metrics import Metrics
from .splits import Split
from .stream import spread
from .windows import FieldWindows

LIMIT = 256 << 20  # bytes read at most; of a larger selection evenly spaced frames
BLOCK = 16 << 20  # bytes read at once


def statistics_of(dataset: Dataset, array: Array, split: Split, cache: str | None = None) -> dict[str, list[float]]:
    """``mean``, ``std``, ``min`` and ``max`` per channel of the frames of a split, the same wherever they are asked for.

    Those stored in the data set are meant for all frames of its main array's train split; for others frames are read.
    For remote data the result is kept in the folder ``cache`` of the shard cache ("": the default one; None: nowhere).
    """
    windows = FieldWindows(array, split.first, split.last, 1, begin=split.begin, end=split.end, only=split.only)
    whole = split.only is None and windows.stop - windows.begin == array.shape[1]
    stored = dataset.attributes.get("statistics")
    if stored and whole and array is dataset.main and (split.first, split.last) == dataset.splits.get("train"):
        return dict(stored)
    if dataset.store.is_local or cache is None:
        return _read(dataset, windows)
    name = hashlib.sha256(f"{windows.identity} {LIMIT}".encode()).hexdigest()[:16]
    path = os.path.join(os.path.abspath(cache or default_root()), dataset.fingerprint[:16], f"statistics-{name}")
    with suppress(OSError, ValueError), open(path) as file:
        held: dict[str, list[float]] = json.load(file)
        return held
    found = _read(dataset, windows)
    with suppress(OSError):  # it can be read again
        os.makedirs(os.path.dirname(path), exist_ok=True)
        part = f"{path}.{os.getpid()}.part"
        with open(part, "w") as file:
            json.dump(found, file)
        os.replace(part, path)
    return found


def _read(dataset: Dataset, windows: FieldWindows) -> dict[str, list[float]]:
    reader = Reader(dataset, windows, None, Metrics())
    ids = spread(windows.samples, max(1, LIMIT // reader.sample_bytes))
    step = max(1, BLOCK // reader.sample_bytes)
    whole: dict[str, Any] = {}
    for first in range(0, len(ids), step):
        values = reader.batch(ids[first : first + step])[windows.key][:, 0].numpy()
        whole = statistics.combine([whole, statistics.partial(values, 1, finite=False)])
    return statistics.merge([whole])

"""What a sample is: the map from sample ids to windows of an array, for simulations and for text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.format import Array, DataError

AXES = ("trajectory", "time", "channel")  # of fields, before those of space
Ids = NDArray[np.int64]


class Located(NamedTuple):
    """Where samples lie, int64 [B] each: entry of axis 0, first entry of the window axis, distance of the next ones.

    For arrays whose window axis is axis 0 (text), ``lead`` is 0.
    """

    lead: Ids
    start: Ids
    step: Ids


class Windows(Protocol):
    """Samples ``0 .. samples - 1`` of one split; ``group`` consecutive ones lie in about one shard."""

    @property
    def key(self) -> str:
        """Name of the batch entry."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def array(self) -> Array: ...

    @property
    def samples(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def touched(self) -> int:
        """Shards that a group lies in, at most."""

    @property
    def entries(self) -> int:
        """Entries of the window axis in one sample."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: ``[entries, *frame shape]``."""

    @property
    def share(self) -> float:
        """Part of the bytes of the shards it touches that an epoch uses, in (0, 1]."""

    @property
    def identity(self) -> str:
        """Digest of what the ids mean: two streams whose identities agree read the same bytes for the same id."""

    @property
    def marks(self) -> int | None:
        """The value that tells documents apart, if batches say which are which."""

    def locate(self, ids: Ids) -> Located: ...

    def views(self, data: Tensor) -> dict[str, Tensor]:
        """The entries of a batch that follow from ``data`` [B, *shape]."""

    def labels(self, ids: Ids) -> dict[str, Tensor]:
        """Further entries, [B, ...], that follow from the ids."""


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class FieldWindows:
    """Windows of ``frames`` frames, ``spacing`` apart, of trajectories ``[first, last)``.

    A sample is float32 ``[frames, C, *S]``. Windows begin every ``stride`` frames, within the frames ``[begin, end)``
    (``end=0``: the last); ids run over the starts of a trajectory first, and a tail of fewer than ``stride`` starts forms
    no window. With ``pairs`` a sample is two frames ``i < j`` of a trajectory, each such pair once (all2all training,
    Poseidon, arXiv:2405.19101), at most ``max_lead`` frames apart (0: any), and the batch has ``lead``, int64 [B], ``j - i``.

    ``only``: ascending trajectories of ``[first, last)`` to keep. ``inputs``: split the window into ``input``, its first
    ``inputs`` frames, and ``target``, the others, instead of ``fields``. ``extras``: values [trajectory, ...] of all
    trajectories, of which a batch has those of its samples. ``DataError`` if there is no window at all.
    """

    array: Array
    first: int
    last: int
    frames: int
    stride: int = 1
    spacing: int = 1
    begin: int = 0
    end: int = 0
    pairs: bool = False
    max_lead: int = 0
    only: Ids | None = None
    inputs: int = 0
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    key = "fields"
    dtype = torch.float32
    marks = None

    def __post_init__(self) -> None:
        array, name = self.array, self.array.name
        # Axes of other extents than those of the main array have names of their own, such as channel_2.
        pairs = zip_longest(array.dimensions[:3], AXES, fillvalue="")
        if array.window_axis != 1 or not all(a == b or a.startswith(f"{b}_") for a, b in pairs):
            raise DataError(
                f"{name}: has axes {', '.join(array.dimensions)}; windows need trajectory, time, channel and space"
            )
        if not self.count:
            raise DataError(f"{name}: the split [{self.first}, {self.last}) holds no trajectory; choose another")
        if not 0 <= self.begin < self.stop <= array.shape[1]:
            raise DataError(
                f"{name}: frames {self.begin}:{self.stop} are empty or exceed the {array.shape[1]} of a trajectory"
            )
        if self.pairs and self.frames != 2:
            raise DataError(f"{name}: pairs have two frames, not {self.frames}; unset pairs or ask for one step")
        if self.span > self.stop - self.begin:
            whole = self.stop - self.begin == array.shape[1]
            of = "" if whole else f" (frames {self.begin}:{self.stop})"
            apart = "" if self.spacing == 1 else f", {self.spacing} apart,"
            raise DataError(
                f"{name}: a window of {self.frames} frames{apart} is longer than the trajectories "
                f"of {self.stop - self.begin}{of}; ask for fewer input frames or rollout steps"
            )

    @property
    def count(self) -> int:
        """Trajectories."""
        return max(0, self.last - self.first) if self.only is None else len(self.only)

    @property
    def stop(self) -> int:
        """End of the frames in use."""
        return self.end or self.array.shape[1]

    @property
    def span(self) -> int:
        """Frames from the first of a window to behind its last."""
        return (self.frames - 1) * self.spacing + 1

    @cached_property
    def _leads(self) -> Ids:
        """Number of pairs of a trajectory that are at most 0, 1, 2, ... frames apart."""
        length = self.stop - self.begin
        furthest = min(self.max_lead or length - 1, length - 1)
        return np.concatenate([[0], np.cumsum(length - np.arange(1, furthest + 1, dtype=np.int64))])

    @cached_property
    def starts(self) -> int:
        """Windows of one trajectory."""
        if self.pairs:
            return int(self._leads[-1])
        return (self.stop - self.begin - self.span) // self.stride + 1

    @property
    def samples(self) -> int:
        return self.count * self.starts

    @cached_property
    def _shards(self) -> int:
        """Shards that hold a trajectory of the split."""
        length = self.array.shard_length
        if self.only is None:
            return (self.last - 1) // length - self.first // length + 1
        return len(np.unique(self.only // length))

    @property
    def group(self) -> int:
        return self.starts * self._together

    @property
    def _together(self) -> int:
        """Trajectories of a group."""
        return self.array.shard_length if self.only is None else -(-self.count // self._shards)

    @cached_property
    def touched(self) -> int:
        length = self.array.shard_length
        if self.only is None:
            return min(self._shards, 1 if self.first % length == 0 else 2)
        shards = self.only // length
        new = np.diff(shards, prepend=-1) != 0
        new[:: self._together] = True  # in each group its first shard is new
        return int(np.add.reduceat(new, np.arange(0, self.count, self._together)).max())

    @property
    def entries(self) -> int:
        return self.frames

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.frames, *self.array.frame_shape)

    @cached_property
    def share(self) -> float:
        length = self.array.shape[1]
        used = self.stop - self.begin
        if not self.pairs:
            first = np.arange(self.starts)[:, None] * self.stride
            used = len(np.unique(first + np.arange(self.frames) * self.spacing))
        held = min(self._shards * self.array.shard_length, self.array.shape[0])
        return used / length * self.count / held

    @cached_property
    def identity(self) -> str:
        only = None if self.only is None else hashlib.sha256(self.only.astype("<i8").tobytes()).hexdigest()
        lead = self.max_lead if self.pairs else None
        return _digest(
            self.array.name, self.first, self.last, only, self.begin, self.stop, self.frames, self.stride, self.spacing, lead
        )  # fmt: skip

    def locate(self, ids: Ids) -> Located:
        which, window = np.divmod(np.asarray(ids, np.int64), self.starts)
        lead = self.first + which if self.only is None else self.only[which]
        if not self.pairs:
            return Located(lead, self.begin + window * self.stride, np.full_like(lead, self.spacing))
        apart = np.searchsorted(self._leads, window, side="right")
        return Located(lead, self.begin + window - self._leads[apart - 1], apart.astype(np.int64))

    def views(self, data: Tensor) -> dict[str, Tensor]:
        if self.inputs:
            return {"input": data[:, : self.inputs], "target": data[:, self.inputs :]}
        return {self.key: data}

    def labels(self, ids: Ids) -> dict[str, Tensor]:
        if not self.pairs and not self.extras:
            return {}
        at = self.locate(ids)
        found = {name: torch.from_numpy(values[at.lead]) for name, values in self.extras.items()}
        return found | {"lead": torch.from_numpy(at.step)} if self.pairs else found


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Sequences of ``length + 1`` tokens out of ``[first, last)``: inputs and targets, sharing one token with the next.

    A sample is int64 ``[length + 1]``. At most ``length`` tokens at the end form no sequence. ``DataError`` if none fits.

    With a ``separator`` (the token that ends each document) a batch has also ``document``, int64 [B, length + 1], which
    counts the documents of a sequence from 0 (a separator belongs to the document that it ends), and ``mask``, bool
    [B, length], false where the target is the first token of another document than the input: attention must not look
    across documents and no loss is due there.
    """

    array: Array
    first: int
    last: int
    length: int
    separator: int | None = None
    key = "tokens"
    dtype = torch.int64

    def __post_init__(self) -> None:
        if self.array.window_axis != 0 or len(self.array.shape) != 1:
            raise DataError(
                f"{self.array.name}: has axes {', '.join(self.array.dimensions)}; text has the one axis token"
            )
        if self.samples < 1:
            raise DataError(
                f"{self.array.name}: the split [{self.first}, {self.last}) has fewer than {self.length + 1} tokens, "
                f"one sequence; choose another split or a shorter seq_len"
            )

    @property
    def samples(self) -> int:
        return (self.last - self.first - 1) // self.length

    @property
    def group(self) -> int:
        return max(1, self.array.shard_length // self.length)

    @property
    def touched(self) -> int:
        # Sequences begin anywhere in a shard, and each has a token of the next.
        return min(self.array.shards, (self.group * self.length - 1) // self.array.shard_length + 2)

    @property
    def entries(self) -> int:
        return self.length + 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length + 1,)

    @property
    def share(self) -> float:
        length = self.array.shard_length
        touched = min(-(-self.last // length) * length, self.array.shape[0]) - self.first // length * length
        return min(1.0, (self.samples * self.length + 1) / touched)

    @property
    def identity(self) -> str:
        return _digest(self.array.name, self.first, self.last, self.length)

    @property
    def marks(self) -> int | None:
        return self.separator

    def locate(self, ids: Ids) -> Located:
        ids = np.asarray(ids, np.int64)
        return Located(np.zeros_like(ids), self.first + ids * self.length, np.ones_like(ids))

    def labels(self, ids: Ids) -> dict[str, Tensor]:
        return {}

    def views(self, data: Tensor) -> dict[str, Tensor]:
        if self.separator is None:
            return {self.key: data}
        ends = data[:, :-1] == self.separator
        document = torch.zeros_like(data)
        torch.cumsum(ends, 1, out=document[:, 1:])
        return {self.key: data, "document": document, "mask": ~ends}

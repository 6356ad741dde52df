"""What a sample is: the map from a sample id to a window of an array, for simulations and for text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from datamodules.format import Array, DataError

Window = tuple[tuple[int, ...], int, int]  # (leading index, start, stop): what `Array.plan` takes


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
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    def window(self, sample: int) -> Window: ...


@dataclass(frozen=True)
class FieldWindows:
    """Windows of ``frames`` consecutive frames, one every ``stride`` frames, of trajectories ``[first, last)``.

    A sample is float32 ``[frames, C, *S]``; ids run over the starts of a trajectory first. A tail of fewer than ``stride``
    starts at the end of a trajectory forms no window. ``DataError`` if there is no window at all.
    """

    array: Array
    first: int
    last: int
    frames: int
    stride: int = 1
    key = "fields"
    dtype = torch.float32

    def __post_init__(self) -> None:
        if self.first >= self.last:
            raise DataError(
                f"{self.array.name}: the split [{self.first}, {self.last}) holds no trajectory; choose another"
            )
        if self.frames > self.array.shape[1]:
            raise DataError(
                f"{self.array.name}: a window of {self.frames} frames is longer than the trajectories "
                f"of {self.array.shape[1]}; ask for fewer input frames or rollout steps"
            )

    @property
    def starts(self) -> int:
        """Windows of one trajectory."""
        return (self.array.shape[1] - self.frames) // self.stride + 1

    @property
    def samples(self) -> int:
        return (self.last - self.first) * self.starts

    @property
    def group(self) -> int:
        return self.array.shard_length * self.starts

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.frames, *self.array.frame_shape)

    def window(self, sample: int) -> Window:
        trajectory, start = divmod(sample, self.starts)
        start *= self.stride
        return (self.first + trajectory,), start, start + self.frames


@dataclass(frozen=True)
class TokenWindows:
    """Sequences of ``length + 1`` tokens out of ``[first, last)``: inputs and targets, sharing one token with the next.

    A sample is int64 ``[length + 1]``. At most ``length`` tokens at the end form no sequence. ``DataError`` if none fits.
    """

    array: Array
    first: int
    last: int
    length: int
    key = "tokens"
    dtype = torch.int64

    def __post_init__(self) -> None:
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
    def shape(self) -> tuple[int, ...]:
        return (self.length + 1,)

    def window(self, sample: int) -> Window:
        start = self.first + sample * self.length
        return (), start, start + self.length + 1

"""The kinds of data that are streamed: simulations and text. See ``datamodules.module`` for what they share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from datamodules.format import Array, DataError
from datamodules.module import StreamConfig, StreamingDataModule, at_least
from datamodules.stream.normalisation import statistics_of
from datamodules.stream.splits import Split, per_trajectory
from datamodules.stream.windows import FieldWindows, TokenWindows, Windows

__all__ = ["FieldsConfig", "FieldsData", "StreamConfig", "StreamingDataModule", "TextConfig", "TextData"]


@dataclass
class FieldsConfig(StreamConfig):
    """Simulations: windows of trajectories.

    Args:
        variable: the array; empty for the data set's main one.
        frames: frames of a window (set by the task). For temporal bundling and rollouts, ``input_frames`` +
            ``output_frames`` x ``rollout`` instead.
        stride: frames between the starts of consecutive windows of a trajectory.
        dt_stride: spacing of the frames of a window; 2 sees every second frame.
        pairs: all pairs of two frames i < j of a trajectory instead (all2all, Poseidon, arXiv:2405.19101); the batch has
            ``lead``, int64 [B], the frames between them.
        max_lead: largest ``lead`` of a pair; 0 for any.
        input_frames, output_frames, rollout: with ``input_frames`` > 0 a batch has ``input``, the first ``input_frames``
            frames, and ``target``, the next ``output_frames`` x ``rollout``, instead of ``fields``.
        parameters: names of arrays with one entry for each trajectory (a viscosity, a wave speed); the batch has those of
            its samples under the same names.

    ``pairs``, ``input_frames`` and ``parameters`` change what a batch has; a run is refused if its task does not read that.
    """

    variable: str = ""
    frames: int = 2
    stride: int = 1
    dt_stride: int = 1
    pairs: bool = False
    max_lead: int = 0
    input_frames: int = 0
    output_frames: int = 1
    rollout: int = 1
    parameters: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frames", "stride", "dt_stride", "output_frames", "rollout"):
            at_least(name, getattr(self, name), 1)
        for name in ("max_lead", "input_frames"):
            at_least(name, getattr(self, name), 0)
        for name in ("stride", "dt_stride"):
            if self.pairs and getattr(self, name) != 1:
                raise ValueError(f"{name}={getattr(self, name)}: has no effect on pairs, which are all of a trajectory")
        if self.max_lead and not self.pairs:
            raise ValueError(f"max_lead={self.max_lead}: has an effect with pairs=true only")
        for name in ("output_frames", "rollout"):
            if getattr(self, name) != 1 and not self.input_frames:
                raise ValueError(f"{name}={getattr(self, name)}: has an effect with input_frames > 0 only")
        if self.input_frames:
            total = self.input_frames + self.output_frames * self.rollout
            if self.frames not in (2, total):
                raise ValueError(
                    f"frames={self.frames}: input_frames, output_frames and rollout make {total}; give those only"
                )
            self.frames = total

    def entries(self) -> dict[str, str]:
        inputs = f"input_frames={self.input_frames}"
        found = {"input": inputs, "target": inputs} if self.input_frames else {"fields": ""}
        found |= {name: f"parameters={list(self.parameters)}" for name in self.parameters}
        return found | ({"lead": "pairs=true"} if self.pairs else {})


@dataclass
class TextConfig(StreamConfig):
    """Text: sequences of ``seq_len + 1`` tokens, each beginning with the last token of the one before.

    ``documents``: batches also tell the documents packed into a sequence apart, from the data set's separator token:
    ``document``, int64 [B, seq_len + 1], counts them from 0, and ``mask``, bool [B, seq_len], is false for targets that
    begin another document. A run is refused if its task does not read both, as ``next_token``, whose attention sees the
    whole sequence.
    """

    seq_len: int = 256
    documents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("seq_len", self.seq_len, 1)

    def entries(self) -> dict[str, str]:
        told = dict.fromkeys(("document", "mask"), "documents=true") if self.documents else {}
        return {"tokens": "", **told}


class FieldsData(StreamingDataModule):
    """Batches ``{"fields": float32 [B, frames, C, *S], "index": int64 [B]}``, and more as ``FieldsConfig`` says."""

    config_class = FieldsConfig
    kind = "fields"
    _statistics: dict[str, list[float]] | None = None

    def array(self) -> Array:
        name = self.config.variable
        if not name:
            return self.dataset.main
        if name not in self.dataset.arrays:
            known = ", ".join(sorted(self.dataset.arrays))
            raise DataError(
                f"{self.config.url}: has no variable {name!r}; it has {known}; set data.variable to one of them"
            )
        return self.dataset.arrays[name]

    def windows(self, config: Any, split: Split) -> Windows:
        array = self.array()
        extras = {name: per_trajectory(self.dataset, array, name, whole=True) for name in config.parameters}
        return FieldWindows(
            array,
            split.first,
            split.last,
            config.frames,
            stride=config.stride,
            spacing=config.dt_stride,
            begin=split.begin,
            end=split.end,
            pairs=config.pairs,
            max_lead=config.max_lead,
            only=split.only,
            inputs=config.input_frames,
            extras=extras,
        )

    def evaluated(self, split: str, overrides: Mapping[str, Any] | None) -> tuple[str, Any]:
        """An evaluation that asks for its own number of frames gets plain windows, also where training has pairs."""
        if overrides and overrides.get("frames", self.config.frames) != self.config.frames:
            overrides = {
                "pairs": False,
                "max_lead": 0,
                "input_frames": 0,
                "output_frames": 1,
                "rollout": 1,
                **overrides,
            }
        return super().evaluated(split, overrides)

    def spec(self) -> dict[str, Any]:
        """Adds ``channels`` (names), ``space``, ``mean`` and ``std`` (per channel, of ``train``), ``dt`` and ``frames``."""
        attributes, array = self.dataset.attributes, self.array()
        if self._statistics is None:
            cache = self.config.cache if self.config.cache_bytes else None
            self._statistics = statistics_of(self.dataset, array, self.split(self.config.train), cache)
        return {
            **super().spec(),
            "channels": self._channels(array),
            "space": list(array.frame_shape[1:]),
            "mean": list(self._statistics["mean"]),
            "std": list(self._statistics["std"]),
            "dt": attributes.get("dt") and attributes["dt"] * self.config.dt_stride,
            "frames": self.config.frames,
        }

    def _channels(self, array: Array) -> list[str]:
        """Names of the channels: the array's own, those of the data set, or numbers for another array than its main one."""
        count = array.frame_shape[0]
        names = array.attributes.get("channels") or self.dataset.attributes.get("channels")
        if names and len(names) == count:
            return list(names)
        if array is not self.dataset.main:
            return [f"{array.name}_{i}" for i in range(count)]
        raise DataError(
            f"{self.config.url}: the attribute channels names {len(names or ())} channels, but {array.name} has {count}; "
            f"make or import the data set again"
        )


class TextData(StreamingDataModule):
    """Batches ``{"tokens": int64 [B, seq_len + 1], "index": int64 [B]}``, and more as ``TextConfig`` says."""

    config_class = TextConfig
    kind = "text"

    def windows(self, config: Any, split: Split) -> Windows:
        separator = None
        if config.documents:
            separator = self.dataset.attributes.get("separator")
            if separator is None:
                raise DataError(
                    f"{config.url}: names no separator token, so documents cannot be told apart; set documents=false"
                )
        return TokenWindows(self.array(), split.first, split.last, config.seq_len, separator)

    def spec(self) -> dict[str, Any]:
        """Adds ``vocab_size``, ``seq_len`` and, where the data set tells it, ``bytes_per_token``."""
        attributes = self.dataset.attributes
        known = {"bytes_per_token": float(attributes["bytes_per_token"])} if "bytes_per_token" in attributes else {}
        return {
            **super().spec(),
            **known,
            "vocab_size": int(self.dataset.attributes["vocab_size"]),
            "seq_len": self.config.seq_len,
        }

"""Lightning data modules over streamed data sets, and their configs.

Batch sizes are global. The order of training samples depends on the data, the seed and the position alone; world size
and micro-batch only say who reads which part of a global batch.
"""

import dataclasses
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning
from omegaconf import MISSING

from datamodules.format import Array, DataError, Dataset
from datamodules.stream import state as stream_state
from datamodules.stream.cache import ShardCache
from datamodules.stream.fetch import Metrics, Reader
from datamodules.stream.order import Order
from datamodules.stream.stream import FiniteStream, Share, Stream, even_batches, spread
from datamodules.stream.windows import FieldWindows, TokenWindows, Windows


@dataclass
class StreamConfig:
    """What every streamed data set has.

    Args:
        url: the data set, on any store.
        train, validation, test: a split named in the data set, or a range ``start:stop`` of trajectories (tokens for text).
        window_shards: shards among which samples are shuffled; each rank reads from that many at a time.
        val_samples: at most so many validation samples, evenly spaced over the split; 0 for all.
        cache: folder of the local cache of remote shards; empty for ``$KEEL_CACHE`` or ``~/.cache/keel``.
        cache_bytes: bound of that cache; 0 reads byte ranges from the store each time.
        read_ahead: micro-batches read ahead of the consumer; 0 reads in its own thread.
        read_ahead_bytes: bound on what they hold together.
        threads: threads that read ahead; 0 for 1 on local data (decoding holds the interpreter anyway) and 4 on remote.
    """

    not_hashed: ClassVar[tuple[str, ...]] = (
        "url",
        "val_samples",
        "cache",
        "cache_bytes",
        "read_ahead",
        "read_ahead_bytes",
        "threads",
    )

    url: str = MISSING
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    window_shards: int = 16
    val_samples: int = 0
    cache: str = ""
    cache_bytes: int = 32 << 30
    read_ahead: int = 4
    read_ahead_bytes: int = 256 << 20
    threads: int = 0

    def __post_init__(self) -> None:
        if not self.url or self.url == MISSING:
            raise ValueError("url=: required; give the path or URL of a data set")
        for name, low in (
            ("window_shards", 1),
            ("val_samples", 0),
            ("cache_bytes", 0),
            ("read_ahead", 0),
            ("read_ahead_bytes", 1),
            ("threads", 0),
        ):
            _at_least(name, getattr(self, name), low)


@dataclass
class FieldsConfig(StreamConfig):
    """Simulations: windows of ``frames`` frames (set by the task), one every ``stride`` frames of each trajectory.

    ``variable`` names the array; empty for the data set's main one.
    """

    variable: str = ""
    frames: int = 2
    stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("frames", self.frames, 1)
        _at_least("stride", self.stride, 1)


@dataclass
class TextConfig(StreamConfig):
    """Text: sequences of ``seq_len + 1`` tokens, each beginning with the last token of the one before."""

    seq_len: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("seq_len", self.seq_len, 1)


class StreamingDataModule(lightning.LightningDataModule):
    """Streams one data set to the ranks of one run.

    Under a ``lightning.Trainer`` world size and rank are the trainer's; without one call ``configure`` (default: one rank).
    The owner of the training loop calls ``advance`` after each optimiser step; ``state_dict`` then says where to go on, on
    any world size. ``train_dataloader`` yields for ever: bound training by steps.

    Args:
        config: of the subclass's ``config_class``.
        global_batch: samples of an optimiser step over all ranks.
        micro_batch: samples of a rank's forward pass; 0 for all of its part of the global batch.
        seed: of the order of the training samples.
        overrides: fields of ``config`` to replace, for instance ``{"frames": 5}`` by the task.

    Raises (at construction or when loaders are made): ``ValueError`` for batch sizes that do not divide, ``DataError`` for a
    data set that is not what the config says, ``StoreError`` where it cannot be read.
    """

    config_class: ClassVar[type[StreamConfig]]
    kind: ClassVar[str]

    def __init__(
        self,
        config: Any,
        *,
        global_batch: int,
        micro_batch: int = 0,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, self.config_class):
            raise ValueError(f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(config).__name__}")
        self.config = _replace(config, overrides or {})
        self.global_batch, self.micro_batch, self.seed = global_batch, micro_batch, seed
        Share(global_batch, micro_batch)  # what holds for one rank must hold for any number
        self.metrics, self.position = Metrics(), 0
        self._world: tuple[int, int] | None = None
        self._dataset: Dataset | None = None
        self._cache: ShardCache | None = None
        self._order: Order | None = None
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    # What subclasses say.

    def windows(self, config: Any, split: tuple[int, int]) -> Windows:
        """The samples of a range of axis 0 of the array. ``DataError`` if there is none."""
        raise TypeError(f"{type(self).__name__} does not say what a sample is; define windows()")

    def array(self) -> Array:
        return self.dataset.main

    def spec(self) -> dict[str, Any]:
        """What a task may check and use: ``kind``, ``fingerprint``, ``samples`` (of an epoch), ``attributes``, and more."""
        return {
            "kind": self.kind,
            "fingerprint": self.dataset.fingerprint,
            "samples": self.order.n,
            "attributes": dict(self.dataset.attributes),
        }

    # The data set and its order.

    @property
    def dataset(self) -> Dataset:
        """The data set, opened on first use."""
        if self._dataset is None:
            dataset = Dataset.open(self.config.url)
            kind = dataset.attributes.get("kind")
            if kind != self.kind:
                raise DataError(
                    f"{self.config.url}: holds {kind}, not {self.kind}; choose another data.name or data.url"
                )
            self._dataset = dataset
        return self._dataset

    @property
    def order(self) -> Order:
        """The order of the training samples."""
        if self._order is None:
            windows = self._windows(self.config.train)
            self._order = Order(windows.samples, windows.group, self.config.window_shards, self.seed)
        return self._order

    def split(self, name: str) -> tuple[int, int]:
        """Range of axis 0 of a named split, or of ``start:stop``. ``DataError`` if it is unknown, empty or too far."""
        url, length = self.config.url, self.array().shape[0]
        if re.fullmatch(r"\d*:\d*", name):
            start, stop = (
                int(part) if part else default for part, default in zip(name.split(":"), (0, length), strict=True)
            )
            if not start < stop <= length:
                raise DataError(f"{url}: split {name} is empty or exceeds the {length} entries of {self.array().name}")
            return start, stop
        if name not in self.dataset.splits:
            known = ", ".join(sorted(self.dataset.splits)) or "none"
            raise DataError(f"{url}: has no split {name!r}; it has {known}; name one of them or give start:stop")
        start, stop = self.dataset.splits[name]
        if start >= stop:
            raise DataError(f"{url}: split {name!r} is empty; make more data or give start:stop")
        return start, stop

    # Ranks.

    def configure(self, world_size: int, rank: int) -> None:
        """Use without a Lightning trainer: this process is ``rank`` of ``world_size``."""
        Share(self.global_batch, self.micro_batch, world_size, rank)
        self._world = (world_size, rank)

    @property
    def share(self) -> Share:
        """This rank's part of each global batch."""
        world, rank = self._world or (1, 0)
        if self._world is None and self.trainer is not None:
            world, rank = self.trainer.world_size, self.trainer.global_rank
        return Share(self.global_batch, self.micro_batch, world, rank)

    # Loaders.

    def train_dataloader(self) -> Stream:
        """Endless micro-batches of this rank from the current position."""
        reader = self._reader(self._windows(self.config.train), self.config.window_shards)
        return self._kept(Stream(reader, self.order, self.share, lambda: self.position, **self._options()))

    def val_dataloader(self) -> FiniteStream:
        """The validation samples once, in order, shared among the ranks: equally many batches each, no padding."""
        share, windows = self.share, self._windows(self.config.validation)
        ids = spread(windows.samples, self.config.val_samples)
        try:
            batches = even_batches(ids, share.micro, share.world_size, share.rank)
        except ValueError as error:
            raise DataError(f"{self.config.url}: split {self.config.validation!r}: {error}") from error
        return self._kept(FiniteStream(self._reader(windows, 1), batches, **self._options()))

    def evaluation_loader(
        self, split: str, overrides: Mapping[str, Any] | None = None, batch: int = 0, limit: int = 0
    ) -> FiniteStream:
        """At most ``limit`` (0: all) evenly spaced samples of a split, in order, all on this process.

        ``split``: "train", "validation" or "test" as the config maps them, or a name or range of the data set itself.
        ``overrides`` replace fields of the config, for instance ``{"frames": 21}``; ``batch`` defaults to a micro-batch.
        """
        config = _replace(self.config, overrides or {})
        windows = self._windows(getattr(config, split) if split in ("train", "validation", "test") else split, config)
        batches = even_batches(spread(windows.samples, limit), batch or self.share.micro, 1, 0)
        return self._kept(FiniteStream(self._reader(windows, 1), batches, **self._options()))

    # Progress.

    def advance(self, samples: int) -> None:
        """Move on by ``samples`` of the global order: ``global_batch`` after an optimiser step, more to skip a window."""
        if samples < 0:
            raise ValueError(f"samples={samples}: a stream only advances; load an earlier state to go back")
        self.position += samples

    def state_dict(self) -> dict[str, Any]:
        """Position in the global order, and what identifies that order. The same on all ranks; O(1) in size and time."""
        return stream_state.save(self.dataset.fingerprint, self.order, self.position)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, on any world size; loaders made before follow at their next iteration.

        ``DataError``, saying what differs, if it was saved with another data set, seed, split or window.
        """
        self.position = stream_state.restore(state_dict, self.dataset.fingerprint, self.order)

    def teardown(self, stage: str | None = None) -> None:
        """End all threads; loaders can be iterated again afterwards."""
        for stream in list(self._streams):
            stream.close()
        self._streams.clear()

    # Parts.

    def _windows(self, split: str, config: Any = None) -> Windows:
        try:
            return self.windows(config or self.config, self.split(split))
        except DataError as error:
            text = str(error)
            raise (error if text.startswith(self.config.url) else DataError(f"{self.config.url}: {text}")) from None

    def _reader(self, windows: Windows, window_shards: int) -> Reader:
        cache = None
        if not self.dataset.store.is_local and self.config.cache_bytes:
            self._check_cache(window_shards)
            self._cache = self._cache or ShardCache(self.config.cache, self.config.cache_bytes)
            cache = self._cache
        return Reader(self.dataset, windows, cache, self.metrics)

    def _check_cache(self, window_shards: int) -> None:
        """A cache smaller than what is read in turn would download the same shards over and over."""
        sizes = [info.size for info in self.dataset.objects.values()]
        needed = min(sum(sizes), max(sizes) * (window_shards + 1))
        if needed > self.config.cache_bytes:
            raise ValueError(
                f"cache_bytes={self.config.cache_bytes}: {window_shards} + 1 shards in use need {needed} bytes; "
                f"raise it, lower window_shards, or set cache_bytes=0 to read ranges"
            )

    def _options(self) -> dict[str, Any]:
        config = self.config
        threads = config.threads or (1 if self.dataset.store.is_local else 4)
        return {"read_ahead": config.read_ahead, "read_ahead_bytes": config.read_ahead_bytes, "threads": threads}

    def _kept(self, stream: Any) -> Any:
        self._streams.add(stream)
        return stream


class FieldsData(StreamingDataModule):
    """Batches ``{"fields": float32 [B, frames, C, *S], "index": int64 [B]}``."""

    config_class = FieldsConfig
    kind = "fields"

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

    def windows(self, config: Any, split: tuple[int, int]) -> Windows:
        return FieldWindows(self.array(), *split, frames=config.frames, stride=config.stride)

    def spec(self) -> dict[str, Any]:
        """Adds ``channels`` (names), ``space``, ``mean`` and ``std`` (per channel, train split), ``dt`` and ``frames``."""
        attributes = self.dataset.attributes
        statistics = attributes.get("statistics", {})
        return {
            **super().spec(),
            "channels": list(attributes["channels"]),
            "space": list(self.array().frame_shape[1:]),
            "mean": list(statistics["mean"]),
            "std": list(statistics["std"]),
            "dt": attributes.get("dt"),
            "frames": self.config.frames,
        }


class TextData(StreamingDataModule):
    """Batches ``{"tokens": int64 [B, seq_len + 1], "index": int64 [B]}``."""

    config_class = TextConfig
    kind = "text"

    def windows(self, config: Any, split: tuple[int, int]) -> Windows:
        return TokenWindows(self.array(), *split, length=config.seq_len)

    def spec(self) -> dict[str, Any]:
        """Adds ``vocab_size`` and ``seq_len``."""
        return {
            **super().spec(),
            "vocab_size": int(self.dataset.attributes["vocab_size"]),
            "seq_len": self.config.seq_len,
        }


def _replace(config: Any, overrides: Mapping[str, Any]) -> Any:
    known = {f.name for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in known:
            raise ValueError(f"{name}: no such field of {type(config).__name__}; known: {', '.join(sorted(known))}")
    return dataclasses.replace(config, **overrides)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name}={value}: must be at least {low}")

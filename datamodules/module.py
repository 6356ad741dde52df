"""The Lightning data module over one streamed data set, and what all configs have.

Batch sizes are global. The order of training samples depends on the data, the seed and the position alone; world size
and micro-batch only say who reads which part of a global batch.
"""

import dataclasses
import difflib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning
from omegaconf import MISSING

from datamodules.format import Array, DataError, Dataset
from datamodules.position import StreamPosition
from datamodules.store import Store
from datamodules.stream import state as stream_state
from datamodules.stream.cache import ShardCache
from datamodules.stream.fetch import Reader
from datamodules.stream.metrics import Metrics
from datamodules.stream.order import Order
from datamodules.stream.ranges import RangeCache
from datamodules.stream.splits import Split, select
from datamodules.stream.stream import Cursor, FiniteStream, Share, Source, Stream, even_batches, spread
from datamodules.stream.windows import Windows

FETCH = ("auto", "shards", "ranges")
VERIFY = ("first", "always")
ENOUGH = 0.5  # of the bytes of the shards: from there on whole shards are fetched


@dataclass
class StreamConfig:
    """What every streamed data set has.

    Args:
        url: the data set, on any store.
        store: options of that store, such as ``{deadline: 300, endpoint_url: "http://host:9000", anon: true}``; see
            ``datamodules.store.Store``. They are saved with a run: leave secrets to the environment.
        train, validation, test: a split named in the data set, or a range ``start:stop`` of trajectories (tokens for text),
            with conditions on parameters and times if need be: ``train, viscosity>=1e-3, frames=0:40``; see
            ``datamodules.stream.splits``. Fields are normalised by the statistics of what ``train`` selects: those that the
            data set has of its train split, else read when a run begins (of at most 256 MiB, evenly spaced).
        window_shards: shards among which samples are shuffled; each rank reads from that many at a time.
        val_samples: at most so many validation samples, evenly spaced over the split; 0 for all.
        cache: folder of the local cache of remote shards; empty for ``$KEEL_CACHE`` or ``~/.cache/keel``.
        cache_bytes: bound of that cache; 0 reads byte ranges from the store each time.
        fetch: from a remote store, whole ``shards`` into the cache, or byte ``ranges`` each time; ``auto`` takes shards if
            the cache has room for those in use and an epoch uses at least half of their bytes, as of few frames of each
            trajectory it does not; else ranges, which it keeps if the cache has room for those of an epoch.
        verify: checksums of files are compared at the ``first`` read of a process (of local ones again once they were
            written to), or ``always``, and then each local shard as a whole against the manifest, too: only that tells a
            shard from an intact one of another data set. What comes from a remote store is always verified.
        read_ahead: reads ahead of the consumer, each of a micro-batch or of several small ones; 0 reads in its own thread.
        read_ahead_bytes: bound on what they hold together.
        threads: threads that read ahead; 0 for 1 on local data (the consumer helps it) and 4 on remote.
    """

    not_hashed: ClassVar[tuple[str, ...]] = (
        "url",
        "store",
        "val_samples",
        "cache",
        "cache_bytes",
        "fetch",
        "verify",
        "read_ahead",
        "read_ahead_bytes",
        "threads",
    )

    url: str = MISSING
    store: dict[str, Any] = field(default_factory=dict)
    train: str = "train"
    validation: str = "validation"
    test: str = "test"
    window_shards: int = 16
    val_samples: int = 0
    cache: str = ""
    cache_bytes: int = 32 << 30
    fetch: str = "auto"
    verify: str = "first"
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
            at_least(name, getattr(self, name), low)
        one_of("fetch", self.fetch, FETCH)
        one_of("verify", self.verify, VERIFY)
        if self.fetch == "shards" and not self.cache_bytes:
            raise ValueError("fetch=shards: needs a cache; set cache_bytes, or fetch=ranges")

    def entries(self) -> dict[str, str]:
        """Batch entry, but for ``index`` -> the setting that makes it, if any. Empty: not told."""
        return {}


class StreamingDataModule(lightning.LightningDataModule):
    """Streams one data set to the ranks of one run.

    Under a ``lightning.Trainer`` world size and rank are the trainer's, and the position follows the optimiser's steps and is
    part of each checkpoint. In a loop of one's own call ``configure`` (default: one rank), and ``advance`` after each
    optimiser step; ``state_dict`` then says where to go on, on any world size. ``train_dataloader`` yields for ever: bound
    training by steps. ``metrics.snapshot()`` counts what all loaders read, in worker processes too.

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
        self.config = replaced(config, overrides or {})
        self.global_batch, self.micro_batch, self.seed = global_batch, micro_batch, seed
        Share(global_batch, micro_batch)  # what holds for one rank must hold for any number
        self.metrics, self.cursor = Metrics(), Cursor()
        self._world: tuple[int, int] | None = None
        self._dataset: Dataset | None = None
        self._cache: ShardCache | None = None
        self._ranges: RangeCache | None = None
        self._order: Order | None = None
        self._sampling = ""
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()

    # What subclasses say.

    def windows(self, config: Any, split: Split) -> Windows:
        """The samples of a split of the array. ``DataError`` if there is none."""
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
            dataset = Dataset.open(Store(self.config.url, **self.config.store))
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
            windows = self.windows_of(self.config.train)
            self._order = Order(windows.samples, windows.group, self.config.window_shards, self.seed)
            self._sampling = windows.identity
        return self._order

    @property
    def sampling(self) -> str:
        """Digest of what the ids of the training samples mean."""
        assert self.order  # says the windows too
        return self._sampling

    def split(self, name: str) -> Split:
        """A named split, a range ``start:stop`` or conditions. ``DataError`` if it is unknown, empty or too far."""
        return select(self.dataset, self.array(), name)

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

    def setup(self, stage: str) -> None:
        """Have a trainer that fits tell how far it is."""
        if stage == "fit" and self.trainer is not None:
            callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
            if not any(isinstance(callback, StreamPosition) for callback in callbacks):
                callbacks.insert(0, StreamPosition())

    # Loaders.

    def train_dataloader(self) -> Stream:
        """Endless micro-batches of this rank from the current position."""
        order, reader = self.order, self.train_reader()
        return self._kept(Stream(reader, order, self.share, self.cursor, **self._options(), horizon=self._horizon()))

    def val_dataloader(self) -> FiniteStream:
        """The validation samples once, in order, shared among the ranks: equally many batches each, no padding."""
        share, reader = self.share, self.reader(self.config.validation)
        ids = spread(reader.windows.samples, self.config.val_samples)
        try:
            batches = even_batches(ids, share.micro, share.world_size, share.rank)
        except ValueError as error:
            raise DataError(f"{self.config.url}: split {self.config.validation!r}: {error}") from error
        return self._kept(FiniteStream(reader, batches, **self._options()))

    def evaluation_loader(
        self, split: str, overrides: Mapping[str, Any] | None = None, batch: int = 0, limit: int = 0
    ) -> FiniteStream:
        """At most ``limit`` (0: all) evenly spaced samples of a split, in order, all on this process.

        ``split``: "train", "validation" or "test" as the config maps them, or a name or range of the data set itself.
        ``overrides`` replace fields of the config, for instance ``{"frames": 21}``; ``batch`` defaults to a micro-batch.
        """
        reader = self.reader(*self.evaluated(split, overrides))
        batches = even_batches(spread(reader.windows.samples, limit), batch or self.share.micro, 1, 0)
        return self._kept(FiniteStream(reader, batches, **self._options()))

    def evaluated(self, split: str, overrides: Mapping[str, Any] | None) -> tuple[str, Any]:
        """(split, config) of an evaluation."""
        config = replaced(self.config, overrides or {})
        return getattr(config, split) if split in ("train", "validation", "test") else split, config

    # Progress.

    def advance(self, samples: int) -> None:
        """Move on by ``samples`` of the global order: ``global_batch`` after an optimiser step, more to skip a window."""
        if samples < 0:
            raise ValueError(f"samples={samples}: a stream only advances; load an earlier state to go back")
        self.cursor.position += samples

    @property
    def position(self) -> int:
        """Samples of the global order that are done."""
        return self.cursor.position

    def state_dict(self) -> dict[str, Any]:
        """Position in the global order, and what identifies that order. The same on all ranks; O(1) in size and time."""
        return stream_state.save(*self._followed(), self.position, self.sampling)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, on any world size; loaders made before follow at their next iteration. ``DataError``,
        saying what differs, if it was saved with another data set, seed, split or window."""
        followed, url = self._followed(), getattr(self.config, "url", "")
        self.cursor.position = stream_state.restore(state_dict, *followed, self.sampling, url)

    def _followed(self) -> tuple[str, stream_state.Ordered]:
        """Fingerprint and order of the training samples."""
        return self.dataset.fingerprint, self.order

    def teardown(self, stage: str | None = None) -> None:
        """End all threads; loaders can be iterated again afterwards."""
        for stream in list(self._streams):
            stream.close()
        self._streams.clear()

    # Parts.

    def windows_of(self, split: str, config: Any = None) -> Windows:
        """The samples of a split as a config says it."""
        try:
            return self.windows(config or self.config, self.split(split))
        except DataError as error:
            text = str(error)
            raise (error if text.startswith(self.config.url) else DataError(f"{self.config.url}: {text}")) from None

    def train_reader(self) -> Source:
        """Reads the training samples."""
        return self.reader(self.config.train, window_shards=self.config.window_shards)

    def reader(self, split: str, config: Any = None, window_shards: int = 1, taken: int = 0) -> Reader:
        """Reads the samples of a split, ``window_shards`` shards in turn; others need ``taken`` bytes of the same cache."""
        windows = self.windows_of(split, config)
        cache = self._shard_cache(windows, window_shards, taken)
        return Reader(self.dataset, windows, cache, self.metrics, self.config.verify == "always")

    def room(self, windows: Windows, window_shards: int) -> int:
        """Bytes of a cache in which nothing is thrown out that is still needed.

        The shards in use, those of ``window_shards`` groups, and as many more, if there are: what is read ahead of the end of
        a window lies anywhere in the next one.
        """
        sizes, groups = self._sizes(windows), min(2 * window_shards, -(-windows.samples // windows.group))
        return min(sum(sizes), max(sizes, default=0) * windows.touched * groups)

    def epoch_bytes(self, windows: Windows) -> int:
        """Stored bytes that an epoch reads, at most: chunks are read whole."""
        spec, used = windows.array.spec, windows.share if windows.array.spec.chunk_length == 1 else 1.0
        return min(int(used * sum(self._sizes(windows))), windows.samples * windows.entries * spec.payload_bytes)

    def _sizes(self, windows: Windows) -> list[int]:
        paths = (windows.array.shard_path(k) for k in range(windows.array.shards))
        return [self.dataset.objects[path].size for path in paths if path in self.dataset.objects]

    def _shard_cache(self, windows: Windows, window_shards: int, taken: int) -> ShardCache | None:
        """Of whole shards, or of what is read of them. One smaller than the shards in turn would fetch them over and over."""
        config = self.config
        if self.dataset.store.is_local or config.fetch == "ranges" or not config.cache_bytes:
            return None
        needed = self.room(windows, window_shards)
        full = needed + taken > config.cache_bytes
        if full and config.fetch == "shards":
            beside = f", beside {taken} of the other sources" if taken else ""
            raise DataError(
                f"cache_bytes={config.cache_bytes}: the shards of {window_shards} groups in use and of as many that are read "
                f"ahead need {needed} bytes{beside}; raise it, lower window_shards, or set fetch=ranges"
            )
        if config.fetch == "auto" and (full or windows.share < ENOUGH):
            return self._range_cache(windows, taken)
        self._cache = self._cache or ShardCache(config.cache, config.cache_bytes)
        return self._cache

    def _range_cache(self, windows: Windows, taken: int) -> RangeCache | None:
        """Where there is room for all that an epoch reads: of less, little would be there when its turn comes."""
        if self.epoch_bytes(windows) + taken > self.config.cache_bytes:
            return None
        self._ranges = self._ranges or RangeCache.open_at(self.config.cache, self.config.cache_bytes)
        return self._ranges

    def _horizon(self) -> int:
        """Samples of this rank until shards other than the present ones are in use."""
        return self.order.group * (self.order.window + 1) // self.share.world_size

    def _options(self) -> dict[str, Any]:
        config = self.config
        threads = config.threads or (1 if self._local() else 4)
        return {"read_ahead": config.read_ahead, "read_ahead_bytes": config.read_ahead_bytes, "threads": threads}

    def _local(self) -> bool:
        return self.dataset.store.is_local

    def _kept(self, stream: Any) -> Any:
        self._streams.add(stream)
        return stream


def replaced(config: Any, overrides: Mapping[str, Any]) -> Any:
    """A copy of a config dataclass with some fields replaced. ``ValueError`` names an unknown one."""
    known = {f.name for f in dataclasses.fields(config)}
    for name in overrides:
        if name not in known:
            raise ValueError(f"{name}: no such field of {type(config).__name__}; known: {', '.join(sorted(known))}")
    return dataclasses.replace(config, **overrides)


def at_least(name: str, value: int, low: int) -> None:
    """``ValueError`` if ``value`` is less."""
    if value < low:
        raise ValueError(f"{name}={value}: must be at least {low}")


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """``ValueError`` unless ``value`` is known."""
    if value not in known:
        near = difflib.get_close_matches(value, known, 1) or known
        raise ValueError(f"{name}={value!r}: unknown; use {' or '.join(near)}")

"""Several data sets as one stream, in fixed proportions."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from hashlib import sha256
from typing import Any, ClassVar

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.format import DataError
from datamodules.module import StreamingDataModule, at_least, one_of
from datamodules.registry import lookup
from datamodules.store import Store
from datamodules.stream import state as stream_state
from datamodules.stream.cache import default_root
from datamodules.stream.fetch import Reader
from datamodules.stream.mixing import MixedReader, Mixture
from datamodules.stream.stream import FiniteStream, Indices, Source, even_batches, spread

UNITS = ("sample", "batch")
SHARED = ("val_samples", "read_ahead", "read_ahead_bytes", "threads")  # of the stream, not of a source


@dataclass
class MixtureConfig:
    """Data sets of one kind, mixed.

    Args:
        sources: one mapping each: ``weight`` (1 if left out), ``name`` of a kind of data (``fields`` if left out), and the
            fields of that kind's config: ``{url: s3://b/a, weight: 3, stride: 2}``.
        unit: what is dealt to the sources: a ``sample`` (then all have one shape) or a whole global ``batch``.
        val_samples: at most so many validation samples of each source; 0 for all.
        read_ahead, read_ahead_bytes, threads: as ``StreamConfig``.
    """

    not_hashed: ClassVar[tuple[str, ...]] = SHARED

    sources: list[dict[str, Any]] = field(default_factory=list)
    unit: str = "sample"
    val_samples: int = 0
    read_ahead: int = 4
    read_ahead_bytes: int = 256 << 20
    threads: int = 0

    def __post_init__(self) -> None:
        one_of("unit", self.unit, UNITS)
        for name, low in (("val_samples", 0), ("read_ahead", 0), ("read_ahead_bytes", 1), ("threads", 0)):
            at_least(name, getattr(self, name), low)
        if not self.sources:
            raise ValueError("sources: is empty; give one mapping with url and weight for each data set")
        # A run is resumed from any folder.
        self.sources = [{**s, "url": Store(str(s["url"])).url} if s.get("url") else s for s in self.sources]
        for i in range(len(self.sources)):
            self.source(i)

    def entries(self) -> dict[str, str]:
        """As ``StreamConfig.entries``, of all sources, but for ``source``."""
        found: dict[str, str] = {}
        for i in range(len(self.sources)):
            for entry, setting in self.source(i)[2].entries().items():
                found.setdefault(entry, setting and f"sources[{i}].{setting}")
        return found

    def source(self, i: int) -> tuple[str, float, Any]:
        """(kind's name, weight, config) of source i. ``ValueError`` names the field that is wrong."""
        given, where = dict(self.sources[i]), f"sources[{i}]"
        name, weight = str(given.pop("name", "fields")), given.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ValueError(f"{where}.weight={weight!r}: must be a positive number")
        if name == "mixture":
            raise ValueError(f"{where}.name=mixture: mixtures do not nest; list its sources here, with their weights")
        if not given.get("url"):
            raise ValueError(f"{where}.url: required; give the path or URL of a data set")
        config_class, _ = lookup("data", name)
        known = [f.name for f in fields(config_class)]
        for key in given:
            if key in SHARED:
                raise ValueError(f"{where}.{key}: is of the whole stream; set data.{key}")
            if key not in known:
                near = get_close_matches(str(key), known, 1)
                raise ValueError(f"{where}.{key}: no such field; {f'did you mean {near[0]!r}?' if near else known}")
        try:
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), given))
        except OmegaConfBaseException as error:
            raise ValueError(f"{where}.{getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from error
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return name, float(weight), config


class MixtureData(StreamingDataModule):
    """Batches as those of its sources, with ``source``, int64 [B], and ids that count on over the sources.

    The order is a pure function of the position, in which every source has its own epochs; see
    ``datamodules.stream.mixing``. Arguments as ``StreamingDataModule``; ``overrides`` hold for all sources.
    """

    config_class = MixtureConfig  # type: ignore[assignment]
    kind = "mixture"

    def __init__(
        self,
        config: Any,
        *,
        global_batch: int,
        micro_batch: int = 0,
        seed: int = 0,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, global_batch=global_batch, micro_batch=micro_batch, seed=seed)
        self.sources: list[StreamingDataModule] = []
        self.weights: list[float] = []
        for i in range(len(config.sources)):
            name, weight, own = config.source(i)
            _, data_class = lookup("data", name)
            # Another seed for each, so that equal data sets are not read in step; large, so that runs' seeds do not meet.
            source = data_class(own, global_batch=global_batch, seed=seed + (i << 32), overrides=overrides)
            source.metrics = self.metrics
            self.sources.append(source)
            self.weights.append(weight)
        self._mixture: Mixture | None = None

    @property
    def order(self) -> Mixture:  # type: ignore[override]
        """The order of the training samples."""
        if self._mixture is None:
            unit = 1 if self.config.unit == "sample" else self.global_batch
            self._mixture = Mixture([source.order for source in self.sources], self.weights, unit)
        return self._mixture

    @property
    def dataset(self) -> Any:
        raise DataError("a mixture has several data sets; ask its sources")

    def _followed(self) -> tuple[str, stream_state.Ordered]:
        return self._fingerprint(), self.order

    @property
    def sampling(self) -> str:
        return sha256(":".join(source.sampling for source in self.sources).encode()).hexdigest()[:16]

    def _fingerprint(self) -> str:
        if len(self.sources) == 1:
            return self.sources[0].dataset.fingerprint
        return sha256(":".join(source.dataset.fingerprint for source in self.sources).encode()).hexdigest()

    def spec(self) -> dict[str, Any]:
        """Of the first source, which the others must match; statistics are those of the mixture.

        ``DataError`` where kind, channels, space (with ``unit=sample``) or vocabulary differ.
        """
        specs = [source.spec() for source in self.sources]
        same = [
            "kind",
            "channels",
            "frames",
            "vocab_size",
            "seq_len",
            *(["space"] if self.config.unit == "sample" else []),
        ]
        for source, spec in zip(self.sources[1:], specs[1:], strict=True):
            for name in same:
                if spec.get(name) != specs[0].get(name):
                    raise DataError(
                        f"{source.config.url}: {name} is {spec.get(name)}, but the first source has {specs[0].get(name)}; "
                        f"mix data sets that agree in it"
                    )
        found = {**specs[0], "fingerprint": self._fingerprint(), "samples": self.order.n}
        if "mean" in found:
            share = (self.order.counts / self.order.counts.sum())[:, None]
            mean, std = (np.array([spec[name] for spec in specs], np.float64) for name in ("mean", "std"))
            middle = (share * mean).sum(0)
            found["mean"] = middle.tolist()
            found["std"] = np.sqrt((share * (std**2 + (mean - middle) ** 2)).sum(0)).tolist()
        return found

    def train_reader(self) -> Source:
        """Reads from all sources at once; those with one cache folder share its room, ``fetch=shards`` before others."""
        readers: dict[int, Reader] = {}
        taken: dict[str, int] = {}
        for i in sorted(range(len(self.sources)), key=lambda i: self.sources[i].config.fetch != "shards"):
            source = self.sources[i]
            config = source.config
            folder, shards = os.path.abspath(config.cache or default_root()), config.window_shards
            readers[i] = source.reader(config.train, window_shards=shards, taken=taken.get(folder, 0))
            windows = readers[i].windows
            if readers[i].cache is not None:
                taken[folder] = taken.get(folder, 0) + source.room(windows, shards)
            elif readers[i].ranges is not None:
                taken[folder] = taken.get(folder, 0) + source.epoch_bytes(windows)
        return MixedReader([readers[i] for i in range(len(readers))], self.metrics, apart=self.config.unit == "batch")

    def val_dataloader(self) -> FiniteStream:
        """The validation samples of each source once, source after source, shared among the ranks."""
        share = self.share
        reader = MixedReader([s.reader(s.config.validation) for s in self.sources], self.metrics, apart=True)
        batches: list[Indices] = []
        for source, own, base in zip(self.sources, reader.readers, reader.bases.tolist(), strict=False):
            ids = base + spread(own.windows.samples, self.config.val_samples)
            try:
                batches += even_batches(ids, share.micro, share.world_size, share.rank)
            except ValueError as error:
                raise DataError(f"{source.config.url}: split {source.config.validation!r}: {error}") from error
        return self._kept(FiniteStream(reader, batches, **self._options()))

    def evaluation_loader(
        self, split: str, overrides: Mapping[str, Any] | None = None, batch: int = 0, limit: int = 0
    ) -> FiniteStream:
        """As ``StreamingDataModule.evaluation_loader``, with at most ``limit`` samples of each source, in turn."""
        reader = MixedReader([s.reader(*s.evaluated(split, overrides)) for s in self.sources], self.metrics, apart=True)
        batches: list[Indices] = []
        for own, base in zip(reader.readers, reader.bases.tolist(), strict=False):
            batches += even_batches(base + spread(own.windows.samples, limit), batch or self.share.micro, 1, 0)
        return self._kept(FiniteStream(reader, batches, **self._options()))

    def _horizon(self) -> int:
        return sum(s.order.group * (s.order.window + 1) for s in self.sources) // self.share.world_size

    def _local(self) -> bool:
        return all(source.dataset.store.is_local for source in self.sources)

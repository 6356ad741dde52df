"""Importing: source files into a data set, block by block, restartable at any moment."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from datamodules.format import ArraySpec, DataError, ShardEncoder, Writer, statistics
from datamodules.format.dtypes import BFLOAT16, from_bfloat16, to_bfloat16
from datamodules.format.writer import clean
from datamodules.registry import lookup, names
from datamodules.store import Store

from .base import FIELDS, Importer, Variable
from .files import SourceFile, find
from .sources import SPLITS, Sources

VERSION = 3  # raised when the same files give other bytes
FLOATS = ("float16", BFLOAT16, "float32", "float64")
CHUNK_BYTES = 4096  # frames of a few bytes are put together: a chunk has 20 bytes of checksum and index
Progress = Callable[[int, int], None]


@dataclass
class ImportConfig:
    """What to import, and how.

    url: where the data set goes.
    sources: files, folders or patterns, on any store. fractions: share of each split; empty: by the folders train, valid
        (or validation, val) and test that the files lie in, or all for training.
    splits: instead of sources and fractions, the sources of each split.
    layout: a name of `datamodules.registry.IMPORTERS`; "auto" asks the first file. options: of that layout.
    dtype: how real fields are stored; "keep": as they are. level: of zstd compression; None: none.
    shard_bytes: about the size of a shard. block_bytes: read at once; memory is a shard and a few blocks.
    allow_nan: take values that are not finite; statistics leave them out.
    attributes: of the data set, such as equation, units and boundary_conditions; units are added to those of the files. store: options of all stores.
    """

    url: str
    sources: list[str] = field(default_factory=list)
    fractions: dict[str, float] = field(default_factory=dict)
    splits: dict[str, list[str]] = field(default_factory=dict)
    layout: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    level: int | None = None
    shard_bytes: int = 64 * 2**20
    block_bytes: int = 8 * 2**20
    allow_nan: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)
    store: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.sources) == bool(self.splits):
            raise ValueError("sources: give files or folders, or the sources of each split, but not both")
        for name in (*self.splits, *self.fractions):
            if name not in SPLITS:
                raise ValueError(f"split {name!r}: unknown; use one of {', '.join(SPLITS)}")
        total = sum(self.fractions.values())
        if self.fractions and not (min(self.fractions.values()) >= 0 and abs(total - 1) <= 1e-6):  # nan, too
            raise ValueError(f"fractions={self.fractions}: must be >= 0 and add up to 1, not {total:g}")
        if self.fractions and self.splits:
            raise ValueError("fractions: the splits have their own sources; give one or the other")
        if self.dtype not in ("keep", *FLOATS):
            raise ValueError(f"dtype={self.dtype!r}: unknown; use one of keep, {', '.join(FLOATS)}")
        if self.shard_bytes < 1 or self.block_bytes < 1:
            raise ValueError(f"shard_bytes={self.shard_bytes}, block_bytes={self.block_bytes}: must be positive")


def _files(config: ImportConfig) -> list[SourceFile]:
    suffixes = sorted({s for name in names("importer") for s in lookup("importer", name)[1].suffixes})
    if config.layout != "auto":
        suffixes = list(lookup("importer", config.layout)[1].suffixes)
    given = config.splits or {"": config.sources}
    found: dict[str, SourceFile] = {}
    for split, sources in given.items():
        for source in sources:
            for file in find(source, suffixes, config.store):
                if file.url in found:
                    raise DataError(f"{file.url}: is given twice; name each source once")
                found[file.url] = replace(file, split=split or file.split)
    files = list(found.values())
    named = {file.split for file in files if file.split}
    if named and any(not file.split for file in files) and not config.fractions:
        other = next(file for file in files if not file.split)
        raise DataError(f"{other.url}: lies in no folder train, valid or test, as others do; give fractions, or splits")
    return files


def importer_of(config: ImportConfig, file: SourceFile) -> tuple[str, Importer]:
    """Name and importer of the config's layout, found out from `file` where it is "auto"."""
    name = config.layout
    if name == "auto":
        fitting = [n for n in names("importer") if file.suffix in lookup("importer", n)[1].suffixes]
        name = next((n for n in fitting if lookup("importer", n)[1].recognises(file)), "")
        if not name:
            raise DataError(f"{file.url}: unknown layout; name one with --layout: {', '.join(names('importer'))}")
    config_class, importer = lookup("importer", name)
    known = config_class.__dataclass_fields__
    for key in config.options:
        if key not in known:
            raise ValueError(f"option {key}: layout {name} has none such; it has {', '.join(known) or 'no options'}")
    return name, importer(config_class(**{key: _typed(config_class, key, v) for key, v in config.options.items()}))


def _typed(config_class: type, key: str, value: Any) -> Any:
    """An option as its field's type; words such as a,b,c become lists."""
    kind = str(config_class.__dataclass_fields__[key].type)  # type: ignore[attr-defined]
    if not isinstance(value, str) or kind == "str":
        return value
    if kind.startswith("list"):
        return [word.strip() for word in value.split(",") if word.strip()]
    try:
        return float(value)
    except ValueError as error:
        raise ValueError(f"option {key}={value}: must be a number") from error


class _Import:
    """One import: the sources, the arrays they become, and how blocks go into shards."""

    def __init__(self, config: ImportConfig) -> None:
        files = _files(config)
        self.config = config
        self.layout, importer = importer_of(config, files[0])
        self.sources = Sources(importer, files, config.fractions)
        self.variables = self.sources.described[0].variables
        self.specs = {name: self._spec(variable) for name, variable in self.variables.items()}
        self.channels: list[str] = list(self.sources.attributes()["channels"])
        self.splits = self.sources.splits()
        self.files = [file.identity() for file in files]

    def _spec(self, variable: Variable) -> ArraySpec:
        config, shape = self.config, variable.shape
        if variable.per_trajectory:
            shape = (self.sources.trajectories, *shape[1:])
        real = variable.dtype in FLOATS
        spatial = len(variable.dimensions) > 1 + variable.timed
        dtype = config.dtype if real and spatial and config.dtype != "keep" else variable.dtype
        size = 2 if dtype == BFLOAT16 else np.dtype(dtype).itemsize
        length = max(1, config.shard_bytes // (math.prod(shape[1:]) * size or 1))
        length = min(length, shape[0]) if variable.per_trajectory else shape[0]
        window = variable.dimensions.index("time") if variable.timed else 0
        extent = length if window == 0 else shape[window]
        frame = math.prod(shape[window + 1 :]) * size
        chunk = max((n for n in range(1, extent + 1) if extent % n == 0 and n * frame <= CHUNK_BYTES), default=1)
        attributes = {"units": variable.units} if variable.units else {}
        return ArraySpec(shape, dtype, variable.dimensions, length, chunk, attributes, config.level)

    def identity(self) -> dict[str, Any]:
        c = self.config
        # Not allow_nan: what was written without it is the same with it, so an import that met a NaN can go on.
        own: dict[str, Any] = {"dtype": c.dtype, "level": c.level, "attributes": c.attributes}
        own |= {"options": c.options, "shard_bytes": c.shard_bytes, "block_bytes": c.block_bytes, "splits": self.splits}
        return {"import": {"layout": self.layout, "version": VERSION, "files": self.files, **own}}

    def attributes(self) -> dict[str, Any]:
        found = self.sources.attributes()
        units = {**found.get("units", {}), **self.config.attributes.get("units", {})}
        return {
            "kind": "fields",
            "array": FIELDS,
            "splits": self.splits,
            "source": {"layout": self.layout, "version": VERSION, "files": [entry["name"] for entry in self.files]},
            "parameters": {},
            **found,
            **self.config.attributes,
            "units": units,
        }

    def shard(self, name: str, k: int) -> tuple[np.ndarray | bytearray, dict[str, Any] | None]:
        """Bytes of shard k, and the moments of its part of the training split."""
        spec, variable = self.specs[name], self.variables[name]
        encoder, moments = ShardEncoder(spec, k), None
        if not variable.per_trajectory:
            encoder.append(self._checked(name, self.sources.read(name, 0, 0, 0), 0, 0))
            return encoder.finish(), None
        train = self.splits.get("train", [0, 0])
        frames = spec.shape[1] if variable.timed else 1
        size = math.prod(spec.shape[2 if variable.timed else 1 :]) * max(8, np.dtype(variable.dtype).itemsize)
        step = max(1, self.config.block_bytes // size)
        base = k * spec.shard_length
        for i in range(base, base + spec.shard_extent(k)):
            for a in range(0, frames, step):
                b = min(a + step, frames)
                block = self._checked(name, self.sources.read(name, i, a, b), i, a)
                encoder.append(block)
                if name == FIELDS and train[0] <= i < train[1]:
                    values = from_bfloat16(block) if spec.dtype == BFLOAT16 else block
                    part = statistics.partial(values, 1, finite=not self.config.allow_nan)
                    moments = statistics.combine([moments or {}, part])
        return encoder.finish(), moments

    def _checked(self, name: str, block: np.ndarray, trajectory: int, first: int) -> np.ndarray:
        """The block as it is stored; DataError, naming the place, for values that are not finite."""
        spec = self.specs[name]
        if block.dtype.kind == "f" and not np.isfinite(block).all() and not self.config.allow_nan:
            raise DataError(self._bad(name, ~np.isfinite(block), block, trajectory, first))
        with np.errstate(over="ignore"):
            stored = to_bfloat16(block) if spec.dtype == BFLOAT16 else np.asarray(block, spec.numpy_dtype)
        values = from_bfloat16(stored) if spec.dtype == BFLOAT16 else stored
        if (
            block.dtype.kind == "f"
            and values.dtype.kind == "f"
            and not self.config.allow_nan
            and not np.isfinite(values).all()
        ):
            where = self._bad(name, ~np.isfinite(values), block, trajectory, first)
            raise DataError(f"{where.split('; ')[0]}, which {spec.dtype} cannot hold; choose another dtype")
        return stored

    def _bad(self, name: str, wrong: np.ndarray, block: np.ndarray, trajectory: int, first: int) -> str:
        variable, place = self.variables[name], [int(i) for i in np.argwhere(wrong)[0]]
        value = block[tuple(place)]
        if not variable.per_trajectory:
            return (
                f"{self.sources.described[0].file.url}: {name} holds {value} at {place}; --allow-nan takes it as it is"
            )
        file, local = self.sources.locate(trajectory)
        where = f"trajectory {local}"
        if variable.timed:
            where += f", time {first + place[0]}"
        if name == FIELDS:
            where += f", channel {self.channels[place[1]]}"
        return f"{file.url}: {name} holds {value} at {where}; mend the file, or --allow-nan takes it as it is"


def import_data(config: ImportConfig, progress: Progress | None = None) -> str:
    """Write the sources as a data set at `config.url`; returns its URL.

    Call it again after an interruption: shards that are whole are kept. `progress(done, total)` counts shards. Values are
    read in blocks of `block_bytes`; no file and no trajectory is held as a whole, a shard of up to 512 MiB is.

    Raises:
        DataError: a source is missing, of another layout, does not fit the others or holds values that are not finite;
            another data set is at the URL; a package of the extra `import` is missing.
        ValueError: the config is wrong. StoreError: a store failed.
    """
    work = _Import(config)
    try:
        writer = Writer(Store(config.url, **config.store), work.specs, work.identity())
        jobs = writer.shards()
        report = progress or (lambda done, total: None)
        if writer.finished():
            clean(writer.store)
            report(len(jobs), len(jobs))
            return writer.store.url
        work.sources.check_static()
        writer.begin()
        report(0, len(jobs))
        records: dict[tuple[str, int], dict[str, Any]] = {}
        for name, k in jobs:
            record = writer.written(name, k)
            records[name, k] = record if record is not None else writer.write_bytes(name, k, *work.shard(name, k))
            report(len(records), len(jobs))
        writer.finish(work.attributes(), records)
    finally:
        work.sources.close()
    return writer.store.url

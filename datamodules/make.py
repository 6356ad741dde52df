"""`keel data make`: run a generator and write its data set, shard by shard, restartable at any moment."""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from datamodules.format import DataError, Writer
from datamodules.format.writer import clean, finished
from datamodules.registry import lookup
from datamodules.simulators.base import Generator, set_worker
from datamodules.store import NotFound, Store, StoreError

Progress = Callable[[int, int], None]
Job = tuple[str, int]  # an array and the number of a shard of it
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


@dataclass
class MakeConfig:
    """What to make, and where.

    url: of the data set. generator: its `name` and its own config, see `datamodules.registry.GENERATORS`.
    seed: base seed. shard_bytes: about the size of a shard. workers: processes that compute shards; 0: this one.
    store: options of the store (deadline, endpoint_url, ...). Only url, workers and store leave the bytes as they are.
    """

    url: str = ""
    generator: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    shard_bytes: int = 64 * 2**20
    workers: int = 0
    store: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes={self.shard_bytes}: must be positive; 67108864 is usual")
        if self.workers < 0:
            raise ValueError(f"workers={self.workers}: must be >= 0; 0 computes in this process")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: must be >= 0")


def _checked_keys(given: dict[str, Any], config_class: type, where: str) -> None:
    known = [entry.name for entry in fields(config_class)]
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"{where}{key}: no such field; {hint}")


def _structured(config_class: type, given: dict[str, Any], where: str) -> Any:
    """A config dataclass from plain values, types checked; ValueError names the field."""
    _checked_keys(given, config_class, where)
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(config_class), given))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", "") or ""
        raise ValueError(f"{where}{key}: {str(error).splitlines()[0]}") from error


def load(path: str, overrides: list[str] | None = None) -> MakeConfig:
    """A config from a YAML file (path or URL) with overrides such as `generator.train=64`; ValueError names what is wrong."""
    folder, _, name = path.rpartition("/")
    try:
        text = Store(folder or ".").read(name).decode()
        tree = OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(overrides or []))
    except NotFound as error:
        raise ValueError(f"{path}: no such file; give the path or URL of a YAML file") from error
    except StoreError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a valid config ({' '.join(str(error).split())})") from error
    given = OmegaConf.to_container(tree, resolve=True)
    if not isinstance(given, dict):
        raise ValueError(f"{path}: must hold fields such as url and generator")
    config: MakeConfig = _structured(MakeConfig, {str(key): value for key, value in given.items()}, "")
    return config


def generator_of(config: MakeConfig) -> tuple[str, Generator]:
    """Name and generator of a config; ValueError for an unknown name or field."""
    given = dict(config.generator)
    name = given.pop("name", None)
    if not name:
        raise ValueError("generator.name: is missing; name one, such as navier_stokes_2d")
    config_class, generator_class = lookup("generator", str(name))
    own = _structured(config_class, given, "generator.")
    return str(name), generator_class(own, config.seed, config.shard_bytes)


def _identity(config: MakeConfig, name: str, generator: Generator) -> dict[str, Any]:
    """What fixes the bytes but for the generator's sources."""
    own = asdict(generator.config)
    description = {"name": name, "version": generator.version, "config": own, "seed": config.seed}
    return {"generator": description, "shard_bytes": config.shard_bytes}


def _write(writer: Writer, generator: Generator, bundle: list[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Compute and write the shards of one bundle, unless all of them are there and whole; each with its record.

    A few of them are not kept: where a generator chooses by the bits of a chaotic solution, as the skew product does, those
    written on one machine and the rest on another may be of other choices.
    """
    found = {job: writer.written(*job) for job in bundle}
    kept = {job: record for job, record in found.items() if record is not None}
    if len(kept) == len(bundle):
        yield from kept.items()
        return
    for job in kept:  # first of all, so that none of them is taken for one of those to come
        writer.forget(*job)
    attributes = generator.attributes()
    for name, k in bundle:
        train = attributes["splits"].get("train") if name == attributes["array"] else None
        yield (name, k), writer.write_shard(name, k, generator.values(name, k), tuple(train) if train else None)


def bundles(writer: Writer) -> list[list[Job]]:
    """All shards, those of the same trajectories together: what one process found out for one array serves the others."""
    found: dict[tuple[int, int, int], list[Job]] = {}
    for name, k in writer.shards():
        spec = writer.specs[name]
        found.setdefault((spec.shape[0], spec.shard_length, k), []).append((name, k))
    return list(found.values())


_worker: tuple[Writer, Generator] | None = None


def _start_worker(writer: Writer, generator: Generator, started: Synchronized[int]) -> None:
    global _worker
    with started:
        set_worker(started.value)
        started.value += 1
    if sys.platform == "linux":  # no orphans when the parent is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _worker = writer, generator


def _work(bundle: list[Job]) -> dict[Job, dict[str, Any]]:
    assert _worker is not None
    return dict(_write(*_worker, bundle))


def make(config: MakeConfig, progress: Progress | None = None) -> str:
    """Write the data set of `config`; returns its URL.

    Call it again after an interruption: shards that are whole are kept, those of the same trajectories together or not at
    all. The bytes depend on generator, seed and shard_bytes alone. `progress(done, total)` counts shards. A finished data set
    of this config is left as it is, without a look at the sources (such as text files) that it was made from.

    Raises:
        DataError: another data set, finished or not, is at the URL.
        ValueError: the config is wrong. StoreError: the store failed.
    """
    if not config.url:
        raise ValueError("url: is missing; say where the data set goes, such as runs/data or s3://bucket/data")
    name, generator = generator_of(config)
    store, identity = Store(config.url, **config.store), _identity(config, name, generator)
    report = progress or (lambda done, total: None)
    if (shards := finished(store, identity)) is not None:
        clean(store)
        report(shards, shards)
        return store.url
    identity["source"] = generator.source()
    writer = Writer(store, generator.specs(), identity)
    total = len(writer.shards())
    writer.begin()
    report(0, total)
    records: dict[Job, dict[str, Any]] = {}
    if config.workers == 0:
        for bundle in bundles(writer):
            for job, record in _write(writer, generator, bundle):
                records[job] = record
                report(len(records), total)
    else:
        # Spawned, not forked: torch's threads and store clients do not survive a fork.
        context = multiprocessing.get_context("spawn")
        started = context.Value("i", 0)
        with ProcessPoolExecutor(config.workers, context, _start_worker, (writer, generator, started)) as pool:
            futures = [pool.submit(_work, bundle) for bundle in bundles(writer)]
            try:
                for future in as_completed(futures):
                    for job, record in future.result().items():
                        records[job] = record
                        report(len(records), total)
            except BrokenProcessPool as error:
                raise DataError(
                    f"{config.url}: a worker process died (memory?); run again to continue, perhaps with fewer workers"
                ) from error
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    attributes = {**generator.attributes(), **identity}
    writer.finish(attributes, records)
    return writer.store.url

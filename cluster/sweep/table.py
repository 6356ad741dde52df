"""The run table: one row per run, named after what it computes.

A row's id is `trainer.config.config_hash` of its resolved config, so equal runs are one row, in any order and in any
sweep. Where the data lie is not part of that hash, but where a sweep varies it, it is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from datamodules.store import NotFound, Store, canonical_json, join_url
from trainer import config as configs
from trainer.schema import RunConfig

POINTER = "sweep.json"


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Attributes:
        id: hash of the resolved config.
        axes: what the sweep varied, by axis; it tells the row to people and to `keel fit`.
        values: dotted settings over the base config.
        parameters: of the network. samples: that the run sees; tokens_per_sample: 1 where samples are no sequences.
        flops: of the whole run, by the convention of `trainer.flops`.
        nodes, processes: machines, and processes on each.
        threads: of each process; 0 where the config leaves it open.
        extra: added by the sweep itself: `edge`, `design` or `search`; empty for rows of the config.
    """

    id: str
    axes: Mapping[str, Any]
    values: Mapping[str, Any]
    parameters: int
    samples: int
    tokens_per_sample: int
    flops: float
    nodes: int = 1
    processes: int = 1
    threads: int = 0
    extra: str = ""

    @property
    def label(self) -> str:
        """The row in words: its axes."""
        return ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.axes.items()
        )

    @property
    def cpus(self) -> int:
        """Cores that the run keeps busy on one machine."""
        return self.processes * max(1, self.threads)


@dataclass
class Table:
    """The rows of a sweep over one base config.

    Attributes:
        url: of the sweep.
        name: of the sweep; its runs are called `<name>-<id>`.
        base: content of the run's config.
        sweep: the sweep's config as plain containers (see `cluster.sweep.config`).
        rows: in the order of the config.
    """

    url: str
    name: str
    base: dict[str, Any]
    sweep: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    _configs: dict[str, RunConfig] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def by_id(self) -> dict[str, Row]:
        return {row.id: row for row in self.rows}

    @cached_property
    def start(self) -> RunConfig:
        """The base as a run's config, at the sweep's own URL."""
        return base_config(self.base, self.url)

    def run_url(self, row: Row) -> str:
        return join_url(self.url, "runs", row.id)

    def config(self, row: Row) -> RunConfig:
        """The resolved config of a row's run."""
        if row.id not in self._configs:
            config = resolve(self.start, row.values)
            self._configs[row.id] = dataclasses.replace(config, url=self.run_url(row), name=f"{self.name}-{row.id}")
        return self._configs[row.id]

    def with_rows(self, more: Iterable[Row]) -> Table:
        """The table with rows added; those that it has stay as they are."""
        new = {row.id: row for row in more if row.id not in self.by_id}
        return Table(self.url, self.name, self.base, self.sweep, [*self.rows, *new.values()])

    def added(self, store: Store, since: int = 0) -> list[Row]:
        """The rows that drivers have added while they ran, from the entry `since` on, in their order."""
        names = store.list(self._additions)[since:]
        with ThreadPoolExecutor(max_workers=16) as pool:  # latency, not bandwidth, dominates
            return [Row(**found) for found in pool.map(store.read_json, names)]

    def add(self, store: Store, entry: int, row: Row) -> bool:
        """Adds a row as that entry; False where another driver has made it first."""
        return store.create(f"{self._additions}/{entry:08d}.json", canonical_json(dataclasses.asdict(row)))

    @property
    def _additions(self) -> str:
        return f"added/{hashlib.sha256(canonical_json(self.base)).hexdigest()[:16]}"  # of this base: rows are over it

    def encode(self) -> bytes:
        """One line about the sweep, then one per row."""
        head = {"name": self.name, "base": self.base, "sweep": self.sweep}
        lines = [head, *(dataclasses.asdict(row) for row in self.rows)]
        return "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines).encode()

    def save(self, store: Store) -> None:
        """Puts the table in the store, and makes it the present one."""
        data = self.encode()
        digest = hashlib.sha256(data).hexdigest()[:16]
        store.create(f"tables/{digest}.jsonl", data)
        try:
            present = store.read_json(POINTER).get("table")
        except NotFound:
            present = None
        if present != digest:
            store.write_json(POINTER, {"table": digest, "name": self.name, "kind": "keel sweep"})


def read_table(store: Store) -> Table:
    """The present table of the sweep in `store`, with the rows that drivers have added since.

    Raises:
        ConfigError: there is no sweep.
    """
    try:
        digest = store.read_json(POINTER)["table"]
    except NotFound as error:
        raise configs.ConfigError(
            f"no sweep at {store.url}: it has no {POINTER}; `keel sweep run` starts one"
        ) from error
    head, *rows = (json.loads(line) for line in store.read(f"tables/{digest}.jsonl").splitlines())
    table = Table(store.url, head["name"], head["base"], head["sweep"], [Row(**row) for row in rows])
    return table.with_rows(table.added(store))


def base_config(base: Mapping[str, Any], url: str) -> RunConfig:
    """The base as it stands, with progress bars and copies to other tools off: many runs share one terminal."""
    return configs.varied(configs.load({**base, "url": url}), {"log.progress": False})


def resolve(start: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """`start` with dotted values changed.

    Raises:
        ConfigError: unknown key, wrong type, impossible value or combination.
    """
    plain = {key: value for key, value in values.items() if _is_plain(key, value)}
    if len(plain) < len(values):
        start = _variant(start, {key: value for key, value in values.items() if key not in plain})
    return configs.varied(start, plain)


def _is_plain(key: str, value: Any) -> bool:
    return not isinstance(value, Mapping) and not key.endswith(".name")


def _variant(start: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Another variant of a section (whose settings are then its own), or a value that is a mapping."""
    known = json.dumps([configs.to_dict(start), values], sort_keys=True, default=str)
    if known not in _variants:
        raw = configs.to_dict(start)
        for key, value in values.items():
            head, _, name = key.partition(".")
            if name == "name" and raw[head].get("name") != value:
                raw[head] = {"name": value}
            elif name:
                raw[head][name] = value
            else:
                raw[head] = value
        _variants[known] = configs.load(raw)
    return _variants[known]


_variants: dict[str, RunConfig] = {}

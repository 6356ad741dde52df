"""What a report shows, read from a run's store; every part may be missing."""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from datamodules.store import NotFound, Store

Series = tuple[list[float], list[float]]
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+")  # of a block or a lead time, not the 2 of relative_l2
_BOOKKEEPING = {"step", "attempt", "time", "event", "rank", "index"}


@dataclass
class RunView:
    """One run as its store shows it now.

    Attributes:
        url: where the run lies.
        config: resolved config as plain containers; `config_text` is the YAML itself.
        attempts: one mapping per start of the run, in order.
        rows: rows of metrics as one history (see `trainer.records`), events included.
        record: the outcome, None while the run is going.
        evaluation: metrics of `keel evaluate`, None before it.
        arrays: `truth`, `prediction`, `error` [T, C, *S] of one rollout, where the task has fields.
    """

    url: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    attempts: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.url.rstrip("/").rsplit("/", 1)[-1])

    @property
    def status(self) -> str:
        """The record's status, else `running or interrupted`: from outside the two look alike."""
        return str((self.record or {}).get("status", "running or interrupted"))

    @property
    def measured(self) -> dict[str, Any]:
        """The evaluation's metrics by name, and its baselines as `baseline.<name>`."""
        evaluation = self.evaluation or {}
        return {**(evaluation.get("metrics") or {}), **flatten({"baseline": evaluation.get("baseline") or {}})}

    @property
    def events(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "event" in row]

    @property
    def resumes(self) -> list[tuple[int, int]]:
        """(attempt, step that it continued from) of every attempt after the first."""
        return [(a["attempt"], int(a.get("resumed_from") or 0)) for a in self.attempts if a.get("attempt", 1) > 1]

    @property
    def keys(self) -> list[str]:
        """Names of all numeric series, sorted."""
        return sorted({key for row in self._numeric for key, value in row.items() if _is_number(key, value)})

    @property
    def _numeric(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if "event" not in row]

    def series(self, key: str) -> Series:
        """(steps, values) of one metric."""
        points = [(row["step"], float(row[key])) for row in self._numeric if key in row and _is_number(key, row[key])]
        return [float(step) for step, _ in points], [value for _, value in points]


def families(keys: Iterable[str]) -> dict[str, list[str]]:
    """Series that differ only in numbers (blocks, lead times) belong in one plot: template -> keys in that order."""
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(_NUMBER.sub("*", key), []).append(key)
    return {name: sorted(group, key=numbers) for name, group in found.items()}


def load(store: Store) -> RunView:
    """Reads what there is of the run in `store`.

    Raises:
        StoreError: the store cannot be read.
    """
    from trainer import records

    view = RunView(url=store.url)
    view.config_text = (_optional(store, "config.yaml") or b"").decode(errors="replace")
    parsed = yaml.safe_load(view.config_text) if view.config_text else {}
    view.config = parsed if isinstance(parsed, dict) else {}
    view.attempts = records.read_attempts(store)
    view.rows = records.read_metrics(store)
    record = _optional(store, "record.jsonl")
    view.record = records.decode(record)[-1] if record else None
    if view.record and view.record.get("attempts", len(view.attempts)) < len(view.attempts):
        view.record = None  # of an earlier attempt: the run has been resumed since
    evaluation = _optional(store, "evaluation.json")
    view.evaluation = records.decode(evaluation)[-1] if evaluation else None
    view.arrays = _arrays(_optional(store, "evaluation.npz"))
    return view


def finite(series: Series) -> Series:
    """The points of a series that can be drawn."""
    kept = [(x, y) for x, y in zip(*series, strict=True) if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def thin(series: Series, most: int = 800) -> Series:
    """At most about `most` points: of each run of points its lowest and highest stay, so no spike is lost."""
    xs, ys = series
    if len(xs) <= most:
        return series
    width = math.ceil(2 * len(xs) / most)
    chosen: set[int] = {0, len(xs) - 1}
    for start in range(0, len(xs), width):
        block = range(start, min(start + width, len(xs)))
        chosen |= {min(block, key=ys.__getitem__), max(block, key=ys.__getitem__)}
    order = sorted(chosen)
    return [xs[i] for i in order], [ys[i] for i in order]


def smooth(values: list[float], span: int) -> list[float]:
    """Exponential moving average over about `span` points, without bias at the start."""
    decay, total, weight, out = 1 - 1 / max(1, span), 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        out.append(total / weight if weight else value)
    return out


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys; lists are left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif not isinstance(value, list | tuple):
            flat[f"{prefix}{key}"] = value
    return flat


def curves(measured: Mapping[str, Any]) -> dict[str, Series]:
    """Metrics against lead time: `name@1`, `name@2` ... of an evaluation, as (lead times, values) by name."""
    found: dict[str, dict[int, float]] = {}
    for key, value in measured.items():
        name, separator, lead = key.rpartition("@")
        if separator and lead.isdigit() and isinstance(value, int | float):
            found.setdefault(name, {})[int(lead)] = float(value)
    return {
        name: ([float(lead) for lead in sorted(values)], [values[lead] for lead in sorted(values)])
        for name, values in found.items()
        if len(values) > 1
    }


def _optional(store: Store, path: str) -> bytes | None:
    try:
        return store.read(path)
    except NotFound:
        return None


def _arrays(data: bytes | None) -> dict[str, np.ndarray]:
    if data is None:
        return {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile):
        return {}


def _is_number(key: str, value: object) -> bool:
    return key not in _BOOKKEEPING and isinstance(value, int | float) and not isinstance(value, bool)


def numbers(key: str) -> tuple[int, ...]:
    """The numbers (block, lead time) in the name of a series."""
    return tuple(int(number) for number in _NUMBER.findall(key))

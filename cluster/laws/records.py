"""Runs as columns, read from Keel's records or from anyone's CSV, JSON lines or Parquet.

Nothing is dropped in silence: every row that a fit cannot use is named in a warning, and what would make a number wrong
(an id with two results, two ways of counting FLOPs) is an error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.laws.optimise import Array
from datamodules.store import NotFound, Store

# Column -> the names under which it is found, the first that is there; dots go into nested records.
ALIASES: dict[str, tuple[str, ...]] = {
    "n": ("n", "N", "n_params", "params", "parameters", "num_params"),
    "d": ("d", "D", "d_seen", "tokens", "n_tokens", "samples"),
    "u": ("u", "d_unique", "unique", "unique_tokens", "trajectories"),
    "c": ("c", "C", "flops", "compute"),
    "budget": ("budget", "flops_budget"),
    "loss": ("loss", "final_loss", "val_loss"),
    "loss_std": ("loss_std",),
    "initial_loss": ("initial_loss",),
    "lr": ("lr", "base_lr", "lr_base", "learning_rate", "config.optim.lr"),
    "batch": ("batch", "batch_size", "global_batch", "config.train.global_batch"),
    "batch_small": ("batch_small",),
    "batch_large": ("batch_large",),
    "grad_sq_small": ("grad_sq_small",),
    "grad_sq_large": ("grad_sq_large", "grad_sq_big"),
    "steps": ("steps", "step"),
    "width": ("width", "config.model.width"),
    "depth": ("depth", "config.model.depth"),
    "horizon": ("horizon",),
    "h": ("h", "spacing"),
    "resolution": ("resolution",),
    "seed": ("seed", "config.seed"),
    "run_id": ("run_id", "id"),
    "status": ("status",),
    "convention": ("flops_convention",),
    "code": ("code_rev", "code_version", "environment.revision"),
}
_FILES = ("csv", "json", "jsonl", "parquet")
_TEXT = ("run_id", "status", "convention", "code")
_SPECIAL = {"nan": math.nan, "infinity": math.inf, "inf": math.inf, "-infinity": -math.inf, "": math.nan}


class DataProblem(ValueError):
    """Records that no fit should be made of; the message names rows or columns, and what to do."""


@dataclass
class Runs:
    """One row per run.

    Attributes:
        columns: numbers by column, NaN where a row has none. n: parameters; d: tokens or samples seen; u: unique ones;
            c: FLOPs; loss in nats or whatever the loss is; lr, batch (samples), width, depth, horizon (steps or samples).
        names: what messages call each row.
        status: ok, diverged, ... of each run.
        text: the columns of words (run_id, convention, code).
        warnings: what was left out or is doubtful, rows named.
    """

    columns: dict[str, Array]
    names: list[str]
    status: list[str]
    text: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, column: str) -> Array:
        if column not in self.columns:
            known = ", ".join(sorted(self.columns))
            raise DataProblem(
                f"the records have no column '{column}' (looked for {', '.join(ALIASES.get(column, (column,)))}); they "
                f"have {known}; name it with --column {column}=NAME"
            )
        return self.columns[column]

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def keep(self, rows: NDArray[Any] | Sequence[int]) -> Runs:
        """The chosen rows."""
        index = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows, dtype=int)
        return replace(
            self,
            columns={name: values[index] for name, values in self.columns.items()},
            names=[self.names[i] for i in index],
            status=[self.status[i] for i in index],
            text={name: [values[i] for i in index] for name, values in self.text.items()},
            warnings=list(self.warnings),
        )

    def axes(self, names: Iterable[str]) -> dict[str, Array]:
        """Columns by name. Raises DataProblem for one that is not there."""
        return {name: self[name] for name in names}


def of_columns(**columns: Any) -> Runs:
    """Runs from arrays of equal length, such as `of_columns(n=..., d=..., loss=...)`."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in columns.items()}
    count = len(next(iter(arrays.values())))
    return Runs(arrays, [f"row {i + 1}" for i in range(count)], ["ok"] * count)


def load(
    source: str, columns: Mapping[str, str] | None = None, where: Sequence[str] = (), convention: str | None = None
) -> Runs:
    """Reads and checks runs.

    Args:
        source: a .csv, .json, .jsonl or .parquet file, or a folder or store of records (any fsspec URL).
        columns: column -> its name in the source, where it is none of `ALIASES`.
        where: `name=value` conditions on the source's own columns.
        convention: keep only the rows that count FLOPs so.

    Raises:
        DataProblem: nothing there, a missing column, one id with two results, mixed FLOP conventions.
    """
    rows = _select(_read(source), where)
    if not rows:
        chosen = f" that satisfy {' and '.join(where)}" if where else ""
        raise DataProblem(f"no records at {source}{chosen}")
    runs = _columns(rows, dict(columns or {}))
    runs = _unique(runs)
    return _one_convention(_one_code(runs), convention)


def base_config(source: str, where: Sequence[str] = ()) -> dict[str, Any] | None:
    """Config of the run with the most FLOPs among the records at `source` that ended well; None: none has a config."""
    rows = [row for row in _select(_read(source), where) if row.get("status", "ok") == "ok"]
    sweep = _sweep(source)
    if sweep is not None:  # its table has the configs of all rows
        from cluster.sweep.table import read_table
        from trainer.config import to_dict

        table = read_table(sweep)
        return to_dict(table.config(table.by_id[_largest(rows)["row"]])) if rows else None
    rows = [row for row in rows if isinstance(row.get("config"), Mapping)]
    return dict(_largest(rows)["config"]) if rows else None


def loss_column(source: str, columns: Mapping[str, str]) -> str | None:
    """Where the record of a run has what the records at `source` call its loss; None: at the usual place."""
    if "loss" in columns:
        return columns["loss"]
    sweep = _sweep(source)
    if sweep is None:
        return None
    from cluster.sweep.table import read_table

    objective = str(read_table(sweep).sweep["objective"])
    return None if objective == "loss" else f"metrics.{objective}"


def _largest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return max(rows, key=lambda row: row.get("flops") or 0)


def _sweep(source: str) -> Store | None:
    """The store of a sweep; None where `source` is a file, or records of another kind."""
    if source.rpartition(".")[2].lower() in _FILES:
        return None
    from cluster.sweep.results import is_sweep

    store = Store(source)
    return store if is_sweep(store) else None


def fingerprint(runs: Runs) -> str:
    """Hash of the rows: says later which runs a prediction was made from."""
    digest = hashlib.sha256()
    for name in sorted(runs.columns):
        digest.update(name.encode() + runs.columns[name].tobytes())
    return digest.hexdigest()[:16]


def read_points(source: str, columns: Mapping[str, str] | None = None, where: Sequence[str] = ()) -> Runs:
    """As `load`, for tables with many rows per run id (training curves).

    Raises:
        DataProblem: nothing there, or a missing column.
    """
    rows = _select(_read(source), where)
    if not rows:
        raise DataProblem(f"no rows at {source}")
    return _one_convention(_columns(rows, dict(columns or {})), None)


def usable(runs: Runs, needed: Sequence[str]) -> Runs:
    """The rows that a fit of the columns `needed` (and the loss) can use; the others are named in a warning."""
    good = np.ones(len(runs), dtype=bool)
    for name in (*needed, "loss"):
        values = runs[name]
        bad = good & ~(np.isfinite(values) & (values > 0))
        if bad.any():
            kind = "is NaN or infinite" if not np.isfinite(values[bad]).any() else "is not a positive number"
            runs = _warned(runs, f"left out, {name} {kind}: {listing(runs, bad)}")
        good &= ~bad
    failed = good & np.array([status not in ("ok", "") for status in runs.status])
    if failed.any():
        kinds = ", ".join(sorted({runs.status[i] for i in np.flatnonzero(failed)}))
        runs = _warned(runs, f"left out, status {kinds}: {listing(runs, failed)}")
    return runs.keep(good & ~failed)


def listing(runs: Runs, rows: NDArray[np.bool_], most: int = 6) -> str:
    """The names of some rows, at most so many of them."""
    names = [runs.names[i] for i in np.flatnonzero(rows)]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _warned(runs: Runs, text: str) -> Runs:
    return replace(runs, warnings=[*runs.warnings, text])


# ------------------------------------------------------------------------------------------------------------- reading
def _read(source: str) -> list[dict[str, Any]]:
    base, _, name = source.rpartition("/")
    suffix = name.rpartition(".")[2].lower()
    if suffix in _FILES:
        try:
            data = Store(base or ("/" if source.startswith("/") else ".")).read(name)
        except NotFound as error:
            raise DataProblem(f"no file at {source}") from error
        return _parse(suffix, data, source)
    if (sweep := _sweep(source)) is not None:
        from cluster.sweep.results import read_results

        return read_results(sweep)
    store = Store(source)
    paths = [path for path in store.list() if path.endswith("record.jsonl") or "records/" in f"/{path}"]
    rows: list[dict[str, Any]] = []
    for path in sorted(paths):
        if path.endswith((".json", ".jsonl")):
            rows += _parse(path.rpartition(".")[2], store.read(path), f"{source}/{path}")
    return rows


def _parse(suffix: str, data: bytes, source: str) -> list[dict[str, Any]]:
    try:
        if suffix == "csv":
            return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))))
        if suffix == "json":
            found = json.loads(data)
            return found if isinstance(found, list) else [found]
        if suffix == "jsonl":
            return [json.loads(line) for line in data.decode().splitlines() if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise DataProblem(f"{source} is not valid {suffix.upper()}: {error}") from error
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataProblem(f"{source}: reading Parquet needs pyarrow: pip install 'keel[parquet]'") from error
    try:
        return list(pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise DataProblem(f"{source} is not valid Parquet: {error}") from error


def _select(rows: list[dict[str, Any]], where: Sequence[str]) -> list[dict[str, Any]]:
    for condition in where:
        name, separator, value = condition.partition("=")
        if not separator:
            raise DataProblem(f"condition '{condition}' is not of the form name=value")
        if rows and all(find(row, name) is None for row in rows):
            raise DataProblem(f"condition '{condition}': the records have no column '{name}'")
        rows = [row for row in rows if str(find(row, name)) == value]
    return rows


def find(row: Mapping[str, Any], name: str) -> Any:
    """The value under a name, dots going into nested mappings; None where there is none."""
    if name in row:
        return row[name]
    head, _, tail = name.partition(".")
    inner = row.get(head)
    return find(inner, tail) if tail and isinstance(inner, Mapping) else None


# ------------------------------------------------------------------------------------------------------------ checking
def _columns(rows: list[dict[str, Any]], given: dict[str, str]) -> Runs:
    for column, name in given.items():
        if column not in ALIASES:
            raise DataProblem(f"--column {column}={name}: no column '{column}'; choose from {', '.join(ALIASES)}")
        if all(find(row, name) is None for row in rows):
            raise DataProblem(f"--column {column}={name}: the records have no '{name}'")
    numbers: dict[str, Array] = {}
    text: dict[str, list[str]] = {}
    bad: list[str] = []
    for column, aliases in ALIASES.items():
        names = (given[column],) if column in given else aliases
        values = [next((v for v in (find(row, name) for name in names) if v is not None), None) for row in rows]
        if all(value is None for value in values):
            continue
        if column in _TEXT:
            text[column] = ["" if value is None else str(value) for value in values]
        else:
            parsed = [_number(value) for value in values]
            bad += [f"row {i + 1}: {column}={values[i]!r}" for i, number in enumerate(parsed) if number is None]
            numbers[column] = np.array([math.nan if number is None else number for number in parsed])
    if bad:
        raise DataProblem(f"not a number: {'; '.join(bad[:5])}")
    ids = text.get("run_id", [""] * len(rows))
    names_of = [f"row {i + 1}" + (f" ({run_id})" if run_id else "") for i, run_id in enumerate(ids)]
    if "h" not in numbers and "resolution" in numbers:
        numbers["h"] = 1 / numbers["resolution"]
    return Runs(numbers, names_of, text.pop("status", ["ok"] * len(rows)), text)


def _number(value: Any) -> float | None:
    if value is None:
        return math.nan
    if isinstance(value, str):
        value = _SPECIAL.get(value.strip().lower(), value)
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _unique(runs: Runs) -> Runs:
    """One row per id: equal rows are one run read twice; unequal ones are a contradiction."""
    ids = runs.text.get("run_id")
    if ids is None:
        return runs
    first: dict[str, int] = {}
    again = np.zeros(len(runs), dtype=bool)
    for row, run_id in enumerate(ids):
        earlier = first.setdefault(run_id, row) if run_id else row
        if earlier == row:
            continue
        pairs = [(values[earlier], values[row]) for values in runs.columns.values()]
        if runs.status[earlier] != runs.status[row] or any(a != b and not (a != a and b != b) for a, b in pairs):
            raise DataProblem(
                f"{runs.names[earlier]} and {runs.names[row]} have the same run id but different results: keep one of them"
            )
        again[row] = True
    if not again.any():
        return runs
    return _warned(runs, f"duplicates, counted once: {listing(runs, again)}").keep(~again)


def _one_code(runs: Runs) -> Runs:
    codes = runs.text.get("code", [])
    known = sorted({code for code in codes if code})
    if len(known) < 2:
        return runs
    usual = max(known, key=codes.count)
    other = np.array([code not in ("", usual) for code in codes])
    return _warned(runs, f"of another code version than {usual}: {listing(runs, other)}")


def _one_convention(runs: Runs, wanted: str | None) -> Runs:
    kinds = runs.text.get("convention", [])
    if wanted is not None:
        chosen = np.array([kind == wanted for kind in kinds], dtype=bool)
        if not chosen.any():
            raise DataProblem(
                f"no records count FLOPs as '{wanted}'; they have {', '.join(sorted(set(kinds))) or 'none'}"
            )
        return runs.keep(chosen)
    known = sorted({kind for kind in kinds if kind})
    if len(known) > 1:
        example = {kind: listing(runs, np.array([k == kind for k in kinds]), 3) for kind in known}
        shown = "; ".join(f"'{kind}': {rows}" for kind, rows in example.items())
        raise DataProblem(
            f"the records count FLOPs in {len(known)} ways, and the exponent depends on it ({shown}): choose one with "
            f"--convention"
        )
    return runs

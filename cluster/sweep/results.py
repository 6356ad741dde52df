"""The outcome of each row, in few objects: what `keel sweep status` and `keel fit` read.

A driver adds lines to the folder `records`, each the end of one row, derived from the record that its run wrote. A run
whose driver died after the run's own record was written is found there (`complete`). Lines are never changed; of two for
one row a success counts rather than a failure, else the first.
"""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cluster.sweep.claims import running
from cluster.sweep.table import Row, Table, read_table
from datamodules.store import NotFound, Store
from trainer.outcome import FLOPS_CONVENTION
from trainer.records import decode, encode, read_record

Result = dict[str, Any]

_MOST = 64  # objects before they are put together


class Results:
    """The results of a sweep, read again only where there is something new.

    Args:
        store: the sweep's URL.
        objective: what `loss` means: the training loss at the end, or a validation metric.
    """

    def __init__(self, store: Store, objective: str) -> None:
        self.store, self.objective = store, objective
        self.rows: dict[str, Result] = {}
        self._seen: set[str] = set()

    def refresh(self) -> dict[str, Result]:
        """Row id -> result, of all rows that have one."""
        for _ in range(5):
            names = self.store.list("records")
            try:
                new = [name for name in names if name not in self._seen]
                with ThreadPoolExecutor(max_workers=16) as pool:
                    for name, data in zip(new, pool.map(self.store.read, new), strict=True):
                        self._take(decode(data))
                        self._seen.add(name)
                return self.rows
            except NotFound:  # somebody has put objects together since they were listed
                continue
        raise RuntimeError(f"{self.store.url}: its records change faster than they can be read")

    def add(self, results: Sequence[Result]) -> None:
        """Adds results, as one object."""
        if not results:
            return
        name = f"records/{uuid.uuid4().hex[:16]}.jsonl"
        self.store.write(name, b"".join(encode(result) for result in results))
        self._seen.add(name)
        self._take(results)
        if len(self._seen) > _MOST:
            self.compact()

    def compact(self) -> None:
        """Puts all objects together. Any number of drivers may do so at once: an object goes only after its lines are in
        another one."""
        names = self.store.list("records")
        if len(names) < 2:
            return
        try:
            with ThreadPoolExecutor(max_workers=16) as pool:
                lines = sorted({line for data in pool.map(self.store.read, names) for line in data.splitlines()})
        except NotFound:
            return
        data = b"\n".join(lines) + b"\n"
        whole = f"records/all-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"
        self.store.write(whole, data)
        self._seen.add(whole)
        for name in names:
            if name != whole:
                self.store.delete(name)
                self._seen.discard(name)

    def complete(self, table: Table, begun: Collection[str], *, keep: bool = True) -> dict[str, Result]:
        """As `refresh`, with the outcome of those rows whose run has ended though no driver has told; `keep`: told now.

        Args:
            begun: the rows that somebody has claimed; the others have no run.
        """
        self.refresh()
        silent = [row for row in table.rows if row.id in begun and row.id not in self.rows]
        with ThreadPoolExecutor(max_workers=16) as pool:
            found = [result for result in pool.map(lambda row: self._ended(table, row), silent) if result is not None]
        if keep:
            self.add(found)
        return {**self.rows, **{result["row"]: result for result in found}}

    def _ended(self, table: Table, row: Row) -> Result | None:
        try:
            record = read_record(Store(table.run_url(row), **self.store.options))
        except NotFound:
            return None
        # What failed or was preempted is tried again.
        return of_record(row, record, self.objective) if record["status"] in ("ok", "diverged", "pruned") else None

    def _take(self, results: Iterable[Result]) -> None:
        for result in results:
            known = self.rows.get(result["row"])
            if known is None or (known["status"] == "failed" and result["status"] != "failed"):
                self.rows[result["row"]] = result


def of_record(row: Row, record: Mapping[str, Any], objective: str) -> Result:
    """The result of a row from its run's record. A run that ended well with an objective that is no number has diverged; one
    that has none (a metric that its validation does not give) has failed."""
    metrics = dict(record.get("metrics") or {})
    loss = record.get("loss") if objective == "loss" else metrics.get(objective)
    status, error = str(record["status"]), record.get("error")
    if status == "ok" and loss is None:
        known = ", ".join(metrics) or "none"
        status, error = "failed", f"the run has no {objective}; its metrics are {known}"
    elif status == "ok" and not math.isfinite(float(loss or 0.0)):
        status = "diverged"
    config = record.get("config") or {}
    speed = record.get("throughput") or {}
    environment = record.get("environment") or {}
    seconds = speed.get("elapsed_seconds") or record.get("attempt_seconds")
    return {
        **_columns(row, config),
        "run_id": record.get("run_id", row.id),
        "url": record.get("url"),
        "status": status,
        "error": error,
        "steps": record.get("steps"),
        "samples": record.get("samples"),
        "tokens": record.get("tokens"),
        "flops": record.get("flops"),
        "flops_convention": record.get("flops_convention", FLOPS_CONVENTION),
        "loss": loss,
        "train_loss": record.get("loss"),
        "metrics": metrics,
        "diverged_step": record.get("diverged_step"),
        "retries": record.get("retries", 0),
        "dataset": record.get("dataset"),
        "seconds": seconds,
        "device_seconds": None if seconds is None else seconds * environment.get("world_size", 1),
        "flop_per_s": speed.get("flop_per_s"),
        "mfu": speed.get("mfu"),
        "host": environment.get("host"),
        "device": (environment.get("devices") or ["cpu"])[0],
        "code_rev": environment.get("revision"),
    }


def failed(row: Row, error: str) -> Result:
    """The result of a row that could not be done."""
    return {**_columns(row, {}), "run_id": row.id, "status": "failed", "error": error, "loss": None}


def _columns(row: Row, config: Mapping[str, Any]) -> Result:
    """What the row itself tells."""
    names = {
        "lr": "optim.lr",
        "batch": "train.global_batch",
        "width": "model.width",
        "depth": "model.depth",
        "seed": "seed",
        "horizon": "train.max_steps",
        "parametrization": "parametrization.name",
        "optimizer": "optim.name",
        "schedule": "schedule.name",
    }
    found = {}
    for column, key in names.items():
        holder: Any = config
        for part in key.split("."):
            holder = holder.get(part) if isinstance(holder, Mapping) else None
        found[column] = holder
    known = {column: row.values[key] for column, key in names.items() if key in row.values}
    budget = {"budget": row.axes["budget"]} if "budget" in row.axes else {}
    return {
        "row": row.id,
        "axes": dict(row.axes),
        **{column: value for column, value in {**found, **known}.items() if value is not None},
        **budget,
        "parameters": row.parameters,
        "extra": row.extra,
    }


def is_sweep(store: Store) -> bool:
    """Whether a sweep lies at the URL of `store`."""
    from cluster.sweep.table import POINTER

    return store.exists(POINTER)


def read_results(store: Store) -> list[Result]:
    """All results of the rows of a sweep's present table, in the table's order. Writes nothing.

    Raises:
        ConfigError: there is no sweep.
    """
    table = read_table(store)
    found = Results(store, table.sweep["objective"]).complete(table, running(store), keep=False)
    return [found[row.id] for row in table.rows if row.id in found]

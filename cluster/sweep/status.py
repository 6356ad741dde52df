"""How a sweep stands, from its table, its results and its claims: a few objects, however many rows there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.launch.job import read_job
from cluster.sweep.claims import running
from cluster.sweep.results import Result, Results
from cluster.sweep.table import Row, Table
from datamodules.store import Store

STATES = ("ok", "diverged", "pruned", "failed", "running", "missing")


@dataclass
class Edge:
    """The best value of an axis is the first or the last one tried.

    Attributes:
        axis: which one. side: `low` or `high`.
        cell: the other axes (but the seed).
        values: tried, ascending; loss: at each, the mean over seeds (infinite where a run diverged or was pruned).
    """

    axis: str
    side: str
    cell: dict[str, Any]
    values: list[float]
    loss: list[float]

    @property
    def label(self) -> str:
        best = self.values[0 if self.side == "low" else -1]
        where = ", ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in self.cell.items()
        )
        return f"{self.axis}={best:g} is the best{' at ' + where if where else ''}, and the {'lowest' if self.side == 'low' else 'highest'} tried"


@dataclass
class Status:
    """Attributes:
    rows: state of each row, in the table's order (see `STATES`).
    results: row id -> result.
    edges: of the axes that are optimised.
    best: the result of least loss, if there is one.
    """

    table: Table
    rows: dict[str, str]
    results: dict[str, Result]
    edges: list[Edge] = field(default_factory=list)
    best: Result | None = None

    @property
    def counts(self) -> dict[str, int]:
        """State -> number of rows, of all states."""
        found = dict.fromkeys(STATES, 0)
        for state in self.rows.values():
            found[state] += 1
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything as plain containers."""
        return {
            "url": self.table.url,
            "name": self.table.name,
            "objective": self.table.sweep["objective"],
            "counts": self.counts,
            "best": self.best,
            "edges": [vars(edge) for edge in self.edges],
            "rows": [
                {"row": row.id, "axes": dict(row.axes), "status": self.rows[row.id], "extra": row.extra}
                | {key: self.results.get(row.id, {}).get(key) for key in ("loss", "error", "url")}
                for row in self.table.rows
            ],
        }


def status(table: Table) -> Status:
    """How the sweep of a table stands. Writes nothing."""
    store = Store(table.url)
    results = Results(store, table.sweep["objective"])
    held = running(store)
    known = results.complete(table, held, keep=False)
    states = {row.id: _state(table, row, known, held) for row in table.rows}
    mine = {row.id: known[row.id] for row in table.rows if row.id in known}
    found = Status(table, states, mine)
    found.edges = edges(table.rows, mine, optimised(table))
    good = [result for result in mine.values() if result["status"] == "ok"]
    found.best = min(good, key=lambda result: result["loss"], default=None)
    return found


def _state(table: Table, row: Row, results: Mapping[str, Result], held: Mapping[str, bool]) -> str:
    if row.id in results:
        return str(results[row.id]["status"])
    if row.nodes > 1:  # a job of its own, which no driver waits for
        job = read_job(Store(table.run_url(row)))
        alive = job is not None and job.state() in ("queued", "running")
    else:
        alive = held.get(row.id, False)
    return "running" if alive else "missing"


def optimised(table: Table) -> list[str]:
    """The axes whose best value is looked for."""
    names = list(dict.fromkeys(name for row in table.rows for name in row.axes))
    return list(table.sweep["optimise"]) or [name for name in names if name.startswith("optim.")]


def edges(rows: Sequence[Row], results: Mapping[str, Result], axes: Sequence[str]) -> list[Edge]:
    """Where the best value of one of `axes` is at an end of those tried, with nothing diverged beyond it. A cell counts
    once all its rows have results, and at least two values."""
    found = []
    for axis in axes:
        cells: dict[tuple[Any, ...], list[Row]] = {}
        for row in rows:
            if isinstance(row.axes.get(axis), int | float):
                others = {name: value for name, value in row.axes.items() if name not in (axis, "seed")}
                cells.setdefault(tuple(sorted((name, repr(value)) for name, value in others.items())), []).append(row)
        for members in cells.values():
            if any(row.id not in results for row in members):
                continue
            values = sorted({float(row.axes[axis]) for row in members})
            loss = [_mean([results[row.id] for row in members if float(row.axes[axis]) == value]) for value in values]
            best = min(range(len(values)), key=loss.__getitem__)
            if len(values) < 2 or not math.isfinite(loss[best]) or 0 < best < len(values) - 1:
                continue
            cell = {name: value for name, value in members[0].axes.items() if name not in (axis, "seed")}
            found.append(Edge(axis, "high" if best else "low", cell, values, loss))
    return found


def _mean(results: Sequence[Result]) -> float:
    if any(result["status"] != "ok" for result in results):
        return math.inf
    return sum(result["loss"] for result in results) / len(results)

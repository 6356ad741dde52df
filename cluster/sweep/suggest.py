"""Where an executor that asks for rows one by one gets them: the table, or a searcher that suggests them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any, Protocol

from cluster.sweep.results import Result
from cluster.sweep.sweep import Sweep
from cluster.sweep.table import Row, Table

log = logging.getLogger("keel.sweep")

SEARCHERS = {"optuna": "ray.tune.search.optuna:OptunaSearch"}
EXTRA = "search"  # what the rows of a searcher say of themselves


class Source(Protocol):
    """Rows that are claimed, one at a time."""

    def next(self, trial: str) -> Row | None:
        """A claimed row for a trial; None when none is left."""
        ...

    def seen(self, trial: str, result: dict[str, Any]) -> None:
        """Metrics of a run that goes on."""
        ...

    def ended(self, trial: str, row: Row, result: Result | None) -> None:
        """The result of a row; None where it was given back."""
        ...


class TableRows:
    """The rows of the table, in their order; those that were interrupted come again."""

    def __init__(self, sweep: Sweep, rows: Sequence[Row]) -> None:
        self.sweep, self.waiting = sweep, list(rows)

    def next(self, trial: str) -> Row | None:
        while self.waiting:
            row = self.waiting.pop(0)
            if self.sweep.claim([row]):
                return row
        return None

    def seen(self, trial: str, result: dict[str, Any]) -> None: ...

    def ended(self, trial: str, row: Row, result: Result | None) -> None:
        if result is None:
            self.waiting.append(row)


class Suggested:
    """Rows that a searcher of Tune suggests, `random.samples` in all, from the axes of `random`.

    Suggestions become rows of the table like any others, by a log that all drivers append to on the condition that nobody
    else has: so none is lost, and together they make as many as were asked for. A new driver tells a fresh searcher the
    results that there are, so the searcher's own state may be lost. A run that diverged counts as an infinite loss.
    """

    def __init__(self, sweep: Sweep) -> None:
        from ray.tune.search import Searcher

        from cluster.sweep.config import load
        from cluster.sweep.expand import Maker
        from cluster.sweep.tune import named

        self.sweep, self.config = sweep, load(sweep.options)
        self.maker, self.metric = Maker(self.config), self.config.objective
        chosen = self.config.tune
        cls = named(SEARCHERS.get(chosen.search, chosen.search), "tune.search", Searcher)
        try:
            self.searcher = cls(**chosen.search_options)
        except (TypeError, ImportError, AssertionError) as error:
            raise ValueError(f"tune.search={chosen.search}: {error}") from error
        self.searcher.set_search_properties(self.metric, "min", space(self.config.random.axes))
        self.own: dict[str, Row] = {}
        self._names: dict[str, str] = {}  # trial -> what the searcher calls it
        self._entries = 0
        self._read()
        self._recall()

    @property
    def left(self) -> int:
        """How many suggestions are still to be made."""
        return to_suggest(self.sweep.table)

    @property
    def over(self) -> bool:
        """Whether all suggestions were made, and done."""
        return not self.left and not any(row.extra == EXTRA for row in self.sweep.missing())

    def next(self, trial: str) -> Row | None:
        for row in [row for row in self.sweep.missing() if row.extra == EXTRA]:  # of a driver that was killed
            if self.sweep.claim([row]):
                return row
        repeats = 0
        while self.left and repeats < 100:
            name = f"{trial}-{repeats}"
            point = self.searcher.suggest(name)
            if not isinstance(point, dict):
                return None
            row = self.maker.row({axis: point[axis] for axis in self.config.random.axes}, EXTRA)
            if not self._add(row):
                self._tell(name, None)
                return None
            if self.sweep.claim([row]):
                self.own[trial] = row
                self._names[trial] = name
                return row
            self._tell(name, self.sweep.results.rows.get(row.id))
            repeats += 1
        return None

    def seen(self, trial: str, result: dict[str, Any]) -> None:
        if trial in self.own and self.metric in result:
            self.searcher.on_trial_result(self._names[trial], result)

    def ended(self, trial: str, row: Row, result: Result | None) -> None:
        if trial in self.own:
            del self.own[trial]
            self._tell(self._names[trial], result)

    def _tell(self, name: str, result: Result | None) -> None:
        value = loss_of(result)
        self.searcher.on_trial_complete(name, None if value is None else {self.metric: value}, error=value is None)

    def _recall(self) -> None:
        """Tells the searcher what earlier drivers have found."""
        for row in self.sweep.table.rows:
            value = loss_of(self.sweep.results.rows.get(row.id))
            if row.extra != EXTRA or value is None:
                continue
            try:
                self.searcher.add_evaluated_point(dict(row.axes), value)
            except NotImplementedError:
                log.warning("%s cannot be told of earlier results: it starts anew", type(self.searcher).__name__)
                return

    def _read(self) -> None:
        """Takes up the rows that other drivers have added since."""
        rows = self.sweep.table.added(self.sweep.store, self._entries)
        self._entries += len(rows)
        self.sweep.table = self.sweep.table.with_rows(rows)

    def _add(self, row: Row) -> bool:
        """Adds a row to the table of all drivers, unless it is there; False where the others have made all suggestions."""
        while True:
            self._read()
            if row.id in self.sweep.table.by_id:
                return True
            if not self.left:
                return False
            if self.sweep.table.add(self.sweep.store, self._entries, row):
                self._entries += 1
                self.sweep.table = self.sweep.table.with_rows([row])
                return True


def to_suggest(table: Table) -> int:
    """How many rows are still to be suggested; none where the sweep has no search."""
    if not table.sweep["tune"]["search"]:
        return 0
    made = sum(row.extra == EXTRA for row in table.rows)
    return max(0, int(table.sweep["random"]["samples"]) - made)


def loss_of(result: Result | None) -> float | None:
    """What a searcher is told of a row: infinity where it diverged; None where nothing is known."""
    if result is None or result["status"] == "failed":
        return None
    value = result.get("loss")
    return float(value) if value is not None and math.isfinite(value) else math.inf


def space(axes: dict[str, Any]) -> dict[str, Any]:
    """The axes of `random` as Tune writes them."""
    from ray import tune

    found: dict[str, Any] = {}
    for name, axis in axes.items():
        ((kind, given),) = axis.items()
        if kind == "choice":
            found[name] = tune.choice(list(given))
            continue
        low, high = (float(value) for value in given)
        found[name] = {
            "uniform": lambda a, b: tune.uniform(a, b),
            "log_uniform": lambda a, b: tune.loguniform(a, b),
            "int": lambda a, b: tune.randint(int(a), int(b) + 1),
            "log_int": lambda a, b: tune.lograndint(int(a), int(b) + 1),
        }[kind](low, high)
    return found

"""What a sweep adds to itself once its table is done: values beyond an optimum at the edge, runs that tell most, and the next
generation of a population.

All follow from the results alone; the table in the store keeps what was added, with `extra` saying why.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from cluster.laws.analysis import best_rates
from cluster.laws.design import Design, best_at
from cluster.laws.fit import FitError, fit
from cluster.laws.records import DataProblem, load
from cluster.sweep import population
from cluster.sweep.config import SweepConfig
from cluster.sweep.cost import Rates
from cluster.sweep.expand import Maker
from cluster.sweep.results import Result
from cluster.sweep.space import rounded, values
from cluster.sweep.status import Edge, edges, optimised
from cluster.sweep.table import Row, Table, resolve
from trainer.config import ConfigError, config_hash

EDGE, DESIGN = "edge", "design"


def kept(table: Table, before: Table) -> list[Row]:
    """The rows that an earlier table had added, so far as they are still the runs that they were."""
    found = []
    for row in before.rows:
        if row.extra and row.id not in table.by_id:
            try:
                config = resolve(table.start, row.values)
            except ConfigError:  # of another base
                continue
            if config_hash(config, config.data.url if "data.url" in row.axes else "") == row.id:
                found.append(row)
    return found


class Adaptive:
    """Chooses what to add to the table of a sweep.

    Attributes:
        notes: what was added or was not, and why, in words.
    """

    def __init__(self, config: SweepConfig) -> None:
        self.config, self.maker = config, Maker(config)
        self.notes: list[str] = []

    def additions(self, table: Table, results: Mapping[str, Result]) -> list[Row]:
        """Rows to add to a table all of whose rows have results; none when it is done for good."""
        self.notes = []
        if any(row.id not in results for row in table.rows):
            return []
        if self.config.population.every:
            found, told = population.following(self.config, self.maker, table, results)
            self.notes += told
            return self._affordable(table, found)
        found = self._beyond(table, results) if self.config.adaptive.edges else []
        if not found and self.config.adaptive.runs:
            found = self._next(table, results)
        return self._affordable(table, found)

    # ----------------------------------------------------------------------------------------------------------- edges
    def _beyond(self, table: Table, results: Mapping[str, Result]) -> list[Row]:
        found: dict[str, Row] = {}
        for edge in edges(table.rows, results, optimised(table)):
            members = [row for row in table.rows if _in_cell(row, edge)]
            tried = {float(row.axes[edge.axis]) for row in members if row.extra == EDGE}
            whole = all(isinstance(row.axes[edge.axis], int) for row in members)
            value = _step(edge, whole=whole)
            if len(tried) >= self.config.adaptive.edges or value is None:
                self.notes.append(f"{edge.label}; nothing is tried beyond it any more")
                continue
            self.notes.append(f"{edge.label}; {value:g} is tried")
            for seed in dict.fromkeys(row.axes.get("seed") for row in members):
                like = next(row for row in members if row.axes.get("seed") == seed)
                try:
                    row = self.maker.row({**like.axes, edge.axis: value}, EDGE)
                except ConfigError as error:
                    self.notes.append(str(error))
                    continue
                if row.id not in table.by_id:
                    found[row.id] = row
        return list(found.values())

    # ---------------------------------------------------------------------------------------------------------- design
    def _next(self, table: Table, results: Mapping[str, Result]) -> list[Row]:
        options = self.config.adaptive
        if sum(row.extra == DESIGN for row in table.rows) >= options.runs:
            return []
        rows = self._candidates(table, results)
        if not rows:
            return []
        try:
            runs = best_rates(load(table.url), [])
            law = fit("chinchilla", runs)
            per_pair = float(np.median([row.flops / row.parameters / _data(row) for row in table.rows]))
            design = Design(law, best_at(law, options.target, per_pair))
        except (DataProblem, FitError, ValueError) as error:
            self.notes.append(f"no run is chosen: {error}")
            return []
        rates = Rates(results, self.config.machine)
        axes = {"n": np.array([row.parameters for row in rows]), "d": np.array([_data(row) for row in rows])}
        choice = design.choose(axes, np.array([rates.seconds(row) for row in rows]))
        row = rows[choice.index]
        self.notes.append(
            f"next {row.label}: the predicted loss at {options.target:.3g} FLOPs is known to {choice.std:.2%} and would be "
            f"to {choice.after:.2%}, more per hour than from any of {len(rows) - 1} other candidates"
        )
        return [row]

    def _candidates(self, table: Table, results: Mapping[str, Result]) -> list[Row]:
        """The points of `candidates` that are no rows yet; their other axes are those of the best run."""
        good = [row for row in table.rows if results[row.id]["status"] == "ok"]
        if not good:
            return []
        best = min(good, key=lambda row: results[row.id]["loss"])
        axes = {
            name: values(f"adaptive.candidates.{name}", axis) for name, axis in self.config.adaptive.candidates.items()
        }
        for name in axes:
            if name not in best.axes:
                raise ConfigError(f"adaptive.candidates: {name} is no axis of the sweep; it has {', '.join(best.axes)}")
        found = []
        for point in itertools.product(*axes.values()):
            row = self.maker.row({**best.axes, **dict(zip(axes, point, strict=True))}, DESIGN)
            if row.id not in table.by_id:
                found.append(row)
        return found

    # ------------------------------------------------------------------------------------------------------------- cap
    def _affordable(self, table: Table, rows: Sequence[Row]) -> list[Row]:
        """Those of `rows`, in order, that neither the sweep's cap nor that of its additions forbids."""
        cap, most = self.config.cap, self.config.adaptive.flops
        count, whole = len(table.rows), sum(row.flops for row in table.rows)
        added = sum(row.flops for row in table.rows if row.extra)
        found = []
        for row in rows:
            over = (most and added + row.flops > most) or (cap.flops and whole + row.flops > cap.flops)
            if over or (cap.runs and count >= cap.runs):
                self.notes.append(f"not added, the cap forbids it: {row.label}")
                continue
            found.append(row)
            count, whole, added = count + 1, whole + row.flops, added + row.flops
        return found


def _in_cell(row: Row, edge: Edge) -> bool:
    others = {name: value for name, value in row.axes.items() if name not in (edge.axis, "seed")}
    return edge.axis in row.axes and others == edge.cell


def _step(edge: Edge, *, whole: bool) -> float | int | None:
    """The next value beyond an edge, as far from it as its neighbour is: by ratio where all are positive."""
    end, inner = (edge.values[0], edge.values[1]) if edge.side == "low" else (edge.values[-1], edge.values[-2])
    value = end * end / inner if edge.values[0] > 0 else 2 * end - inner
    if not whole:
        return rounded(value)
    found = round(value)
    return None if found in edge.values or found < 1 else found


def _data(row: Row) -> float:
    return float(row.samples * row.tokens_per_sample)

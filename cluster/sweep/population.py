"""Population-based training (arXiv:1711.09846) by generations, each a pure function of the results of the one before.

So any executor does it, and a driver that is started again, or a second one, goes on with the same rows. A member of a
generation is a run that branches off from its parent's last commit (`weights.state`). All members of a generation are done
before the next one begins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cluster.sweep.config import SweepConfig
from cluster.sweep.results import Result
from cluster.sweep.space import draw, number, rounded
from cluster.sweep.table import Row, Table
from trainer.config import ConfigError
from trainer.schema import RunConfig

_MAY_CHANGE = ("optim.", "train.grad_clip")  # and a branch still has all of the state that it is given
_FACTORS = (0.8, 1.2)
_EXTRA = "generation "
_TRIES = 20


def first(config: SweepConfig, start: RunConfig) -> dict[str, Any]:
    """What the rows of the first generation set beside their axes.

    Raises:
        ConfigError: axes, a schedule or lengths with which runs cannot go on from each other.
    """
    every, steps = config.population.every, start.train.max_steps
    for name in config.axes:
        if not name.startswith(_MAY_CHANGE) or name == "optim.name":
            raise ConfigError(
                f"population: a run cannot go on with another {name}; axes may be {', '.join(_MAY_CHANGE)}*"
            )
    if steps % every or steps == every:
        raise ConfigError(
            f"population.every={every}: train.max_steps={steps} must be several times that, without remainder"
        )
    if config.objective != "loss" and (not start.train.val_every or every % start.train.val_every):
        raise ConfigError(
            f"population.every={every}: {config.objective} is measured after each, so train.val_every={start.train.val_every} "
            "must divide it"
        )
    if start.schedule.name != "constant":
        raise ConfigError(
            f"population: schedule.name={start.schedule.name} depends on the length of a run, and a generation does not know "
            "that; set schedule.name=constant: the population lowers the rate where that is better"
        )
    if config.random.samples < 2:
        raise ConfigError(f"random.samples={config.random.samples}: a population has at least 2 members")
    return {"train.max_steps": every}


def following(
    config: SweepConfig, maker: Any, table: Table, results: Mapping[str, Result]
) -> tuple[list[Row], list[str]]:
    """(rows of the next generation, what happened in words); no rows once train.max_steps is reached.

    Args:
        maker: a `cluster.sweep.expand.Maker` of the config.
        results: of all rows of the table.
    """
    every, size = config.population.every, config.random.samples
    generation = max((int(row.extra.removeprefix(_EXTRA)) for row in table.rows if row.extra), default=0)
    members = [row for row in table.rows if row.extra == (f"{_EXTRA}{generation}" if generation else "")]
    if (generation + 1) * every >= maker.start.train.max_steps:
        return [], []
    if len(members) < size:  # the cap of the sweep kept some of them out
        return [], [f"generation {generation} has {len(members)} of {size} members; the population ends with it"]
    losses = [_loss(results[row.id]) for row in members]
    order = sorted(range(size), key=lambda i: losses[i])
    if not math.isfinite(losses[order[0]]):
        return [], [f"every run of generation {generation} diverged or failed; the population ends with it"]
    count = max(1, int(size * config.population.quantile))
    best = [i for i in order[:count] if math.isfinite(losses[i])]
    worst = {i for i in range(size) if i in order[-count:] or not math.isfinite(losses[i])} - set(best)
    found: dict[str, Row] = {}
    notes: list[str] = []
    for i, row in enumerate(members):
        rng = np.random.default_rng([config.population.seed, generation + 1, i])
        if i not in worst:
            made = _branch(config, maker, table, row, dict(row.axes), generation + 1)
        for _ in range(_TRIES if i in worst else 0):
            parent = members[best[int(rng.integers(len(best)))]]
            made = _branch(config, maker, table, parent, _explored(config, dict(parent.axes), rng), generation + 1)
            if made.id not in found:
                notes.append(f"generation {generation + 1}: {row.label} gives way to {parent.label}, as {made.label}")
                break
        if made.id in found:
            return [], [f"the axes do not tell {size} members apart; the population ends with generation {generation}"]
        found[made.id] = made
    return list(found.values()), notes


def _branch(config: SweepConfig, maker: Any, table: Table, parent: Row, point: dict[str, Any], generation: int) -> Row:
    """A member of a generation that goes on from the end of `parent`."""
    every = config.population.every
    more = {
        "train.max_steps": (generation + 1) * every,
        "weights.url": table.run_url(parent),
        "weights.step": generation * every,
        "weights.state": True,
    }
    made: Row = maker.row(point, f"{_EXTRA}{generation}", more)
    return made


def _explored(config: SweepConfig, point: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Each value drawn anew or moved a little, within its axis."""
    found = {}
    for name, value in point.items():
        ((kind, given),) = config.random.axes[name].items()
        if rng.random() < config.population.resample:
            found[name] = draw(f"random.axes.{name}", kind, given, rng)
            continue
        up = int(rng.integers(2))
        if kind == "choice":
            values = [number(v) for v in given]
            found[name] = values[min(max(values.index(value) + (2 * up - 1), 0), len(values) - 1)]
            continue
        low, high = (number(v) for v in given)
        moved = min(max(value * _FACTORS[up], low), high)
        found[name] = round(moved) if kind in ("int", "log_int") else rounded(moved)
    return found


def _loss(result: Result) -> float:
    loss = result.get("loss") if result["status"] == "ok" else None
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf

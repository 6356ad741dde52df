"""A sweep's config to its table: each point becomes a run's config, with its size and its cost.

The network of each distinct size is built once on the meta device, which gives its parameters and its FLOPs; nothing is
read from the data.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from cluster.laws.sizing import proportions, shape_of
from cluster.sweep import population, stopping
from cluster.sweep.config import LADDERS, SweepConfig, to_dict
from cluster.sweep.expressions import evaluate, is_expression, names, ordered
from cluster.sweep.space import Point, points
from cluster.sweep.table import Row, Table, base_config, resolve
from trainer import config as configs
from trainer.build import flops_per_sample, measure
from trainer.config import ConfigError
from trainer.schema import RunConfig

MEASURED = ("parameters", "flops", "tokens")
_TOP = {f.name for f in dataclasses.fields(RunConfig)}


def expand(config: SweepConfig) -> Table:
    """The table of a sweep.

    Raises:
        ConfigError: an axis that means nothing, a point that makes no run (the message names it), or two that make the
            same one.
    """
    table = Table(config.url, config.name, config.base, to_dict(config))
    maker = Maker(config)
    rows: dict[str, Row] = {}
    more = population.first(config, maker.start) if config.population.every else {}
    for point in points(config) if not config.tune.search else ():  # suggested while the sweep runs
        row = maker.row(point, more=more)
        known = rows.setdefault(row.id, row)
        if known.axes != row.axes:
            raise ConfigError(
                f"rows {known.label} and {row.label} are the same run: what tells them apart does not change what it "
                "computes; drop one of them"
            )
    table.rows = list(rows.values())
    return table


class Maker:
    """Makes rows from points. Sizes that were measured once are kept."""

    def __init__(self, config: SweepConfig) -> None:
        self.config = config
        self.start = base_config(config.base, config.url)
        self._sizes: dict[str, tuple[int, int]] = {}
        self._flops: dict[str, int] = {}
        self._shapes: dict[str, dict[str, int]] = {}
        self._computed = self._order()
        self._check_names()

    def row(self, point: Point, extra: str = "", more: Mapping[str, Any] | None = None) -> Row:
        """The row of a point; `more`: values that are no axes, over those of the settings.

        Raises:
            ConfigError: it makes no run; the message names the point.
        """
        try:
            return self._row(point, extra, more or {})
        except ConfigError as error:
            told = ", ".join(f"{name}={value}" for name, value in point.items())
            raise ConfigError(f"row {told}: {error}") from error

    def _row(self, point: Point, extra: str, more: Mapping[str, Any]) -> Row:
        values = {key: value for key, value in self.config.settings.items() if not is_expression(value)}
        values |= more
        values |= {name: value for name, value in point.items() if _is_key(name)}
        values = {
            key: int(v) if isinstance(v, float) and _whole(self.start, key) and v == int(v) else v
            for key, v in values.items()
        }
        if "n" in point:
            values |= self._shape(values, float(point["n"]))
        for key in self._computed:
            value = evaluate(self.config.settings[key], lambda name: self._look_up(name, point, values))
            values[key] = (
                round(value)
                if _whole(self.start, key) and isinstance(value, float) and value == round(value)
                else value
            )
        if "budget" in point or "d" in point:
            values |= self._steps(point, values)
        made = resolve(self.start, values)
        if self.config.objective != "loss" and not made.train.val_every:
            raise ConfigError(f"objective={self.config.objective} needs validation; set train.val_every > 0")
        if self.config.objective != "loss" and made.train.val_every > made.train.max_steps:
            raise ConfigError(
                f"objective={self.config.objective}: the run has {made.train.max_steps} steps and would end before its first "
                f"validation; lower train.val_every={made.train.val_every}"
            )
        stopping.check(self.config.stop.first, made)
        parameters, tokens = self._size(made)
        samples = made.train.max_steps * made.train.global_batch
        return Row(
            id=configs.config_hash(made, made.data.url if "data.url" in point else ""),
            axes=dict(point),
            values=values,
            parameters=parameters,
            samples=samples,
            tokens_per_sample=tokens,
            flops=float(self._flops_of(made) * samples),
            nodes=made.resources.nodes,
            processes=made.resources.processes_per_node,
            threads=made.resources.threads,
            extra=extra,
        )

    # ------------------------------------------------------------------------------------------------------- measuring
    def _size(self, config: RunConfig) -> tuple[int, int]:
        key = _network(config)
        if key not in self._sizes:
            self._sizes[key] = measure(config)
        return self._sizes[key]

    def _flops_of(self, config: RunConfig) -> int:
        # A number that is no size, such as an initial scale, costs nothing; one that is a size shows in the parameters.
        sizes = {k: v for k, v in dataclasses.asdict(config.model).items() if not isinstance(v, float)}
        key = json.dumps([sizes, self._size(config), dataclasses.asdict(config.task)], sort_keys=True, default=str)
        if key not in self._flops:
            self._flops[key] = flops_per_sample(config)
        return self._flops[key]

    def _shape(self, values: Mapping[str, Any], n: float) -> dict[str, int]:
        for key in ("model.width", "model.heads", "model.depth"):
            if key in values or key in self._computed:
                raise ConfigError(f"n sets {key}, and so does the sweep; drop one of them")
        start = resolve(self.start, values)
        key = f"{n!r} {_network(start)}"
        if key not in self._shapes:
            self._shapes[key] = shape_of(start, n)
        return self._shapes[key]

    def _steps(self, point: Point, values: Mapping[str, Any]) -> dict[str, int]:
        """The number of steps that a budget or a number of tokens gives; warm-up, decay and the time between validations
        keep their parts of the run."""
        if "budget" in point and "d" in point:
            raise ConfigError("budget and d both set the number of steps; drop one of them")
        if "train.max_steps" in values:
            raise ConfigError("budget and d set train.max_steps, and so does the sweep; drop one of them")
        config = resolve(self.start, values)
        batch = config.train.global_batch
        if "budget" in point:
            steps = float(point["budget"]) / (self._flops_of(config) * batch)
        else:
            steps = float(point["d"]) / (self._size(config)[1] * batch)
        if steps < 0.5:
            raise ConfigError(f"that is {steps:.2g} steps of train.global_batch={batch}: less than one")
        if "train.val_every" in values:  # as it is
            config = dataclasses.replace(config, train=dataclasses.replace(config.train, val_every=0))
        return {key: value for key, value in proportions(config, steps).items() if key not in values}

    # ----------------------------------------------------------------------------------------------------- expressions
    def _look_up(self, name: str, point: Point, values: Mapping[str, Any]) -> Any:
        if name in point:
            return point[name]
        if name in values:
            return values[name]
        config = resolve(self.start, values)
        if name in MEASURED:
            parameters, tokens = self._size(config)
            return {"parameters": parameters, "tokens": tokens}.get(name) or self._flops_of(config)
        holder: Any = config
        for part in name.split("."):
            holder = getattr(holder, part, None)
        if not isinstance(holder, int | float):
            raise ConfigError(_no_name(name, [*point, *MEASURED]))
        return holder

    def _order(self) -> list[str]:
        """The computed settings in an order in which each finds what it reads; sizes are measured of a finished model."""
        computed = {key: value for key, value in self.config.settings.items() if is_expression(value)}
        order = ordered(computed)
        late = [
            key for key in order if set(MEASURED) & names(computed[key]) and not key.startswith(("model.", "task."))
        ]
        needs = {key for key in order for other in late if other in names(computed[key])}
        early = [key for key in order if key not in late and key not in needs]
        return [*early, *(key for key in order if key not in early)]

    def _check_names(self) -> None:
        read = {name for value in self.config.settings.values() if is_expression(value) for name in names(value)}
        for name in self.config.axes:
            if not _is_key(name) and name not in LADDERS and name not in read:
                near = difflib.get_close_matches(name, [*_TOP, *LADDERS], n=1, cutoff=0.5)
                hint = f"did you mean '{near[0]}'?" if near else "write a key of the run as section.key"
                raise ConfigError(f"axis {name} has no effect: no setting reads it; {hint}")
        for key in self.config.settings:
            if not _is_key(key):
                raise ConfigError(f"settings.{key}: no key of a run; write it as section.key, such as train.max_steps")
        for name in self.config.optimise:
            if name not in self.config.axes:
                raise ConfigError(f"optimise: {name} is no axis of the sweep; it has {', '.join(self.config.axes)}")


def _is_key(name: str) -> bool:
    return "." in name or name in _TOP


def _whole(start: RunConfig, key: str) -> bool:
    holder: Any = start
    for part in key.split("."):
        holder = getattr(holder, part, None)
    return isinstance(holder, int) and not isinstance(holder, bool)


def _network(config: RunConfig) -> str:
    return json.dumps([dataclasses.asdict(config.model), dataclasses.asdict(config.task)], sort_keys=True, default=str)


def _no_name(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}, and the keys of the run"
    return f"nothing is called '{name}': {hint}"

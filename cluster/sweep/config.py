"""A sweep's config, loaded as strictly as a run's.

base: configs/runs/demo_lm.yaml     # a run's config, or its content
url: runs/sweeps/rates
grid:                               # every combination of
  model.width: [64, 128]            #   a list,
  optim.lr: {from: 1.0e-3, to: 3.0e-2, steps: 4}   # or a ladder (geometric, or `scale: linear`; or from, factor, steps)
zip:                                # lists of equal length that go together, each group combined with the rest
  - {model.depth: [2, 4], model.heads: [2, 4]}
random:                             # draws, combined with the rest
  samples: 8
  axes: {optim.weight_decay: {log_uniform: [1.0e-3, 1.0]}, seed: {int: [0, 9]}}
settings:                           # of all runs: values, or ${arithmetic} over axes and other settings
  train.max_steps: ${round(budget / flops / train.global_batch)}

An axis is a key of the run's config, one of the ladders n (parameters: the model is scaled), d (tokens, or samples) and
budget (FLOPs), which set the model's size and the number of steps, or a name of your own that settings read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from trainer.config import ConfigError, absolute_url, read_yaml, structure

LADDERS = ("n", "d", "budget")
DRAWS = ("uniform", "log_uniform", "int", "log_int", "choice")


@dataclass
class CapConfig:
    """What a sweep may cost at most, done runs included; 0 is no limit. `hours` are device-hours."""

    runs: int = 0
    flops: float = 0.0
    hours: float = 0.0
    cost: float = 0.0

    def __post_init__(self) -> None:
        for name in ("runs", "flops", "hours", "cost"):
            _at_least(name, getattr(self, name), 0)


@dataclass
class MachineConfig:
    """What hours are predicted for, where no run was measured yet: `mfu` of the peak of `device` (see `keel dryrun`).

    `price` of one device for one hour."""

    device: str = "cpu"
    mfu: float = 0.4
    price: float = 0.0

    def __post_init__(self) -> None:
        from trainer.planning.devices import names

        if self.device not in names():
            raise ValueError(f"device={self.device}: unknown; one of {', '.join(names())}")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu={self.mfu}: must lie in (0, 1]")
        _at_least("price", self.price, 0)


@dataclass
class StopConfig:
    """Early stopping by asynchronous successive halving (arXiv:1810.05934): at `first` steps, and at `factor` times as many
    again and again, a run goes on if its objective is among the best 1/`factor` of those that got there. 0: no stopping."""

    first: int = 0
    factor: int = 3

    def __post_init__(self) -> None:
        _at_least("first", self.first, 0)
        _at_least("factor", self.factor, 2)


@dataclass
class PackedConfig:
    """The executor `packed`: `cells` rows are claimed at once. `stacked`: rows that differ in numbers only are trained as
    one stack of networks; they leave results, and no runs with curves and checkpoints of their own."""

    cells: int = 64
    stacked: bool = False

    def __post_init__(self) -> None:
        _at_least("cells", self.cells, 1)


@dataclass
class TuneConfig:
    """The executor `ray`. `scheduler`: which runs go on, at each validation: asha, hyperband, median, or a class of Ray
    Tune's as module:Class. `search`: suggests the values of the axes of `random` one run after the other, from the results
    so far: optuna, or a Searcher of Ray Tune's as module:Class. `..._options`: their keyword arguments."""

    scheduler: str = ""
    scheduler_options: dict[str, Any] = field(default_factory=dict)
    search: str = ""
    search_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scheduler", "search"):
            if getattr(self, f"{name}_options") and not getattr(self, name):
                raise ValueError(f"{name}_options have no effect without {name}")


@dataclass
class AdaptiveConfig:
    """What is added once the table is done.

    `edges`: where the best value of an axis of `optimise` is the first or last one tried, up to so many values beyond it.
    `runs`: so many runs more, each the one of `candidates` (axes, as in `grid`) that most reduces the variance of the
    predicted loss at `target` FLOPs for what it costs (c-optimal design); other axes take the values of the best run.
    `flops`: what all additions together may cost (0: the cap of the sweep).
    """

    edges: int = 0
    runs: int = 0
    target: float = 0.0
    flops: float = 0.0
    candidates: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("edges", "runs", "target", "flops"):
            _at_least(name, getattr(self, name), 0)
        if bool(self.runs) != bool(self.candidates and self.target):
            raise ValueError("runs, target and candidates belong together: give all of them or none")


@dataclass
class PopulationConfig:
    """Population-based training (arXiv:1711.09846) by generations of `every` steps; 0: none. `random` draws the first one.

    After each, up to train.max_steps, the worst `quantile` of the runs go on as branches of one of the best `quantile` (drawn),
    with each of its values drawn anew with the probability `resample`, else times 0.8 or 1.2 (of a choice: its neighbour); the
    others go on as they were. Each member of a generation is a run of its own, with its parent's state.
    """

    every: int = 0
    quantile: float = 0.25
    resample: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("every", self.every, 0)
        _at_least("seed", self.seed, 0)
        if not 0 < self.quantile <= 0.5:
            raise ValueError(f"quantile={self.quantile}: must lie in (0, 0.5]")
        if not 0 <= self.resample <= 1:
            raise ValueError(f"resample={self.resample}: must lie in [0, 1]")


@dataclass
class RandomConfig:
    """`samples` draws of all `axes` together: uniform, log_uniform, int or log_int over [low, high], or choice of a list."""

    samples: int = 0
    seed: int = 0
    axes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("samples", "seed"):
            _at_least(name, getattr(self, name), 0)
        if bool(self.samples) != bool(self.axes):
            raise ValueError("samples and axes belong together: give both or none")


@dataclass
class SweepConfig:
    """A sweep. See the module for its axes.

    Attributes:
        base: the content of the run's config.
        objective: what the sweep minimises: `loss` (training loss at the end) or a validation metric such as `val/loss`.
        optimise: axes whose best value is looked for (default: the varied ones of `optim`): told when it is at an edge.
        executor: one of `EXECUTORS`.
        retries: how often a failed row is started again, from its own checkpoint.
        expiry_s: a driver that is silent for so long is given up, and its rows are free.
    """

    url: str
    base: dict[str, Any]
    name: str = "sweep"
    objective: str = "loss"
    optimise: list[str] = field(default_factory=list)
    executor: str = "local"
    retries: int = 2
    expiry_s: float = 60.0
    settings: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    zip: list[dict[str, Any]] = field(default_factory=list)
    random: RandomConfig = field(default_factory=RandomConfig)
    stop: StopConfig = field(default_factory=StopConfig)
    cap: CapConfig = field(default_factory=CapConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    packed: PackedConfig = field(default_factory=PackedConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    population: PopulationConfig = field(default_factory=PopulationConfig)

    @property
    def grows(self) -> bool:
        """Whether the sweep adds rows to itself."""
        return bool(self.adaptive.edges or self.adaptive.runs or self.tune.search or self.population.every)

    @property
    def axes(self) -> list[str]:
        """The names of all axes, in order."""
        return [*self.grid, *(name for group in self.zip for name in group), *self.random.axes]


_SECTIONS = {
    "random": RandomConfig,
    "stop": StopConfig,
    "cap": CapConfig,
    "machine": MachineConfig,
    "packed": PackedConfig,
    "tune": TuneConfig,
    "adaptive": AdaptiveConfig,
    "population": PopulationConfig,
}


@dataclass
class _Plain:
    url: str = "???"
    name: str = "sweep"
    objective: str = "loss"
    optimise: list[str] = field(default_factory=list)
    executor: str = "local"
    retries: int = 2
    expiry_s: float = 60.0

    def __post_init__(self) -> None:
        from cluster.sweep import EXECUTORS

        if self.executor not in EXECUTORS:
            raise ValueError(f"executor={self.executor}: must be one of {', '.join(EXECUTORS)}")
        if self.objective != "loss" and not self.objective.startswith("val/"):
            raise ValueError(f"objective={self.objective}: must be loss, or a validation metric such as val/loss")
        _at_least("retries", self.retries, 0)
        if not 1 <= self.expiry_s < float("inf"):
            raise ValueError(f"expiry_s={self.expiry_s}: must be at least 1")


def load(source: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> SweepConfig:
    """Loads a sweep's config from a YAML file (local path or any fsspec URL) or a mapping, with `a.b=value` overrides.

    An override's key may go into a section, a setting or an axis, as in `settings.train.max_steps=10`, `cap.runs=4`,
    `grid.optim.lr=[0.1,0.2]` or `base.data.url=...`.

    Raises:
        ConfigError: unreadable file, unknown key, wrong type, missing value, or an axis that appears twice.
    """
    raw = dict(read_yaml(source) if isinstance(source, str) else source)
    for override in overrides:
        _override(raw, override)
    values: dict[str, Any] = {name: structure(schema, _section(raw, name), name) for name, schema in _SECTIONS.items()}
    for name in ("settings", "grid"):
        values[name] = _section(raw, name)
    values["zip"] = _groups(raw.get("zip"))
    known = {f.name for f in dataclasses.fields(SweepConfig)}
    plain = {name: value for name, value in raw.items() if name not in values and name != "base"}
    for name in plain.keys() - known:
        structure(SweepConfig, {name: plain[name]})  # says which key was meant
    values |= dataclasses.asdict(structure(_Plain, plain))
    values["base"] = _base(raw)
    values["url"] = absolute_url(values["url"])
    config = SweepConfig(**values)
    if config.stop.first and config.packed.stacked:
        raise ConfigError(
            "stop.first has no effect with packed.stacked=true: a stack ends as a whole; drop one of them"
        )
    twice = sorted({name for name in config.axes if config.axes.count(name) > 1})
    if twice:
        raise ConfigError(f"axis {twice[0]} appears twice; keep one of them")
    if config.tune.scheduler and config.stop.first:
        raise ConfigError("stop and tune.scheduler both decide which runs go on; drop one of them")
    if config.tune.search and (not config.random.samples or config.grid or config.zip):
        raise ConfigError("tune.search suggests the axes of random, and nothing else: give random, and no grid or zip")
    for name in config.axes:
        if name in config.settings:
            raise ConfigError(f"{name} is an axis and a setting; keep one of them")
    if config.population.every and (
        config.stop.first
        or config.tune.scheduler
        or config.tune.search
        or config.packed.stacked
        or config.adaptive.edges
        or config.adaptive.runs
        or config.grid
        or config.zip
        or not config.random.samples
    ):
        raise ConfigError(
            "population.every: a population is drawn by random and decides itself how its runs go on: give random, and no grid, "
            "zip, stop, tune, adaptive or packed.stacked"
        )
    return config


def to_dict(config: SweepConfig) -> dict[str, Any]:
    """The config as plain containers that `load` reads back to an equal config."""
    return dataclasses.asdict(config)


def _override(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override '{override}' is not of the form key=value, such as cap.runs=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': {' '.join(str(error).split())}") from error
    head, _, name = key.partition(".")
    if not name:
        raw[head] = value
        return
    if head == "base":
        raw[head] = _base(raw)
        path = name.split(".")
    else:
        path = [name]
    section = raw[head] = dict(_section(raw, head))
    for part in path[:-1]:
        inner = section.get(part)
        section[part] = dict(inner) if isinstance(inner, Mapping) else {}
        section = section[part]
    section[path[-1]] = value


def _section(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    given = {} if raw.get(name) is None else raw[name]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}={given!r}: expected a section (mapping), got {type(given).__name__}")
    return {str(key): value for key, value in given.items()}


def _groups(given: Any) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(group, Mapping) for group in given):
        raise ConfigError("zip: expected a list of mappings, such as [{model.width: [32, 64], model.heads: [2, 4]}]")
    return [{str(key): value for key, value in group.items()} for group in given]


def _base(raw: Mapping[str, Any]) -> dict[str, Any]:
    given = raw.get("base")
    if isinstance(given, str):
        given = read_yaml(given)
    if not isinstance(given, Mapping):
        raise ConfigError("base is required: the YAML file of a run, such as base: configs/runs/demo_lm.yaml")
    return dict(given)


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low or value == float("inf"):  # also refuses nan
        raise ValueError(f"{key}={value}: must be at least {low}")

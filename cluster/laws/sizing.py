"""From a number of parameters and of samples to a config that has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.build import measure
from trainer.config import ConfigError, load, varied
from trainer.schema import RunConfig


@dataclass
class Sized:
    """A config with its exact numbers: n parameters, d tokens (or samples) seen, batch in samples."""

    config: RunConfig
    n: int
    d: float
    steps: int
    batch: int
    tokens_per_sample: int


def sized(
    base: Mapping[str, Any], n: float, d: Callable[[int], float], batch: float, lr: float | None, more: Sequence[str]
) -> Sized:
    """A config like `base` with about `n` parameters that sees about `d(actual parameters)` tokens or samples.

    Width grows in whole heads where the model has heads, and depth with it, so that heads and aspect ratio stay; a model
    without heads, or whose model.depth is given in `more`, grows in width alone. Warm-up, decay and the time between
    validations keep their parts of the run.

    Args:
        base: raw config of a run.
        n: parameters aimed at.
        d: tokens (samples, where these are no sequences) for a number of parameters.
        batch: samples per step aimed at.
        lr: peak learning rate; None: as in `base`.
        more: dotted overrides, applied last.

    Raises:
        ConfigError: a model without a width, or an invalid config.
    """
    start = load(base, more)
    deep = any(word.startswith("model.depth=") for word in more)
    shape = [f"{key}={value}" for key, value in shape_of(start, n, deeper=not deep).items()]
    measured, per_sample = measure(load(base, [*shape, *more]))
    world = start.resources.world_size * (start.train.micro_batch or 1)
    given = any(word.startswith("train.global_batch=") for word in more)
    samples = start.train.global_batch if given else max(world, round(batch / world) * world)
    steps = max(1, round(d(measured) / per_sample / samples))
    length = {**proportions(start, steps), "train.global_batch": samples}
    changes = [*shape, *(f"{key}={value}" for key, value in length.items())]
    if lr is not None:
        changes.append(f"optim.lr={lr!r}")
    config = load(base, [*changes, *more])
    measured, per_sample = measure(config)
    steps, samples = config.train.max_steps, config.train.global_batch
    return Sized(config, measured, float(steps * samples * per_sample), steps, samples, per_sample)


def proportions(start: RunConfig, steps: float) -> dict[str, int]:
    """The settings of a run like `start` of about `steps` steps: warm-up, decay and the time between validations keep their
    parts of the run, and where the last step was validated it still is."""
    old, every = start.train.max_steps, start.train.val_every
    count = max(1, round(steps))
    found = {}
    if every:
        found["train.val_every"] = max(1, round(every / old * count))
        if old % every == 0 and count >= old // every:
            count = found["train.val_every"] * (old // every)
    found |= {"train.max_steps": count, "schedule.warmup_steps": round(start.schedule.warmup_steps / old * count)}
    if start.schedule.decay_steps:
        found["schedule.decay_steps"] = max(1, round(start.schedule.decay_steps / old * count))
    return found


def shape_of(start: RunConfig, n: float, *, deeper: bool = True) -> dict[str, int]:
    """Width (heads, depth) of the model, by their keys, with which its parameter count is nearest to `n` in logarithm;
    `deeper`: the depth of a model with heads may change.

    Raises:
        ConfigError: a model without a width, or none that comes near.
    """
    model = start.model
    width, heads, depth = (getattr(model, name, None) for name in ("width", "heads", "depth"))
    if not isinstance(width, int):
        raise ConfigError(
            f"model.name={model.name} has no width to scale: give a config of the right size with --config"
        )
    unit = width // heads if isinstance(heads, int) else 1
    groups = getattr(model, "kv_heads", None)
    multiple = heads // groups if isinstance(heads, int) and isinstance(groups, int) else 1

    def sizes(count: int, layers: int | None) -> dict[str, int]:
        found = {"model.width": count * unit}
        if isinstance(heads, int):
            found["model.heads"] = count
            if isinstance(groups, int):
                found["model.kv_heads"] = count // multiple
        if layers is not None:
            found["model.depth"] = layers
        return found

    def layers_of(count: int) -> int | None:
        if not deeper or not isinstance(heads, int) or not isinstance(depth, int):
            return None
        return max(1, round(depth * count / heads))

    def miss(chosen: dict[str, int]) -> float:
        try:
            return math.log(measure(varied(start, chosen))[0] / n)
        except ConfigError:  # some part of the model has nothing left at that width
            return -math.inf

    low, high = 1, 1
    while miss(sizes(high * multiple, layers_of(high * multiple))) < 0 and high < 2**20:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        if miss(sizes(middle * multiple, layers_of(middle * multiple))) < 0:
            low = middle
        else:
            high = middle
    candidates = []
    for count in sorted({low * multiple, high * multiple}):
        layers = layers_of(count)
        options = [None] if layers is None else [x for x in range(layers - 2, layers + 3) if x >= 1]
        candidates += [sizes(count, option) for option in options]
    best = min(candidates, key=lambda chosen: abs(miss(chosen)))
    if not math.isfinite(miss(best)):
        raise ConfigError(f"no width gives {n:.3g} parameters: start from another config, with --config")
    return best

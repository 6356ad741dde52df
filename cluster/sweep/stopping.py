"""Judges of runs (see `trainer.callbacks.pruning`): they run in the worker, and know other runs from the store alone."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping

from datamodules.store import NotFound, Store
from trainer.callbacks.pruning import JUDGE_SETTINGS
from trainer.config import ConfigError
from trainer.schema import RunConfig

STOP = "stop.json"


def prune(store: Store, why: str) -> None:
    """Tells the run in `store`, whose judge reads it (`asked`), to end at its next validation."""
    store.write_json(STOP, {"why": why})


def asked(store: Store, step: int, metrics: Mapping[str, float]) -> str | None:
    """The judge of a run that another process decides about."""
    try:
        return str(store.read_json(STOP)["why"])
    except NotFound:
        return None


def halving(store: Store, step: int, metrics: Mapping[str, float]) -> str | None:
    """Asynchronous successive halving (arXiv:1810.05934, in its stopping form): at each rung a run leaves its objective,
    an object of the sweep whose name is all there is to it, and goes on if it is among the best 1/factor so far."""
    settings = json.loads(os.environ[JUDGE_SETTINGS])
    if step not in rungs(settings["first"], settings["factor"], step):
        return None
    sweep, row = Store(settings["sweep"], **store.options), settings["row"]
    value = float(metrics.get(settings["objective"], math.nan))
    folder = f"rungs/{step:09d}"
    sweep.write(f"{folder}/{row}@{value!r}", b"")
    found = {name.rpartition("/")[2].partition("@")[0]: _value(name) for name in sweep.list(folder)}
    better = sum(other < value for other in found.values())
    if not math.isfinite(value) or better >= math.ceil(len(found) / settings["factor"]):
        return f"{settings['objective']}={value:.6g} at step {step}: {better} of {len(found)} runs were better"
    return None


def rungs(first: int, factor: int, most: int) -> list[int]:
    """The steps at which runs are compared, up to `most`."""
    found, step = [], first
    while step <= most:
        found.append(step)
        step *= factor
    return found


def check(first: int, config: RunConfig) -> None:
    """Raises ConfigError where a run would never be asked."""
    every = config.train.val_every
    if first and (not every or first % every):
        raise ConfigError(
            f"stop.first={first}: runs are compared when they validate, so it must be a multiple of train.val_every={every}"
        )


def _value(name: str) -> float:
    return float(name.rpartition("@")[2])

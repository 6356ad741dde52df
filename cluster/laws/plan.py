"""The next run: what to train for a budget, how sure that is, what it takes, and the prediction it will be held to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.laws.allocation import Allocation, allocate, interval, regret, with_inference
from cluster.laws.analysis import Analysis, loss_interval, recounted
from cluster.laws.fit import Fit
from cluster.laws.rates import Transfer
from cluster.laws.records import DataProblem
from cluster.laws.sizing import Sized, sized
from trainer.build import flops_per_sample
from trainer.parametrization.horizon import LR_BATCH, LR_HORIZON, rate_factor
from trainer.schema import RunConfig

# Batch against data (arXiv:2410.21676, with zero to arXiv:2503.04715's 0.571 as its interval); the exponents of the rate
# are those of `trainer.parametrization.horizon`. Each is an option of `keel plan`.
BATCH_DATA = 0.47
_BATCH_DATA_RANGE = (0.0, 0.571)
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)

_COUNTS = 4  # times that a config is sized until its FLOPs per parameter are those that it was sized by
_SAME_COUNT = 0.002  # relative
_OTHER_COUNT = 0.1  # relative: worth a word
_SPENT = 0.01  # relative, of the budget

Interval = tuple[float, float]


@dataclass
class Plan:
    """What to train.

    Attributes:
        budget: FLOPs; `flops`: what the choice really takes.
        n, d, batch (samples), lr: the choice, each with `intervals`: where the best one may lie.
        loss: (prediction, low, high) at n and d.
        regret: factor k -> loss added by training k times the size of the choice for the same FLOPs.
        hours, gpu_hours, cost: on the device asked for; None without one.
        notes: where each number comes from, and what to doubt.
    """

    budget: float
    flops: float
    n: float
    d: float
    batch: float | None
    lr: float | None
    loss: tuple[float, float, float]
    intervals: dict[str, Interval]
    regret: dict[str, float]
    hours: float | None = None
    gpu_hours: float | None = None
    cost: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Asked:
    """What the user asks: budget in FLOPs; samples or tokens to be served; the machine (name, how many, the part of its
    peak that runs reach, price of an hour); exponents; batch and lr where they are given. `law_in_config`: the config
    that is planned moves its rate with data and batch by itself."""

    budget: float
    served: float = 0.0
    device: str | None = None
    gpus: int = 1
    mfu: float = 0.4
    price: float | None = None
    lr_horizon: float = LR_HORIZON
    lr_batch: float = LR_BATCH
    batch_data: float = BATCH_DATA
    batch: float | None = None
    lr: float | None = None
    law_in_config: bool = False


def plan(made: Analysis, asked: Asked) -> Plan:
    """Chooses N, D, batch and rate for a budget.

    Raises:
        DataProblem: no law that has a compute-optimal point was fitted.
        ValueError: an impossible budget or device.
    """
    found = _law(made)
    best = allocate(found.values, asked.budget, made.per_pair)
    notes = [f"N and D from {found.form} fitted to {len(found.loss)} runs"]
    largest = float(np.max(made.per_pair * found.law.axes["n"] * found.law.axes["d"]))
    if asked.budget > 100 * largest:
        notes.append(f"the budget is {asked.budget / largest:.3g} times that of the largest run: a long extrapolation")
    for axis, words in (("u", "unique samples"), ("h", "spacing")):
        text = (
            f"{found.form} does not read {axis} ({words}), which varies among the runs: choose one value with --where"
        )
        if axis in made.points and len(np.unique(made.points[axis])) > 1 and text not in made.warnings:
            made.warnings.append(text)
    if asked.served > 0:
        best = _served(made, found.values, asked, best, notes)
    chosen = Plan(
        asked.budget,
        made.per_pair * best.n * best.d,
        best.n,
        best.d,
        None,
        None,
        loss_interval(made, best.n, best.d),
        _intervals(made, found.form, asked, best),
        _regret(found, best.n, best.d),
        notes=notes,
    )
    _batch(made, asked, chosen)
    _rate(made, asked, chosen)
    _machine(asked, chosen)
    if made.spread is not None and made.spread.alarm:
        notes.append(f"methods disagree: {made.spread.alarm}")
    return chosen


def configured(
    made: Analysis, asked: Asked, base: Mapping[str, Any], more: Sequence[str]
) -> tuple[Analysis, Plan, RunConfig]:
    """The plan of a config like `base` that spends the budget, by the FLOPs that its network really takes; with the analysis
    at these.

    Args:
        base: raw config of a run.
        more: dotted overrides of it, applied last.

    Raises:
        DataProblem, ValueError: as `plan`.
        ConfigError: a model without a width, an invalid config, or a network whose FLOPs cannot be counted.
    """
    for _ in range(_COUNTS):
        chosen = plan(made, asked)
        batch = chosen.batch if chosen.batch is not None else base.get("train", {}).get("global_batch", 16)
        found, flops = _sized(base, chosen, made.per_pair, batch, more)
        real = flops / (found.n * found.d)
        if abs(real / made.per_pair - 1) < _SAME_COUNT:
            break
        made = recounted(made, real)
    else:  # whole sizes on both sides of the best one, which take different FLOPs
        found, flops = _sized(base, chosen, real, batch, more)
    if abs(real / made.counted - 1) > _OTHER_COUNT:
        chosen.notes.append(
            f"the config takes {real:.3g} FLOPs per parameter and sample or token, not {made.counted:.3g} as the records say: N and "
            "D are the best for its own"
        )
    if abs(flops / chosen.flops - 1) > _SPENT:
        chosen.notes.append(
            f"the config spends {flops:.3g} FLOPs, not {chosen.flops:.3g}: steps are whole, or overridden"
        )
    chosen.n, chosen.d, chosen.flops, chosen.batch = found.n, found.d, flops, found.batch
    chosen.lr = getattr(found.config.optim, "lr", chosen.lr)
    chosen.loss = loss_interval(made, found.n, found.d)
    chosen.regret = _regret(_law(made), found.n, found.d)
    for name in ("n", "d"):
        low, high = chosen.intervals[name]
        if not low <= getattr(chosen, name) <= high:
            chosen.notes.append(
                f"the config's {name}={getattr(chosen, name):.3g} lies outside the interval of the best one"
            )
    _machine(asked, chosen)
    return made, chosen, found.config


def _sized(
    base: Mapping[str, Any], chosen: Plan, per_pair: float, batch: float, more: Sequence[str]
) -> tuple[Sized, float]:
    """A config of the plan's size and FLOPs, if these were `per_pair` N D; and its real FLOPs."""
    found = sized(base, chosen.n, lambda n: chosen.flops / (per_pair * n), batch, chosen.lr, more)
    return found, float(flops_per_sample(found.config)) * found.steps * found.batch


def _law(made: Analysis) -> Fit:
    """The law that has a compute-optimal point."""
    found = next((item for item in made.fits.values() if item.plannable), None)
    if found is None:
        raise DataProblem("a plan needs a fit of chinchilla or tied: runs with varied n and d; see `keel fit`")
    return found


def _regret(found: Fit, n: float, d: float) -> dict[str, float]:
    return {f"{k:g}": float(regret(found.values, n, d, k)) for k in _FACTORS}


def _served(made: Analysis, values: dict[str, float], asked: Asked, best: Allocation, notes: list[str]) -> Allocation:
    """The cheapest model over its life that is as good as the compute-optimal one of this budget."""
    small = with_inference(values, best.loss, asked.served, made.per_pair)
    training = made.per_pair * small.n * small.d
    total = training + made.per_pair / 3 * small.n * asked.served
    before = asked.budget + made.per_pair / 3 * best.n * asked.served
    notes.append(
        f"serving {asked.served:.3g}: a model of {small.n:.3g} trained with {training:.3g} FLOPs reaches the same loss "
        f"{best.loss:.4g} and costs {total:.3g} over its life, {1 - total / before:.0%} less"
    )
    return small


def _intervals(made: Analysis, form: str, asked: Asked, best: Allocation) -> dict[str, Interval]:
    found = made.fits[form]
    from cluster.laws.uncertainty import pairs

    thetas = made.thetas if found is made.primary and made.thetas is not None else pairs(found, 500)
    samples = allocate(found.law.natural(thetas), asked.budget, made.per_pair)
    n, d = interval(np.asarray(samples.n)), interval(np.asarray(samples.d))
    if asked.served > 0:  # the same relative uncertainty about the other optimum
        point = allocate(found.values, asked.budget, made.per_pair)
        n = (n[0] * best.n / point.n, n[1] * best.n / point.n)
        d = (d[0] * best.d / point.d, d[1] * best.d / point.d)
    if made.spread is not None and math.isclose(made.target, asked.budget, rel_tol=1e-6) and asked.served == 0:
        n = (min(n[0], made.spread.union[0]), max(n[1], made.spread.union[1]))
        pairs_at = asked.budget / made.per_pair
        d = (min(d[0], pairs_at / n[1]), max(d[1], pairs_at / n[0]))
    return {"n": n, "d": d}


def _reference(made: Analysis, column: str) -> tuple[float, float] | None:
    """(value of the column, data seen) of the run with the least loss of those that have it."""
    runs = made.points
    if column not in runs or "d" not in runs:
        return None
    good = np.isfinite(runs[column]) & np.isfinite(runs["loss"]) & np.isfinite(runs["d"])
    good &= np.array([status in ("ok", "") for status in runs.status], dtype=bool)
    if not good.any():
        return None
    rows = np.flatnonzero(good)
    row = rows[np.argmin(runs["loss"][rows])]
    return float(runs[column][row]), float(runs["d"][row])


def _batch(made: Analysis, asked: Asked, chosen: Plan) -> None:
    reference = _reference(made, "batch")
    if asked.batch is not None:
        chosen.batch = asked.batch
        chosen.notes.append("batch as given")
    elif reference is not None:
        size, data = reference
        growth = chosen.d / data
        chosen.batch = size * growth**asked.batch_data
        ends = [size * growth**power for power in _BATCH_DATA_RANGE]
        chosen.intervals["batch"] = (min(ends), max(ends))
        chosen.notes.append(
            f"batch = {size:g} (D/{data:.3g})^{asked.batch_data:g}; its interval spans published exponents"
        )
    else:
        chosen.notes.append("the records have no batch: it is left as in the config")


def _rate(made: Analysis, asked: Asked, chosen: Plan) -> None:
    law = _rate_law(made)
    reference = _reference(made, "lr")
    if asked.lr is not None:
        chosen.lr = asked.lr
        chosen.notes.append("learning rate as given")
    elif law is not None and law.line is not None:
        line = law.line
        middle = float(np.mean([math.log(cell.size) for cell in law.cells if not cell.edge]))
        centre = math.log(line.at(math.exp(middle)))
        ends = [math.exp(centre + slope * (math.log(chosen.n) - middle)) for slope in (line.low, line.high)]
        fixed = law.cells[0].others
        factor = 1.0 if asked.law_in_config else _moved(made, asked, chosen, fixed)
        chosen.lr = line.at(chosen.n) * factor
        chosen.intervals["lr"] = (min(ends) * factor, max(ends) * factor)
        at = f" at {law.cells[0].group}" if fixed else ""
        chosen.notes.append(
            f"learning rate = {line.coefficient:.3g} N^{line.exponent:.3g}, fitted to {line.points} sizes{at}"
        )
        if factor != 1:
            chosen.notes.append(
                f"times {factor:.3g} for D^{asked.lr_horizon:g} and B^{asked.lr_batch:g} from there: defaults, not fitted"
            )
    elif reference is not None:
        rate, data = reference
        if asked.law_in_config:
            chosen.lr = rate
            chosen.notes.append(
                f"learning rate = {rate:.3g}, as in the best run: the config's own law of horizon and batch moves it"
            )
            return
        before = _reference(made, "batch")
        ratio = 1.0 if before is None or chosen.batch is None else chosen.batch / before[0]
        horizon, batch = rate_factor(chosen.d / data, ratio, lr_horizon=asked.lr_horizon, lr_batch=asked.lr_batch)
        chosen.lr = rate * horizon * batch
        ends = [rate, rate * horizon, rate * batch, rate * horizon * batch]
        chosen.intervals["lr"] = (min(ends), max(ends))
        chosen.notes.append(
            f"learning rate = {rate:.3g} (D/{data:.3g})^{asked.lr_horizon:g} (B/B0)^{asked.lr_batch:g}: defaults, not "
            "fitted; sweep rates at three sizes or more to replace them"
        )
    else:
        chosen.notes.append("the records have no learning rate: it is left as in the config")


def _rate_law(made: Analysis) -> Transfer | None:
    """The law of the rate over N with an interval; of several, each for runs of one length and batch, that of the longest."""
    verdict = made.transfers.get("n")
    if verdict is None:
        return None
    found = [law for law in verdict.groups.values() if law.line is not None and math.isfinite(law.line.low)]
    return max(found, key=lambda law: tuple(law.cells[0].others.values()), default=None)


def _moved(made: Analysis, asked: Asked, chosen: Plan, fixed: Mapping[str, float]) -> float:
    """What the rate changes by from runs with the values `fixed` of horizon (or d) and batch to the plan's."""
    runs = made.runs
    rows = np.all([runs[name] == value for name, value in fixed.items()], axis=0)
    growth = batches = 1.0
    if ("horizon" in fixed or "d" in fixed) and "d" in runs:
        growth = chosen.d / float(np.median(runs["d"][rows]))
    if "batch" in fixed and chosen.batch is not None:
        batches = chosen.batch / fixed["batch"]
    horizon, batch = rate_factor(growth, batches, lr_horizon=asked.lr_horizon, lr_batch=asked.lr_batch)
    return horizon * batch


def _machine(asked: Asked, chosen: Plan) -> None:
    """Time and cost of the plan's FLOPs."""
    if asked.device is None:
        return
    from trainer.flops import device_peak

    peak = device_peak(asked.device, "bf16-mixed")
    if peak is None:
        raise ValueError(f"--device {asked.device}: no such device is known; try h100, h200, b200, a100, l40s, mi300x")
    if not 0 < asked.mfu <= 1 or asked.gpus < 1:
        raise ValueError(f"--mfu {asked.mfu:g} must lie in (0, 1], --gpus {asked.gpus} must be at least 1")
    chosen.gpu_hours = chosen.flops / (peak * asked.mfu) / 3600
    chosen.hours = chosen.gpu_hours / asked.gpus
    chosen.cost = None if asked.price is None else chosen.gpu_hours * asked.price
    text = f"time assumes {asked.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s (16 bit) on {asked.gpus} devices"
    if text not in chosen.notes:
        chosen.notes.append(text)


def registration(made: Analysis, chosen: Plan, about: dict[str, Any]) -> dict[str, Any]:
    """The pre-registered prediction as plain containers; `about` says of which config, from which source."""
    from cluster.laws.summary import plain

    value, low, high = chosen.loss
    found: dict[str, Any] = plain(
        {
            "kind": "keel prediction",
            **about,
            "budget": chosen.budget,
            "flops": chosen.flops,
            "flops_per_pair": made.per_pair,
            "n": chosen.n,
            "d": chosen.d,
            "batch": chosen.batch,
            "lr": chosen.lr,
            "intervals": chosen.intervals,
            "loss": {"value": value, "low": low, "high": high, "level": 0.95},
            "regret": chosen.regret,
            "gpu_hours": chosen.gpu_hours,
            "laws": {name: item.values for name, item in made.fits.items()},
            "notes": chosen.notes,
            "warnings": made.warnings,
        }
    )
    return found

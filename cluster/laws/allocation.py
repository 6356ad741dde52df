"""What a fitted law says to train: the best N and D for a budget, and the price of choosing otherwise.

Closed forms for E + A/N^alpha + B/D^beta under C = k N D (arXiv:2203.15556, eq. 4). k is 6 for a dense language model;
for others it is FLOPs per parameter and sample, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.laws.optimise import Array

Values = Mapping[str, Any]


@dataclass
class Allocation:
    """The compute-optimal choice; numbers, or arrays over resamples.

    Attributes:
        n, d: parameters, and tokens or samples.
        loss: predicted there.
        exponent: a of N* = G (C/k)^a; D* grows with 1 - a.
    """

    n: Any
    d: Any
    loss: Any
    exponent: Any


def loss_at(values: Values, n: Any, d: Any) -> Any:
    """Predicted loss at n and d; a tied law has alpha alone."""
    beta = values.get("beta", values["alpha"])
    return values["E"] + values["A"] * n ** -values["alpha"] + values["B"] * d**-beta


def allocate(values: Values, flops: float, per_pair: float = 6.0) -> Allocation:
    """The N and D of least loss at a budget.

    Args:
        values: A, B, E, alpha, beta of a fit: numbers or arrays.
        flops: the budget C.
        per_pair: k of C = k N D.

    Raises:
        ValueError: the budget is not positive, or an exponent is not, so that there is no optimum inside.
    """
    if not flops > 0 or not math.isfinite(flops):
        raise ValueError(f"budget={flops}: must be a positive number of FLOPs")
    a, b, alpha = (np.asarray(values[name], dtype=float) for name in ("A", "B", "alpha"))
    beta = np.asarray(values.get("beta", alpha), dtype=float)
    if a.ndim == 0 and not (alpha > 0 and beta > 0 and a > 0 and b > 0):
        raise ValueError(f"alpha={alpha:.3g}, beta={beta:.3g}: the law has no compute-optimal point")
    with np.errstate(all="ignore"):
        g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
        n = g * (flops / per_pair) ** (beta / (alpha + beta))
        d = (flops / per_pair) / n
        loss = loss_at(values, n, d)
    exponent = beta / (alpha + beta)
    if a.ndim == 0:
        return Allocation(float(n), float(d), float(loss), float(exponent))
    return Allocation(n, d, loss, exponent)


def regret(values: Values, n: float, d: float, factor: Any) -> Any:
    """Loss that is added by `factor` times the parameters for the FLOPs of `n` and `d`."""
    return loss_at(values, n * factor, d / factor) - loss_at(values, n, d)


def data_for(values: Values, n: float, loss: float) -> float:
    """Tokens or samples with which a model of `n` parameters reaches `loss`.

    Raises:
        ValueError: it never does: n is too small for that loss.
    """
    beta = values.get("beta", values["alpha"])
    gap = loss - values["E"] - values["A"] * n ** -values["alpha"]
    if gap <= 0:
        least = (values["A"] / (loss - values["E"])) ** (1 / values["alpha"]) if loss > values["E"] else math.inf
        raise ValueError(f"{n:.3g} parameters cannot reach a loss of {loss:.4g}: at least {least:.3g} are needed")
    return float((values["B"] / gap) ** (1 / beta))


def with_inference(values: Values, loss: float, served: float, per_pair: float = 6.0) -> Allocation:
    """The N and D of least total cost `k N D + (k/3) N served` that reach `loss` (Sardana et al., arXiv:2401.00448).

    Args:
        values: of a fit.
        loss: to be reached.
        served: tokens or samples that the model will process once trained.
        per_pair: k; a forward pass is a third of a training step.

    Raises:
        ValueError: `loss` lies below the law's floor.
    """
    if loss <= values["E"]:
        raise ValueError(f"loss={loss:.4g} lies below the floor E={values['E']:.4g} of the law")
    least = math.log((values["A"] / (loss - values["E"])) ** (1 / values["alpha"]))

    def cost(log_n: float) -> float:
        n = math.exp(log_n)
        return math.log(per_pair * n * data_for(values, n, loss) + per_pair / 3 * n * served)

    low, high = least + 1e-6, least + 30.0
    golden = (math.sqrt(5) - 1) / 2  # the cost has one minimum in log N
    for _ in range(120):
        left, right = high - golden * (high - low), low + golden * (high - low)
        if cost(left) < cost(right):
            high = right
        else:
            low = left
    n = math.exp(0.5 * (low + high))
    d = data_for(values, n, loss)
    return Allocation(n, d, loss, math.nan)


def interval(samples: Array, level: float = 0.95) -> tuple[float, float]:
    """Central interval of the finite samples."""
    good = samples[np.isfinite(samples)]
    if not len(good):
        return math.nan, math.nan
    low, high = np.quantile(good, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""Which run to do next: the one that most reduces the variance of a prediction for what it costs.

c-optimal design on the fitted law (Chaloner & Verdinelli 1995, "Bayesian experimental design: a review"; locally, at the
fitted parameters): the parameters' covariance is s^2 (J'J)^-1 over the runs done, J the derivatives of the log loss; a run
with derivatives j reduces the variance g'Cg of a prediction with derivatives g by (g'Cj)^2 / (s^2 + j'Cj), whatever its
outcome.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cluster.laws.allocation import allocate
from cluster.laws.fit import Fit
from cluster.laws.optimise import Array
from cluster.laws.records import DataProblem


@dataclass
class Choice:
    """The next run.

    Attributes:
        index: of the candidate.
        std: standard deviation of the predicted log loss at the target before it; `after` it.
        gain: reduction of the variance per unit of cost, of each candidate.
    """

    index: int
    std: float
    after: float
    gain: Array


class Design:
    """What the runs behind a fit say about a prediction, and what one more would.

    Args:
        found: the fit; its runs are the ones done.
        target: axes (n, d, ...) of the prediction, one number each.

    Raises:
        DataProblem: no more runs than parameters, so that there is no variance to speak of.
    """

    def __init__(self, found: Fit, target: Mapping[str, float]) -> None:
        jacobian = found.law.jacobian(found.theta[None])[0]
        free = len(jacobian) - found.law.size
        if free < 1:
            raise DataProblem(
                f"a next run is chosen by what is uncertain, and {len(jacobian)} runs leave no freedom to "
                f"{found.law.size} parameters; do more of the sweep first"
            )
        self.found = found
        self.noise = float(found.residuals @ found.residuals) / free
        self.covariance = self.noise * np.linalg.pinv(jacobian.T @ jacobian, rcond=1e-12, hermitian=True)
        self.gradient = self._derivatives({name: np.array([value]) for name, value in target.items()})[0]

    @property
    def std(self) -> float:
        """Of the predicted log loss at the target."""
        return math.sqrt(max(float(self.gradient @ self.covariance @ self.gradient), 0.0))

    def choose(self, candidates: Mapping[str, Array], cost: Array) -> Choice:
        """The candidate (axes [m] each, cost [m]) with the largest reduction of the variance per cost."""
        rows = self._derivatives(candidates)
        towards = rows @ self.covariance
        reduction = (towards @ self.gradient) ** 2 / (self.noise + np.einsum("mp,mp->m", towards, rows))
        gain = reduction / cost
        best = int(np.argmax(gain))
        return Choice(best, self.std, math.sqrt(max(self.std**2 - float(reduction[best]), 0.0)), gain)

    def _derivatives(self, axes: Mapping[str, Array]) -> Array:
        arrays = {name: np.asarray(axes[name], dtype=float) for name in self.found.law.axes_needed}
        found: Array = self.found.law.at(arrays).jacobian(self.found.theta[None])[0]
        return found


def best_at(found: Fit, flops: float, per_pair: float) -> dict[str, float]:
    """The compute-optimal n and d at a budget: what the prediction there depends on. (That they move with the parameters
    makes no difference to first order, for the loss is least there.)"""
    best = allocate(found.values, flops, per_pair)
    return {"n": float(best.n), "d": float(best.d)}

"""A common exponent around both powers: L = E + (A/N^alpha + B/D^beta)^gamma."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import numpy as np

from cluster.laws.forms.base import Law
from cluster.laws.optimise import Array


class Joint(Law):
    """gamma below one lets the two shortages add less than fully (the form used for xLSTM, arXiv:2510.02228)."""

    title: ClassVar[str] = "E + (A/N^alpha + B/D^beta)^gamma"
    axes_needed: ClassVar = ("n", "d")
    names: ClassVar = ("log_A", "log_B", "log_E", "alpha", "beta", "gamma")
    source: ClassVar[str] = "Beck et al., arXiv:2510.02228"

    def _parts(self, theta: Array) -> tuple[Array, Array, Array, Array]:
        a, b, e, alpha, beta, gamma = (theta[:, i, None] for i in range(6))
        u, v = a - alpha * self.logs["n"], b - beta * self.logs["d"]
        inner = np.logaddexp(u, v)
        total = np.logaddexp(e, gamma * inner)
        return inner, total, np.exp(u - inner), np.exp(gamma * inner - total)

    def evaluate(self, theta: Array) -> tuple[Array, Any]:
        return self._parts(theta)[1], ()

    def jacobian(self, theta: Array) -> Array:
        inner, _, of_n, reducible = self._parts(theta)
        scaled = reducible * theta[:, 5, None]
        of_d = 1 - of_n
        columns = (
            scaled * of_n,
            scaled * of_d,
            1 - reducible,
            -scaled * of_n * self.logs["n"],
            -scaled * of_d * self.logs["d"],
            reducible * inner,
        )
        return np.stack(columns, axis=-1)

    def starts(self) -> Array:
        found = []
        for alpha, beta, gamma, share in product((0.2, 0.6), (0.2, 0.6), (0.5, 1.0), (0.3, 0.7)):
            for reducible in (0.3, 0.7):
                inner = (self.level + np.log(reducible)) / gamma
                e = self.level + np.log1p(-reducible)
                found.append([inner + np.log(share), inner + np.log1p(-share), e, alpha, beta, gamma])
        return np.array(found)

    def bounds(self) -> tuple[Array, Array]:
        low, high = super().bounds()
        low[5], high[5] = 0.02, 8.0
        return low, high

    def natural(self, theta: Array) -> dict[str, Array]:
        theta = np.atleast_2d(theta)
        return {
            "A": np.exp(theta[:, 0] + theta[:, 3] * self.centres["n"]),
            "B": np.exp(theta[:, 1] + theta[:, 4] * self.centres["d"]),
            "E": np.exp(theta[:, 2]),
            "alpha": theta[:, 3],
            "beta": theta[:, 4],
            "gamma": theta[:, 5],
        }

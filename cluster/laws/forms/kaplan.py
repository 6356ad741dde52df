"""The joint form of Kaplan et al.: L = [(Nc/N)^(alpha/beta) + Dc/D]^beta, without a floor."""

from __future__ import annotations

from itertools import product
from typing import Any, ClassVar

import numpy as np

from cluster.laws.forms.base import Law
from cluster.laws.optimise import Array


class Kaplan(Law):
    """`alpha` and `beta` are the exponents in N and in D, each with the other unlimited."""

    title: ClassVar[str] = "[(Nc/N)^(alpha/beta) + Dc/D]^beta"
    axes_needed: ClassVar = ("n", "d")
    names: ClassVar = ("log_Nc", "log_Dc", "alpha", "beta")
    source: ClassVar[str] = "Kaplan et al., arXiv:2001.08361, eq. 1.5"

    def _parts(self, theta: Array) -> tuple[Array, Array, Array, Array]:
        nc, dc, alpha, beta = (theta[:, i, None] for i in range(4))
        far = nc - self.logs["n"]
        u, v = alpha / beta * far, dc - self.logs["d"]
        total = np.logaddexp(u, v)
        return far, total, np.exp(u - total), np.exp(v - total)

    def evaluate(self, theta: Array) -> tuple[Array, Any]:
        _, total, _, _ = self._parts(theta)
        return theta[:, 3, None] * total, ()

    def jacobian(self, theta: Array) -> Array:
        far, total, of_n, of_d = self._parts(theta)
        alpha, beta = theta[:, 2, None], theta[:, 3, None]
        return np.stack([of_n * alpha, of_d * beta, of_n * far, total - of_n * alpha / beta * far], axis=-1)

    def starts(self) -> Array:
        found = []
        for alpha, beta, share in product((0.05, 0.1, 0.3, 0.6), (0.05, 0.1, 0.3, 0.6), (0.2, 0.5, 0.8)):
            level = self.level / beta
            found.append([(level + np.log(share)) * beta / alpha, level + np.log1p(-share), alpha, beta])
        return np.array(found)

    def bounds(self) -> tuple[Array, Array]:
        return np.array([-300.0, -300.0, 1e-3, 1e-3]), np.array([300.0, 300.0, 5.0, 5.0])

    def natural(self, theta: Array) -> dict[str, Array]:
        theta = np.atleast_2d(theta)
        return {
            "Nc": np.exp(theta[:, 0] + self.centres["n"]),
            "Dc": np.exp(theta[:, 1] + self.centres["d"]),
            "alpha": theta[:, 2],
            "beta": theta[:, 3],
        }

"""Repeated data: an epoch more is worth less than fresh data, and parameters beyond what the data can fill are, too."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from cluster.laws.forms.base import Law
from cluster.laws.forms.chinchilla import Chinchilla
from cluster.laws.optimise import Array


class DataConstrained(Law):
    """n: parameters; d: tokens or samples seen; u: unique ones among them (u <= d).

    D' = U + U RD (1 - exp(-R/RD)) with R = D/U - 1, and N' alike with the N that is compute-optimal for U as its unit.
    """

    title: ClassVar[str] = "E + A/N'^alpha + B/D'^beta, D' = U + U RD (1 - exp(-(D/U - 1)/RD)), N' alike"
    axes_needed: ClassVar = ("n", "d", "u")
    names: ClassVar = ("log_A", "log_B", "log_E", "alpha", "beta", "log_RD", "log_RN")
    source: ClassVar[str] = "Muennighoff et al., arXiv:2305.16264"

    def _bind(self) -> None:
        self._n = np.log(self.axes["n"])
        self._u = np.log(np.minimum(self.axes["u"], self.axes["d"]))
        self._repeats = np.maximum(self.axes["d"] / np.exp(self._u) - 1, 0.0)

    def _parts(self, theta: Array) -> dict[str, Array]:
        a, b, e, alpha, beta, rd, rn = (theta[:, i, None] for i in range(7))
        log_a, log_b = a + alpha * self.centres["n"], b + beta * self.centres["d"]
        both = alpha + beta
        g = (np.log(alpha) + log_a - np.log(beta) - log_b) / both
        unit = g + beta / alpha * (self._u + g)
        seen, seen_by_r = _worth(self._repeats, np.exp(rd))
        ratio = np.exp(np.minimum(self._n - unit, 50.0))
        excess = np.maximum(ratio - 1, 0.0)
        held, held_by_r = _worth(excess, np.exp(rn))
        small = ratio <= 1
        log_n = np.where(small, self._n, unit + held)
        slope = np.where(small, 0.0, 1 - ratio * np.exp(-excess / np.exp(rn)) / np.exp(held))  # d log N' / d log unit
        log_d = self._u + seen
        s, t = log_a - alpha * log_n, log_b - beta * log_d
        total = np.logaddexp(np.logaddexp(s, t), e)
        return {
            "total": total,
            "of_n": np.exp(s - total),
            "of_d": np.exp(t - total),
            "of_e": np.exp(e - total),
            "log_n": log_n,
            "log_d": log_d,
            "slope": slope,
            "g": g,
            "seen_by_r": seen_by_r,
            "held_by_r": np.where(small, 0.0, held_by_r),
        }

    def evaluate(self, theta: Array) -> tuple[Array, Any]:
        return self._parts(theta)["total"], ()

    def jacobian(self, theta: Array) -> Array:
        alpha, beta = theta[:, 3, None], theta[:, 4, None]
        p = self._parts(theta)
        both, g, n_centre, d_centre = alpha + beta, p["g"], self.centres["n"], self.centres["d"]
        # log unit = g (1 + beta/alpha) + beta/alpha log U, so its derivative in g is `lever`.
        lever = both / alpha
        by_a, by_b = lever / both, -lever / both
        by_alpha = lever * ((1 / alpha + n_centre) - g) / both - beta / alpha**2 * (self._u + g)
        by_beta = lever * ((-1 / beta - d_centre) - g) / both + (self._u + g) / alpha
        moved = -alpha * p["slope"] * p["of_n"]
        columns = (
            p["of_n"] + moved * by_a,
            p["of_d"] + moved * by_b,
            p["of_e"],
            p["of_n"] * (n_centre - p["log_n"]) + moved * by_alpha,
            p["of_d"] * (d_centre - p["log_d"]) + moved * by_beta,
            -beta * p["of_d"] * p["seen_by_r"],
            -alpha * p["of_n"] * p["held_by_r"],
        )
        return np.stack(np.broadcast_arrays(*columns), axis=-1)

    def starts(self) -> Array:
        plain = Chinchilla({name: self.axes[name] for name in ("n", "d")}, np.exp([self.level]), self.centres).starts()
        found = [np.hstack([plain, np.full((len(plain), 2), np.log(r))]) for r in (2.0, 15.0)]
        return np.vstack(found)

    def bounds(self) -> tuple[Array, Array]:
        low, high = super().bounds()
        low[3:5], high[3:5] = 0.02, 3.0
        low[5:], high[5:] = np.log(1e-2), np.log(1e4)
        return low, high

    def natural(self, theta: Array) -> dict[str, Array]:
        theta = np.atleast_2d(theta)
        return {
            "A": np.exp(theta[:, 0] + theta[:, 3] * self.centres["n"]),
            "B": np.exp(theta[:, 1] + theta[:, 4] * self.centres["d"]),
            "E": np.exp(theta[:, 2]),
            "alpha": theta[:, 3],
            "beta": theta[:, 4],
            "RD": np.exp(theta[:, 5]),
            "RN": np.exp(theta[:, 6]),
        }


def _worth(repeats: Array, half: Array) -> tuple[Array, Array]:
    """log(1 + R*(1 - exp(-R/R*))) and its derivative in log R*."""
    left = np.exp(-repeats / half)
    value = 1 + half * -np.expm1(-repeats / half)
    return np.log(value), (half * -np.expm1(-repeats / half) - repeats * left) / value

"""Smoothly broken power laws with a floor, in one axis, with one or two breaks."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any, ClassVar

import numpy as np

from cluster.laws.forms.base import Law
from cluster.laws.optimise import Array


class Broken(Law):
    """L = a + b C^-c0 prod_i (1 + (C/d_i)^(1/f_i))^(-c_i f_i); Caballero et al., arXiv:2210.14891.

    Fitted, like every law here, to the logarithm of the loss (the paper takes that of the loss plus one).
    """

    axes_needed: ClassVar = ("c",)
    breaks: ClassVar[int]
    source: ClassVar[str] = "Caballero et al., arXiv:2210.14891"

    def _parts(self, theta: Array) -> tuple[Array, Array, list[tuple[Array, Array, Array, Array]]]:
        x = self.logs["c"]
        power = theta[:, 1, None] - theta[:, 2, None] * x
        parts = []
        for i in range(self.breaks):
            d, c, f = (theta[:, 3 + 3 * i + j, None] for j in range(3))
            width = np.exp(f)
            z = (x - d) / width
            soft = np.logaddexp(0.0, z)
            power = power - c * width * soft
            parts.append((c, width, soft, np.exp(z - soft)))
        return np.logaddexp(theta[:, 0, None], power), power, parts

    def evaluate(self, theta: Array) -> tuple[Array, Any]:
        return self._parts(theta)[0], ()

    def jacobian(self, theta: Array) -> Array:
        total, power, parts = self._parts(theta)
        share = np.exp(power - total)
        x = self.logs["c"]
        columns = [1 - share, share, -share * x]
        for i, (c, width, soft, gate) in enumerate(parts):
            far = x - theta[:, 3 + 3 * i, None]
            columns += [share * c * gate, -share * width * soft, -share * c * (width * soft - gate * far)]
        return np.stack(columns, axis=-1)

    def starts(self) -> Array:
        x = self.logs["c"]
        places = np.quantile(x, [0.25, 0.5, 0.75] if self.breaks == 1 else [0.2, 0.4, 0.6, 0.8])
        found = []
        for where in combinations(places, self.breaks):
            for floor, c0, c, f in product((0.05, 0.6), (0.1, 0.4), (-0.2, 0.3), (0.2, 1.0)):
                tail = [value for d in where for value in (d, c, np.log(f))]
                found.append([self.level + np.log(floor), self.level + np.log1p(-floor), c0, *tail])
        return np.array(found)

    def bounds(self) -> tuple[Array, Array]:
        x = self.logs["c"]
        low = [self.floor - 15, self.floor - 30, -2.0] + [float(x.min()), -6.0, np.log(0.02)] * self.breaks
        high = [self.level + 5, self.level + 40, 4.0] + [float(x.max()), 6.0, np.log(20.0)] * self.breaks
        return np.array(low), np.array(high)

    def natural(self, theta: Array) -> dict[str, Array]:
        theta = np.atleast_2d(theta)
        centre = self.centres["c"]
        found = {"a": np.exp(theta[:, 0]), "b": np.exp(theta[:, 1] + theta[:, 2] * centre), "c0": theta[:, 2]}
        for i in range(self.breaks):
            d, c, f = theta[:, 3 + 3 * i : 6 + 3 * i].T
            found |= {f"d{i + 1}": np.exp(d + centre), f"c{i + 1}": c, f"f{i + 1}": np.exp(f)}
        return found


class BrokenOnce(Broken):
    """One break."""

    title: ClassVar[str] = "a + b C^-c0 (1 + (C/d1)^(1/f1))^(-c1 f1)"
    breaks: ClassVar[int] = 1
    names: ClassVar = ("log_a", "log_b", "c0", "log_d1", "c1", "log_f1")


class BrokenTwice(Broken):
    """Two breaks."""

    title: ClassVar[str] = "a + b C^-c0 prod_(i=1,2) (1 + (C/di)^(1/fi))^(-ci fi)"
    breaks: ClassVar[int] = 2
    names: ClassVar = ("log_a", "log_b", "c0", "log_d1", "c1", "log_f1", "log_d2", "c2", "log_f2")

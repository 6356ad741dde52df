"""What a law is: axes that it reads, parameters, a prediction with exact derivatives, and where to start.

A law predicts the logarithm of the loss, and works in centred logarithms of its axes: fits then do not depend on the
units of N or D, and the Hessian is well scaled. `natural` gives the parameters as people write them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from cluster.laws.optimise import Array

Axes = Mapping[str, Array]


class Law(ABC):
    """A law bound to the axes of its points.

    Args:
        axes: positive values of each axis that the law reads, [n] each.
        loss: losses [n]; they set the scale of the starts, nothing else.
        centres: mean logarithm per axis; None: of the axes given.

    Attributes:
        axes_needed: names of the columns that it reads.
        names: of its parameters as fitted; `natural` may have others.
        source: paper and arXiv id.
    """

    title: ClassVar[str]
    axes_needed: ClassVar[tuple[str, ...]]
    names: ClassVar[tuple[str, ...]]
    source: ClassVar[str]

    def __init__(self, axes: Axes, loss: Array, centres: Mapping[str, float] | None = None) -> None:
        self.axes = {name: np.asarray(axes[name], dtype=float) for name in self.axes_needed}
        self.centres = dict(centres or {name: float(np.log(axes[name]).mean()) for name in self.axes_needed})
        self.logs = {name: np.log(self.axes[name]) - self.centres[name] for name in self.axes_needed}
        self.level = float(np.mean(np.log(loss))) if len(loss) else 0.0
        self.floor = float(np.min(np.log(loss))) if len(loss) else 0.0
        self._bind()

    def _bind(self) -> None:  # noqa: B027 - laws without tables of their own need nothing here
        """Precomputes what depends on the points alone."""

    @property
    def size(self) -> int:
        return len(self.names)

    def at(self, axes: Axes) -> Law:
        """The same law, with the same parameters, on other points."""
        return type(self)(axes, np.empty(0), self.centres)

    def predict(self, theta: Array, axes: Axes) -> Array:
        """Losses [S, n] at `axes` for parameters [S, P]."""
        return np.exp(self.at(axes).evaluate(np.atleast_2d(theta))[0])

    @abstractmethod
    def evaluate(self, theta: Array) -> tuple[Array, Any]:
        """Log losses [S, n], and a tuple of arrays [S, ...] that `derivatives` reuses."""

    @abstractmethod
    def jacobian(self, theta: Array) -> Array:
        """Derivatives of the log losses [S, n, P]."""

    def derivatives(
        self, theta: Array, kept: Any, slope: Array, curve: Array, exact: bool = True
    ) -> tuple[Array, Array]:
        """Gradient and Hessian; the part of the Hessian that the Jacobian does not give is differenced from it."""
        jacobian = self.jacobian(theta)
        gradient = np.einsum("sn,snp->sp", slope, jacobian)
        hessian = np.einsum("sn,snp,snq->spq", curve, jacobian, jacobian, optimize=True)
        for index in range(self.size if exact else 0):
            step = 1e-5 * (1 + np.abs(theta[:, index]))
            ahead, behind = theta.copy(), theta.copy()
            ahead[:, index] += step
            behind[:, index] -= step
            change = (self.jacobian(ahead) - self.jacobian(behind)) / (2 * step)[:, None, None]
            hessian[:, index] += np.einsum("sn,snp->sp", slope, change)
        return gradient, 0.5 * (hessian + hessian.transpose(0, 2, 1))

    @abstractmethod
    def starts(self) -> Array:
        """Initial parameters [S, P] that cover what is plausible for the points' range."""

    def bounds(self) -> tuple[Array, Array]:
        """Lowest and highest parameters: wide; an optimum on one of them is reported as such."""
        low = np.array([-1.0 if name in _EXPONENTS else self.floor - 30.0 for name in self.names])
        high = np.array([8.0 if name in _EXPONENTS else self.level + 40.0 for name in self.names])
        return low, high

    @abstractmethod
    def natural(self, theta: Array) -> dict[str, Array]:
        """Parameters as people write them, [S] each, from parameters [S, P]."""


_EXPONENTS = {"alpha", "beta", "gamma", "eta", "order"}


class LogSum(Law):
    """A loss that is a sum of powers: its logarithm is a log-sum-exp of terms linear in the parameters.

    `terms` gives each term as (name of its log coefficient, its powers as (exponent's name, axis, sign)). The exact
    Hessian then costs a few matrix products.
    """

    terms: ClassVar[tuple[tuple[str, tuple[tuple[str, str, float], ...]], ...]]

    def _bind(self) -> None:
        n = len(next(iter(self.logs.values())))
        self._m = np.zeros((len(self.terms), n, self.size))  # [K, n, P]
        for row, (name, powers) in zip(self._m, self.terms, strict=True):
            row[:, self.names.index(name)] = 1.0
            for exponent, axis, sign in powers:
                row[:, self.names.index(exponent)] += sign * self.logs[axis]
        count, size = len(self.terms), self.size
        self._flat = self._m.reshape(count * n, size).T.copy()
        self._pairs = [(k, l) for k in range(count) for l in range(k, count)]
        self._upper = np.triu_indices(size)
        rows, columns = self._upper
        products = []
        for k, l in self._pairs:
            outer = self._m[k][:, rows] * self._m[l][:, columns] + self._m[l][:, rows] * self._m[k][:, columns]
            products.append(outer if k != l else 0.5 * outer)
        self._products = np.stack(products)  # [pairs, n, P(P+1)/2], both orders of a pair summed
        self._same = [self._pairs.index((k, k)) for k in range(count)]

    def evaluate(self, theta: Array) -> tuple[Array, Any]:
        t = (theta @ self._flat).reshape(len(theta), len(self.terms), -1)  # [S, K, n]
        largest = t.max(axis=1)
        t -= largest[:, None]
        np.exp(t, out=t)
        total = t.sum(axis=1)
        t /= total[:, None]
        return largest + np.log(total), (t,)

    def jacobian(self, theta: Array) -> Array:
        _, (share,) = self.evaluate(theta)
        return np.einsum("skn,knp->snp", share, self._m, optimize=True)

    def derivatives(
        self, theta: Array, kept: Any, slope: Array, curve: Array, exact: bool = True
    ) -> tuple[Array, Array]:
        (share,) = kept
        pulled = slope[:, None] * share  # [S, K, n]
        gradient = pulled.reshape(len(theta), -1) @ self._flat.T
        excess = curve - slope if exact else curve
        packed = np.zeros((len(theta), len(self._upper[0])))
        for (k, l), product in zip(self._pairs, self._products, strict=True):
            weight = excess * share[:, k] * share[:, l]
            if k == l and exact:
                weight += pulled[:, k]
            packed += weight @ product
        hessian = np.empty((len(theta), self.size, self.size))
        hessian[:, self._upper[0], self._upper[1]] = packed
        hessian[:, self._upper[1], self._upper[0]] = packed
        return gradient, hessian

    def natural(self, theta: Array) -> dict[str, Array]:
        theta = np.atleast_2d(theta)
        found: dict[str, Array] = {}
        for name, powers in self.terms:
            log = theta[:, self.names.index(name)].copy()
            for exponent, axis, sign in powers:
                log -= sign * theta[:, self.names.index(exponent)] * self.centres[axis]
            found[name.removeprefix("log_")] = np.exp(log)
        found |= {name: theta[:, i] for i, name in enumerate(self.names) if not name.startswith("log_")}
        return found

    def starts(self) -> Array:
        """Shares of the loss at the centre for each term, times exponents."""
        shares = _simplex(len(self.terms))
        exponents = [name for name in self.names if not name.startswith("log_")]
        ladder = (0.15, 0.4, 0.8) if len(exponents) < 3 else (0.2, 0.7)
        grid = np.stack(np.meshgrid(*[ladder] * len(exponents), indexing="ij"), -1).reshape(-1, len(exponents))
        found = []
        for share in shares:
            for exponent in grid:
                values = dict(zip(exponents, exponent, strict=True))
                logs = {name: self.level + np.log(s) for (name, _), s in zip(self.terms, share, strict=True)}
                found.append([{**values, **logs}[name] for name in self.names])
        return np.array(found)


def _simplex(count: int) -> Array:
    """Shares of `count` terms: all alike, and each in turn holding most of the sum."""
    if count == 1:
        return np.ones((1, 1))
    skewed = np.full((count, count), 0.3 / (count - 1))
    np.fill_diagonal(skewed, 0.7)
    return np.vstack([np.full((1, count), 1 / count), skewed])

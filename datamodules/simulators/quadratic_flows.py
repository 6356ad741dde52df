"""Chaotic flows of three components whose right-hand side is a quadratic polynomial: base systems to combine.

A flow is a matrix of coefficients [3, 10] on the monomials (1, x, y, z, x^2, xy, xz, y^2, yz, z^2), so that a batch of
different flows costs one product. Parameters are those under which each is known to be chaotic; periods (of the dominant
oscillation) are those that Gilpin measured (arXiv 2110.05266).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .integrators import constant

MONOMIALS = ("1", "x", "y", "z", "xx", "xy", "xz", "yy", "yz", "zz")
LEFT, RIGHT = (
    (0, 0, 0, 0, 1, 1, 1, 2, 2, 3),
    (0, 1, 2, 3, 1, 2, 3, 2, 3, 3),
)  # factors of the monomials among 1, x, y, z


@dataclass(frozen=True)
class Flow:
    """A base system.

    parameters: name -> value. terms: for each component (monomial, factor, parameter or "").
    start: a state in the basin of the attractor. period: of its dominant oscillation.
    rms: root mean square of each component of the right-hand side, times the period, on the attractor.
    """

    parameters: dict[str, float]
    terms: tuple[tuple[tuple[str, float, str], ...], ...]
    start: tuple[float, float, float]
    period: float
    rms: tuple[float, float, float]

    def coefficients(self, values: np.ndarray) -> np.ndarray:
        """Coefficients [3, 10] for parameter values in the order of `parameters`; a product a.b takes two of them."""
        named = dict(zip(self.parameters, values, strict=True))
        out = np.zeros((3, len(MONOMIALS)))
        for row, terms in zip(out, self.terms, strict=True):
            for monomial, factor, name in terms:
                for part in name.split(".") if name else ():
                    factor = factor * named[part]
                row[MONOMIALS.index(monomial)] += factor
        return out


FLOWS: dict[str, Flow] = {
    "lorenz63": Flow(
        {"sigma": 10.0, "rho": 28.0, "beta": 8 / 3},
        (
            (("y", 1, "sigma"), ("x", -1, "sigma")),
            (("x", 1, "rho"), ("xz", -1, ""), ("y", -1, "")),
            (("xy", 1, ""), ("z", -1, "beta")),
        ),
        (-9.79, -15.04, 20.53), 1.5008, (64.8, 99.1, 119.5),
    ),
    "rossler": Flow(
        {"a": 0.2, "b": 0.2, "c": 5.7},
        (
            (("y", -1, ""), ("z", -1, "")),
            (("x", 1, ""), ("y", 1, "a")),
            (("1", 1, "b"), ("xz", 1, ""), ("z", -1, "c")),
        ),
        (6.51, 0.477, 0.342), 5.9086, (35.4, 29.9, 49.9),
    ),
    "halvorsen": Flow(
        {"a": 1.4, "b": 4.0},
        (
            (("x", -1, "a"), ("y", -1, "b"), ("z", -1, "b"), ("yy", -1, "")),
            (("y", -1, "a"), ("z", -1, "b"), ("x", -1, "b"), ("zz", -1, "")),
            (("z", -1, "a"), ("x", -1, "b"), ("y", -1, "b"), ("xx", -1, "")),
        ),
        (-8.68, -2.47, 0.0708), 1.4889, (37.2, 37.2, 37.2),
    ),
    "chen": Flow(
        {"a": 35.0, "b": 3.0, "c": 28.0},
        (
            (("y", 1, "a"), ("x", -1, "a")),
            (("x", 1, "c"), ("x", -1, "a"), ("xz", -1, ""), ("y", 1, "c")),
            (("xy", 1, ""), ("z", -1, "b")),
        ),
        (3.27, 5.30, 19.4), 0.58689, (70.1, 81.0, 48.3),
    ),
    "rucklidge": Flow(
        {"a": 2.0, "b": 6.7},
        (
            (("x", -1, "a"), ("y", 1, "b"), ("yz", -1, "")),
            (("x", 1, ""),),
            (("z", -1, ""), ("yy", 1, "")),
        ),
        (1.93, 3.19, 5.78), 6.0721, (35.2, 16.4, 32.9),
    ),
    "lorenz84": Flow(
        {"a": 1.32, "b": 7.91, "f": 4.83, "g": 4.194},
        (
            (("x", -1, "a"), ("yy", -1, ""), ("zz", -1, ""), ("1", 1, "a.f")),
            (("y", -1, ""), ("xy", 1, ""), ("xz", -1, "b"), ("1", 1, "g")),
            (("z", -1, ""), ("xy", 1, "b"), ("xz", 1, "")),
        ),
        (1.93, -0.134, -1.72), 6.2586, (13.2, 68.4, 72.7),
    ),
    "dadras": Flow(
        {"c": 2.0, "e": 9.0, "o": 2.7, "p": 3.0, "r": 1.7},
        (
            (("y", 1, ""), ("x", -1, "p"), ("yz", 1, "o")),
            (("y", 1, "r"), ("xz", -1, ""), ("z", 1, "")),
            (("xy", 1, "c"), ("z", -1, "e")),
        ),
        (1.03, -3.53, -0.721), 3.2886, (43.4, 38.7, 42.2),
    ),
    "genesio_tesi": Flow(
        {"a": 0.44, "b": 1.1, "c": 1.0},
        (
            (("y", 1, ""),),
            (("z", 1, ""),),
            (("x", -1, "c"), ("y", -1, "b"), ("z", -1, "a"), ("xx", 1, "")),
        ),
        (-0.0538, -0.262, 0.335), 5.9431, (2.03, 2.14, 2.42),
    ),
}  # fmt: skip


def evaluate(coefficients: Tensor, x: Tensor) -> Tensor:
    """Right-hand sides [..., 3] of the flows [..., 3, 10] at x [..., 3]."""
    one_and_x = torch.cat([torch.ones_like(x[..., :1]), x], -1)
    left, right = (constant(factors, torch.int64, x.device) for factors in (LEFT, RIGHT))
    monomials = one_and_x[..., left] * one_and_x[..., right]
    return (coefficients * monomials[..., None, :]).sum(-1)

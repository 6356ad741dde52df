"""Steady 2D Darcy flow, -div (a grad p) = forcing on the unit square with p = 0 on its edge.

The benchmark of the Fourier neural operator (Li et al., arXiv 2010.08895): forcing 1 and a coefficient that is 12 where a
Gaussian random field is positive and 4 elsewhere. Five-point finite volumes on nodes, edges included, with the arithmetic
mean of the coefficient on faces as in its generating code; solved by conjugate gradients, preconditioned with the inverse
Laplacian in the sine basis, so that the iterations depend on the contrast of a and not on the number of points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Simulation, SimulationConfig, trajectory_rng

COEFFICIENTS = ("piecewise", "lognormal")
MODES = 128  # cosine modes of the coefficient per axis, so that one seed is the same medium at every resolution
TOLERANCE = 1e-11
MOST_ITERATIONS = 2000


@dataclass
class Darcy2DConfig(SimulationConfig):
    """Data set of media and their pressures; see `SimulationConfig` for the rest.

    resolution: nodes per side, edges included (421 in the benchmark; 85, 141 and 211 are subsets of its nodes).
    coefficient: "piecewise" = `high` where psi >= 0, else `low`; or "lognormal" = exp psi.
    alpha, tau: psi is a sample of N(0, tau^(2 alpha - 2) (-lap + tau^2)^-alpha) with free edges and zero mean.
    forcing: the constant right side.
    """

    steady: ClassVar[bool] = True

    frames: int = 1
    resolution: int = 85
    coefficient: str = "piecewise"
    high: float = 12.0
    low: float = 4.0
    alpha: float = 2.0
    tau: float = 3.0
    forcing: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resolution < 5:
            raise ValueError(f"resolution={self.resolution}: must be at least 5")
        self.need_choice("coefficient", COEFFICIENTS)
        self.need_positive("high", "low", "tau", "forcing")


def neumann_field(resolution: int, alpha: float, tau: float, rng: np.random.Generator) -> np.ndarray:
    """psi at the nodes, [N, N] float64: a random sum of cosines, orthonormal on the unit square."""
    noise = rng.standard_normal((MODES, MODES))
    m = min(MODES, resolution - 1)
    k = np.arange(m)
    scale = tau ** (alpha - 1) * (math.pi**2 * (k[:, None] ** 2 + k**2) + tau**2) ** (-alpha / 2)
    scale[0, 0] = 0.0
    basis = np.cos(math.pi * np.linspace(0, 1, resolution)[:, None] * k) * np.where(k > 0, math.sqrt(2), 1.0)
    return np.asarray(basis @ (scale * noise[:m, :m]) @ basis.T)


class DarcySolver:
    """Solves for pressures in media a [B, N, N] given at the nodes, edges included."""

    def __init__(self, a: Tensor) -> None:
        n = a.shape[-1]
        self.h = 1.0 / (n - 1)
        self.across = 0.5 * (a[:, 1:, 1:-1] + a[:, :-1, 1:-1])  # faces between neighbours in x, [B, N-1, N-2]
        self.along = 0.5 * (a[:, 1:-1, 1:] + a[:, 1:-1, :-1])
        j = torch.arange(1, n - 1, dtype=torch.float64, device=a.device)
        self.sines = math.sqrt(2 * self.h) * torch.sin(math.pi * self.h * j[:, None] * j)  # symmetric and orthogonal
        eigenvalue = 4 * torch.sin(0.5 * math.pi * self.h * j).square() / self.h**2
        self.inverse = 1 / (eigenvalue[:, None] + eigenvalue)

    def apply(self, p: Tensor) -> Tensor:
        """-div (a grad p) of interior values [B, N-2, N-2]."""
        whole = torch.nn.functional.pad(p, (1, 1, 1, 1))
        x = self.across * (whole[:, 1:, 1:-1] - whole[:, :-1, 1:-1])
        y = self.along * (whole[:, 1:-1, 1:] - whole[:, 1:-1, :-1])
        return ((x[:, :-1] - x[:, 1:]) + (y[:, :, :-1] - y[:, :, 1:])) / self.h**2

    def precondition(self, r: Tensor) -> Tensor:
        """The inverse of the five-point Laplacian."""
        return self.sines @ (self.inverse * (self.sines @ r @ self.sines)) @ self.sines

    def solve(self, f: Tensor) -> Tensor:
        """Pressures [B, N, N] for right sides f [B, N, N]; ValueError if the iterations do not converge.

        Each system stops on its own, so that it does not depend on the others of the batch.
        """

        def dot(u: Tensor, v: Tensor) -> Tensor:
            return (u * v).sum((1, 2), keepdim=True)

        r = f[:, 1:-1, 1:-1].clone()
        p, z = torch.zeros_like(r), self.precondition(r)
        direction, rz = z, dot(r, z)
        goal = TOLERANCE**2 * dot(r, r)
        for _ in range(MOST_ITERATIONS):
            going = ~(dot(r, r) <= goal)  # also when it is nan
            if not going.any():
                return torch.nn.functional.pad(p, (1, 1, 1, 1))
            q = self.apply(direction)
            step = torch.where(going, rz / dot(direction, q), 0.0)
            p, r = p + step * direction, r - step * q
            z = self.precondition(r)
            rz, before = torch.where(going, dot(r, z), rz), rz
            direction = torch.where(going, z + rz / before * direction, direction)
        raise ValueError(
            f"coefficient: the pressure did not converge in {MOST_ITERATIONS} iterations; lower the contrast of the medium"
        )


class Darcy2D(Simulation):
    """Generator of `fields` [trajectory, 1, 2, x, y]: the coefficient (input) and the pressure (output)."""

    config_class: ClassVar[type[SimulationConfig]] = Darcy2DConfig
    channels = ("coefficient", "pressure")

    def coordinates(self) -> dict[str, np.ndarray]:
        points = np.linspace(0, 1, self.config.resolution)
        return {"x": points, "y": points}

    def description(self) -> dict[str, Any]:
        c = self.config
        values = {"high": c.high, "low": c.low} if c.coefficient == "piecewise" else {}
        return {
            "equation": "-div (coefficient grad pressure) = forcing",
            "parameters": {"forcing": c.forcing, "coefficient": c.coefficient, **values},
            "inputs": ["coefficient"],
            "outputs": ["pressure"],
            "units": {"length": "square side", "coefficient": "1", "pressure": "forcing length^2/coefficient"},
            "domain": {"x": [0.0, 1.0], "y": [0.0, 1.0]},
            "boundary_conditions": {"x": "pressure = 0", "y": "pressure = 0"},
            "solver": {"scheme": "5-point finite volumes", "tolerance": TOLERANCE, "precision": "float64"},
        }

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        fields = [neumann_field(c.resolution, c.alpha, c.tau, trajectory_rng(seed, "coefficient")) for seed in seeds]
        psi = torch.from_numpy(np.stack(fields)).to(self.device)
        a = torch.where(psi >= 0, c.high, c.low).double() if c.coefficient == "piecewise" else psi.exp()
        return torch.stack([a, DarcySolver(a).solve(torch.full_like(a, c.forcing))], 1)[:, None]

    def unstable(self) -> str:
        return f"alpha={self.config.alpha}, tau={self.config.tau}"

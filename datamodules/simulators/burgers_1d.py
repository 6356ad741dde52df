"""1D viscous Burgers equation u_t + (u^2 / 2)_x = viscosity u_xx on the periodic unit interval.

The defaults are the benchmark of the Fourier neural operator (Li et al., arXiv 2010.08895): viscosity 0.1, Gaussian
random initial state, two frames, u(0) and u(1). Spectral in space, ETDRK4 in time, viscosity exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .convection_1d import ConvectionSolver, angular_wavenumbers
from .fields import Law, Simulation, SimulationConfig, whole_steps
from .random_fields import gaussian_random_line


@dataclass
class Burgers1DConfig(SimulationConfig):
    """Data set of Burgers trajectories; see `SimulationConfig` for the rest.

    resolution: points saved, at regular distances among the solver_resolution points solved for (0: the same).
    viscosity: range, drawn uniformly in its logarithm. dt: time step.
    alpha, tau, sigma: spectrum of the initial state, see `gaussian_random_line`.
    """

    drawn: ClassVar[dict[str, Law]] = {"viscosity": "log"}

    frames: int = 2
    resolution: int = 1024
    solver_resolution: int = 0
    viscosity: list[float] = field(default_factory=lambda: [0.1, 0.1])
    dt: float = 5e-3
    alpha: float = 2.0
    tau: float = 5.0
    sigma: float = 25.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_even("resolution")
        if self.solver_resolution % self.resolution:
            raise ValueError(
                f"solver_resolution={self.solver_resolution}: must be a multiple of resolution={self.resolution}, or 0"
            )
        self.need_positive("viscosity", "dt", "tau", "sigma")
        self.need_whole("dt_save", self.dt)


def burgers_solver(resolution: int, viscosity: Tensor, dt: float) -> ConvectionSolver:
    """Solver for viscosities [B, 1] on the unit interval."""
    k = angular_wavenumbers(resolution, 1.0, viscosity.device)
    return ConvectionSolver(resolution, 1.0, -viscosity * k.square(), 0.5, dt)


class Burgers1D(Simulation):
    """Generator; `viscosity` [trajectory] beside `fields` [trajectory, time, 1, x]."""

    config_class: ClassVar[type[SimulationConfig]] = Burgers1DConfig
    channels = ("u",)

    def coordinates(self) -> dict[str, np.ndarray]:
        return {"x": np.arange(self.config.resolution) / self.config.resolution}

    def description(self) -> dict[str, Any]:
        c = self.config
        return {
            "equation": "u_t + (u^2 / 2)_x = viscosity u_xx",
            "parameters": {},
            "units": {"length": "interval", "time": "1", "u": "interval/time", "viscosity": "interval^2/time"},
            "domain": {"x": [0.0, 1.0]},
            "boundary_conditions": {"x": "periodic"},
            "solver": {
                "dt": c.dt,
                "scheme": "etdrk4",
                "resolution": c.solver_resolution or c.resolution,
                "precision": "float64",
            },
        }

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        n = c.solver_resolution or c.resolution
        u0 = torch.stack([gaussian_random_line(n, c.alpha, c.tau, c.sigma, seed) for seed in seeds])
        solver = burgers_solver(n, self.drawn("viscosity", seeds, 1), c.dt)
        fields = solver.run(u0.to(self.device), 0, whole_steps(c.dt_save, c.dt) or 0, c.frames)
        return fields[:, :, None, :: n // c.resolution]

"""1D Kuramoto-Sivashinsky equation u_t + u u_x + u_xx + u_xxxx = 0 on a periodic interval: spatio-temporal chaos.

Length 64 pi is that of the Markov neural operator's benchmark (Li et al., arXiv 2106.06898); the largest Lyapunov exponent
is about 0.1. Spectral in space with the 2/3 rule, ETDRK4 in time (Kassam and Trefethen 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .convection_1d import ConvectionSolver, angular_wavenumbers
from .fields import Simulation, SimulationConfig, trajectory_rng, whole_steps
from .random_fields import random_sines


@dataclass
class KuramotoSivashinsky1DConfig(SimulationConfig):
    """Data set of Kuramoto-Sivashinsky trajectories; see `SimulationConfig` for the rest.

    resolution: points. length: of the interval; the number of unstable modes is length / (2 pi).
    dt: time step. burn_in: time before the first frame, in which the attractor is reached.
    The initial state has zero mean (the mean is conserved): 20 sines, the shortest at the fastest growing wave length.
    """

    frames: int = 101
    resolution: int = 256
    length: float = 64 * math.pi
    dt: float = 0.25
    burn_in: float = 150.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_even("resolution")
        self.need_positive("length", "dt")
        self.need_whole("dt_save", self.dt)
        self.need_whole("burn_in", self.dt)


def kuramoto_sivashinsky_solver(
    resolution: int, length: float, dt: float, device: torch.device | None = None
) -> ConvectionSolver:
    """Solver for the equation above."""
    k = angular_wavenumbers(resolution, length, device)
    return ConvectionSolver(resolution, length, k.square() - k**4, 0.5, dt)


class KuramotoSivashinsky1D(Simulation):
    """Generator of `fields` [trajectory, time, 1, x]."""

    config_class: ClassVar[type[SimulationConfig]] = KuramotoSivashinsky1DConfig
    channels = ("u",)

    def coordinates(self) -> dict[str, np.ndarray]:
        c = self.config
        return {"x": c.length / c.resolution * np.arange(c.resolution)}

    def times(self) -> np.ndarray:
        return self.config.burn_in + super().times()

    def description(self) -> dict[str, Any]:
        c = self.config
        return {
            "equation": "u_t + u u_x + u_xx + u_xxxx = 0",
            "parameters": {"length": c.length},
            "units": {"length": "1", "time": "1", "u": "length/time"},
            "domain": {"x": [0.0, c.length]},
            "boundary_conditions": {"x": "periodic"},
            "solver": {"dt": c.dt, "scheme": "etdrk4", "precision": "float64"},
        }

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        fastest = max(1, round(c.length / (2 * math.pi) / math.sqrt(2)))  # k = 1 / sqrt(2) grows fastest
        modes = min(fastest, (c.resolution - 1) // 3)
        u0 = torch.stack([random_sines(c.resolution, 20, modes, trajectory_rng(seed, "initial")) for seed in seeds])
        solver = kuramoto_sivashinsky_solver(c.resolution, c.length, c.dt, self.device)
        first, every = (whole_steps(interval, c.dt) or 0 for interval in (c.burn_in, c.dt_save))
        return solver.run(u0.to(self.device), first, every, c.frames)[:, :, None]

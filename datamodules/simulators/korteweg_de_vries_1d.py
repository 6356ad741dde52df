"""1D Korteweg-de Vries equation u_t + convection u u_x + u_xxx = 0 on a periodic interval: dispersion and solitons.

With convection 1, length 128 and 10 sines of wave numbers 1 to 3 the set-up of Brandstetter et al., arXiv 2202.07643;
convection 6 is the canonical form. Spectral in space with the 2/3 rule, ETDRK4 in time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .convection_1d import ConvectionSolver, angular_wavenumbers
from .fields import Law, Simulation, SimulationConfig, trajectory_rng, whole_steps
from .random_fields import random_sines


@dataclass
class KortewegDeVries1DConfig(SimulationConfig):
    """Data set of Korteweg-de Vries trajectories; see `SimulationConfig` for the rest.

    resolution: points. length: of the interval. convection: range of its factor. dt: time step.
    terms, modes: sines in the initial state and their highest wave number.
    """

    drawn: ClassVar[dict[str, Law]] = {"convection": "uniform"}

    frames: int = 141
    resolution: int = 256
    length: float = 128.0
    convection: list[float] = field(default_factory=lambda: [1.0, 1.0])
    dt: float = 0.05
    terms: int = 10
    modes: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_even("resolution")
        self.need_positive("length", "dt", "terms", "modes")
        self.need_whole("dt_save", self.dt)
        if self.modes > (self.resolution - 1) // 3:
            raise ValueError(
                f"modes={self.modes}: {self.resolution} points keep at most {(self.resolution - 1) // 3} by the 2/3 rule"
            )


def korteweg_de_vries_solver(resolution: int, length: float, convection: Tensor, dt: float) -> ConvectionSolver:
    """Solver for factors of convection [B, 1]."""
    k = angular_wavenumbers(resolution, length, convection.device)
    return ConvectionSolver(resolution, length, 1j * k**3, 0.5 * convection, dt)


class KortewegDeVries1D(Simulation):
    """Generator; `convection` [trajectory] beside `fields` [trajectory, time, 1, x]."""

    config_class: ClassVar[type[SimulationConfig]] = KortewegDeVries1DConfig
    channels = ("u",)

    def coordinates(self) -> dict[str, np.ndarray]:
        c = self.config
        return {"x": c.length / c.resolution * np.arange(c.resolution)}

    def description(self) -> dict[str, Any]:
        c = self.config
        return {
            "equation": "u_t + convection u u_x + u_xxx = 0",
            "parameters": {"length": c.length},
            "units": {"length": "1", "time": "1", "u": "1", "convection": "1"},
            "domain": {"x": [0.0, c.length]},
            "boundary_conditions": {"x": "periodic"},
            "solver": {"dt": c.dt, "scheme": "etdrk4", "precision": "float64"},
        }

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        u0 = torch.stack([random_sines(c.resolution, c.terms, c.modes, trajectory_rng(s, "initial")) for s in seeds])
        solver = korteweg_de_vries_solver(c.resolution, c.length, self.drawn("convection", seeds, 1), c.dt)
        return solver.run(u0.to(self.device), 0, whole_steps(c.dt_save, c.dt) or 0, c.frames)[:, :, None]

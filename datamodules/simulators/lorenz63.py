"""The Lorenz system (J. Atmos. Sci. 20, 1963).

    x' = sigma (y - x),    y' = x (rho - z) - y,    z' = x y - beta z

At sigma = 10, rho = 28, beta = 8/3 the largest Lyapunov exponent is 0.9056 per unit of time (Sprott, Chaos and Time-Series
Analysis, 2003).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law, SimulationConfig
from .trajectories import Ode, OdeConfig


@dataclass
class Lorenz63Config(OdeConfig):
    """Data set of Lorenz trajectories; see `OdeConfig` for the rest. sigma, rho, beta: ranges."""

    drawn: ClassVar[dict[str, Law]] = {"sigma": "uniform", "rho": "uniform", "beta": "uniform"}

    dt_save: float = 0.02
    sigma: list[float] = field(default_factory=lambda: [10.0, 10.0])
    rho: list[float] = field(default_factory=lambda: [28.0, 28.0])
    beta: list[float] = field(default_factory=lambda: [8 / 3, 8 / 3])


class Lorenz63(Ode):
    """Generator; the initial state is normal around (0, 0, 25)."""

    config_class: ClassVar[type[SimulationConfig]] = Lorenz63Config
    equation = "x' = sigma (y - x); y' = x (rho - z) - y; z' = x y - beta z"

    def components(self) -> tuple[str, ...]:
        return ("x", "y", "z")

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        return np.array([0.0, 0.0, 25.0]) + 5.0 * rng.standard_normal(3)

    def rhs(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        x, y, z = x.unbind(-1)
        return torch.stack([p["sigma"] * (y - x), x * (p["rho"] - z) - y, x * y - p["beta"] * z], -1)

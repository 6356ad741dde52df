"""The Rossler system (Phys. Lett. A 57, 1976).

    x' = -y - z,    y' = x + a y,    z' = b + z (x - c)

At a = b = 0.2, c = 5.7 the largest Lyapunov exponent is 0.0714 per unit of time (Sprott, Chaos and Time-Series Analysis,
2003).
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
class RosslerConfig(OdeConfig):
    """Data set of Rossler trajectories; see `OdeConfig` for the rest. a, b, c: ranges."""

    drawn: ClassVar[dict[str, Law]] = {"a": "uniform", "b": "uniform", "c": "uniform"}

    dt_save: float = 0.1
    burn_in: float = 100.0
    dt: float = 0.02
    a: list[float] = field(default_factory=lambda: [0.2, 0.2])
    b: list[float] = field(default_factory=lambda: [0.2, 0.2])
    c: list[float] = field(default_factory=lambda: [5.7, 5.7])


class Rossler(Ode):
    """Generator; the initial state is normal around the origin, which is in the basin of the attractor."""

    config_class: ClassVar[type[SimulationConfig]] = RosslerConfig
    equation = "x' = -y - z; y' = x + a y; z' = b + z (x - c)"

    def components(self) -> tuple[str, ...]:
        return ("x", "y", "z")

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        return rng.standard_normal(3)

    def rhs(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        x, y, z = x.unbind(-1)
        return torch.stack([-y - z, x + p["a"] * y, p["b"] + z * (x - p["c"])], -1)

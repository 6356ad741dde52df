"""The planar double pendulum: two point masses on massless rods, without friction.

Angles are measured from the downward vertical. With d = theta1 - theta2, M = m1 + m2 and D = m1 + m2 sin^2 d

    theta1'' = (-g M sin theta1 - m2 sin d (l2 omega2^2 + l1 omega1^2 cos d) + m2 g cos d sin theta2) / (l1 D)
    theta2'' = (M (g (sin theta1 cos d - sin theta2) + l1 omega1^2 sin d) + m2 l2 omega2^2 sin d cos d) / (l2 D)

which are the Euler-Lagrange equations; the energy is conserved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law, SimulationConfig
from .trajectories import Ode, OdeConfig

FORMS = ("angles", "circle")


@dataclass
class DoublePendulumConfig(OdeConfig):
    """Data set of double pendulum trajectories in SI units; see `OdeConfig` for the rest.

    mass1, mass2, length1, length2: ranges, kg and m. gravity: m/s^2.
    swing: initial angles are uniform within +-swing (rad), at rest.
    form: "angles" stores theta1, theta2 (not wrapped), omega1, omega2; "circle" stores the cosine and sine of the angles.
    """

    drawn: ClassVar[dict[str, Law]] = {
        "mass1": "uniform", "mass2": "uniform", "length1": "uniform", "length2": "uniform",
    }  # fmt: skip

    dt_save: float = 0.05
    burn_in: float = 0.0
    dt: float = 0.005
    mass1: list[float] = field(default_factory=lambda: [1.0, 1.0])
    mass2: list[float] = field(default_factory=lambda: [1.0, 1.0])
    length1: list[float] = field(default_factory=lambda: [1.0, 1.0])
    length2: list[float] = field(default_factory=lambda: [1.0, 1.0])
    gravity: float = 9.81
    swing: float = math.pi
    form: str = "circle"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_positive("mass1", "mass2", "length1", "length2", "swing")
        self.need_choice("form", FORMS)


class DoublePendulum(Ode):
    """Generator; the state is (theta1, theta2, omega1, omega2)."""

    config_class: ClassVar[type[SimulationConfig]] = DoublePendulumConfig
    equation = "Euler-Lagrange equations of L = T - V, see `DoublePendulum.energy`"
    units: ClassVar[dict[str, str]] = {"time": "s", "theta": "rad", "omega": "rad/s", "mass": "kg", "length": "m"}

    def components(self) -> tuple[str, ...]:
        if self.config.form == "angles":
            return ("theta1", "theta2", "omega1", "omega2")
        return ("cos1", "sin1", "cos2", "sin2", "omega1", "omega2")

    def fixed(self) -> dict[str, Any]:
        return {"gravity": self.config.gravity}

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        return np.concatenate([self.config.swing * rng.uniform(-1, 1, 2), np.zeros(2)])

    def rhs(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        angle1, angle2, omega1, omega2 = x.unbind(-1)
        m1, m2, l1, l2, g = p["mass1"], p["mass2"], p["length1"], p["length2"], self.config.gravity
        sine, cosine, total = torch.sin(angle1 - angle2), torch.cos(angle1 - angle2), m1 + m2
        denominator = m1 + m2 * sine.square()
        pull1, pull2 = l1 * omega1.square(), l2 * omega2.square()
        sine1, sine2 = torch.sin(angle1), torch.sin(angle2)
        first = -g * total * sine1 - m2 * sine * (pull2 + pull1 * cosine) + m2 * g * cosine * sine2
        second = total * (g * (sine1 * cosine - sine2) + pull1 * sine) + m2 * pull2 * sine * cosine
        return torch.stack([omega1, omega2, first / (l1 * denominator), second / (l2 * denominator)], -1)

    def energy(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """Kinetic plus potential energy of states [..., 4], J; 0 for masses at rest at the height of the pivot."""
        angle1, angle2, omega1, omega2 = x.unbind(-1)
        m1, m2, l1, l2, g = p["mass1"], p["mass2"], p["length1"], p["length2"], self.config.gravity
        speed1, speed2 = l1 * omega1, l2 * omega2
        moving = 0.5 * (m1 + m2) * speed1.square() + 0.5 * m2 * speed2.square()
        moving = moving + m2 * speed1 * speed2 * torch.cos(angle1 - angle2)
        return moving - (m1 + m2) * g * l1 * torch.cos(angle1) - m2 * g * l2 * torch.cos(angle2)

    def observe(self, x: Tensor) -> Tensor:
        if self.config.form == "angles":
            return x
        angle1, angle2 = x[..., 0], x[..., 1]
        circle = torch.stack([angle1.cos(), angle1.sin(), angle2.cos(), angle2.sin()], -1)
        return torch.cat([circle, x[..., 2:]], -1)

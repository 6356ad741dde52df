"""1D linear advection u_t + speed u_x = 0 on the periodic unit interval, solved exactly: u(t, x) = u0(x - speed t)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .convection_1d import angular_wavenumbers
from .fields import Law, Simulation, SimulationConfig, trajectory_rng
from .random_fields import random_sines


@dataclass
class Advection1DConfig(SimulationConfig):
    """Data set of advected sums of sines; see `SimulationConfig` for the rest.

    resolution: points. speed: range of speeds, in lengths of the interval per unit of time.
    terms, modes: sines in the initial state and their highest wave number.
    """

    drawn: ClassVar[dict[str, Law]] = {"speed": "uniform"}

    dt_save: float = 0.05
    resolution: int = 128
    speed: list[float] = field(default_factory=lambda: [0.1, 1.0])
    terms: int = 5
    modes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_even("resolution")
        self.need_positive("terms", "modes")
        if self.modes >= self.resolution // 2:
            raise ValueError(f"modes={self.modes}: {self.resolution} points resolve fewer than {self.resolution // 2}")


def shifted(u0: Tensor, distance: Tensor) -> Tensor:
    """Periodic functions on the unit interval moved to the right: [B, N] by [B, T] -> [B, T, N].

    Exact for the trigonometric polynomial through the points; the mode N/2 must be absent.
    """
    n = u0.shape[-1]
    phase = torch.exp(-1j * distance[..., None] * angular_wavenumbers(n, 1.0, u0.device))
    return torch.fft.irfft(torch.fft.rfft(u0)[:, None] * phase, n=n)


class Advection1D(Simulation):
    """Generator of exact solutions; `speed` [trajectory] beside `fields` [trajectory, time, 1, x]."""

    config_class: ClassVar[type[SimulationConfig]] = Advection1DConfig
    channels = ("u",)

    def coordinates(self) -> dict[str, np.ndarray]:
        return {"x": np.arange(self.config.resolution) / self.config.resolution}

    def description(self) -> dict[str, Any]:
        return {
            "equation": "u_t + speed u_x = 0",
            "parameters": {},
            "units": {"length": "interval", "time": "1", "u": "1", "speed": "interval/time"},
            "domain": {"x": [0.0, 1.0]},
            "boundary_conditions": {"x": "periodic"},
            "solver": {"scheme": "exact", "precision": "float64"},
        }

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        u0 = torch.stack([random_sines(c.resolution, c.terms, c.modes, trajectory_rng(s, "initial")) for s in seeds])
        times = torch.from_numpy(self.times()).to(self.device)
        return shifted(u0.to(self.device), self.drawn("speed", seeds, 1) * times)[:, :, None]

    def unstable(self) -> str:
        return f"speed={self.config.speed}"

"""2D lambda-omega reaction and diffusion on a periodic square: rotating spirals.

    u_t = D_u lap u + u (1 - r^2) + beta r^2 v,    v_t = D_v lap v + v (1 - r^2) - beta r^2 u,    r^2 = u^2 + v^2

The spirals of Champion et al. (arXiv 1904.02107) have D = 0.1, beta = 1, length 20; unequal D on a larger square
(0.03 and 0.2, beta = 0.65, length 50) lets many of them compete. With equal D, plane waves A e^(i (k x - beta A^2 t)) with
A^2 = 1 - D k^2 solve the equations. Spectral in space, ETDRK4 in time, diffusion exact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .convection_1d import angular_wavenumbers
from .etdrk4 import ETDRK4
from .fields import Law, Simulation, SimulationConfig, trajectory_rng, whole_steps
from .random_fields import gaussian_random_field


@dataclass
class ReactionDiffusion2DConfig(SimulationConfig):
    """Data set of spirals; see `SimulationConfig` for the rest.

    resolution: points per side. length: of a side.
    diffusion_u, diffusion_v: ranges, drawn uniformly in the logarithm. beta: range of the frequency.
    arms: range of the whole number of arms of the initial spiral.
    offset: its centre lies at most this share of a side from the middle. noise: standard deviation of a smooth random field
    that is added to it.
    dt: time step; burn_in: time before the first frame.
    """

    drawn: ClassVar[dict[str, Law]] = {
        "diffusion_u": "log",
        "diffusion_v": "log",
        "beta": "uniform",
        "arms": "integer",
    }

    dt_save: float = 0.5
    batch: int = 8
    resolution: int = 128
    length: float = 20.0
    diffusion_u: list[float] = field(default_factory=lambda: [0.1, 0.1])
    diffusion_v: list[float] = field(default_factory=lambda: [0.1, 0.1])
    beta: list[float] = field(default_factory=lambda: [1.0, 1.0])
    arms: list[int] = field(default_factory=lambda: [1, 3])
    offset: float = 0.2
    noise: float = 0.1
    dt: float = 0.05
    burn_in: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_even("resolution")
        self.need_positive("length", "dt", "arms")
        if self.offset < 0 or self.noise < 0:
            raise ValueError(f"offset={self.offset}, noise={self.noise}: must be >= 0")
        self.need_whole("dt_save", self.dt)
        self.need_whole("burn_in", self.dt)


class SpiralSolver:
    """Time stepping of (u, v) [B, 2, N, N] with diffusion [B, 2, 1, 1] and beta [B, 1, 1]."""

    def __init__(self, resolution: int, length: float, diffusion: Tensor, beta: Tensor, dt: float) -> None:
        self.resolution, self.beta = resolution, beta
        k_y = angular_wavenumbers(resolution, length, diffusion.device)
        k_x = torch.cat([k_y, k_y[1:-1].flip(0)])  # only squares of them matter
        self.stepper = ETDRK4(-diffusion * (k_x[:, None].square() + k_y.square()), self._react, dt)

    def _react(self, modes: Tensor) -> Tensor:
        u, v = self.field(modes).unbind(1)
        r2 = u.square() + v.square()
        return torch.fft.rfft2(torch.stack([u * (1 - r2) + self.beta * r2 * v, v * (1 - r2) - self.beta * r2 * u], 1))

    def field(self, modes: Tensor) -> Tensor:
        """Modes -> (u, v)."""
        return torch.fft.irfft2(modes, s=(self.resolution, self.resolution))

    def run(self, state: Tensor, first: int, every: int, frames: int) -> Tensor:
        """Frames [B, frames, 2, N, N]: the first after `first` steps, then one each `every` steps."""
        states = self.stepper.frames(torch.fft.rfft2(state), first, every, frames)
        return torch.stack([self.field(modes) for modes in states], 1)


class ReactionDiffusion2D(Simulation):
    """Generator; `diffusion_u`, `diffusion_v`, `beta`, `arms` [trajectory] beside `fields` [trajectory, time, 2, x, y]."""

    config_class: ClassVar[type[SimulationConfig]] = ReactionDiffusion2DConfig
    channels = ("u", "v")

    def coordinates(self) -> dict[str, np.ndarray]:
        c = self.config
        points = c.length * (np.arange(c.resolution) / c.resolution - 0.5)
        return {"x": points, "y": points}

    def times(self) -> np.ndarray:
        return self.config.burn_in + super().times()

    def description(self) -> dict[str, Any]:
        c = self.config
        return {
            "equation": "u_t = diffusion_u lap u + u (1 - r^2) + beta r^2 v; "
            "v_t = diffusion_v lap v + v (1 - r^2) - beta r^2 u; r^2 = u^2 + v^2",
            "parameters": {"length": c.length, "offset": c.offset, "noise": c.noise},
            "units": {"length": "1", "time": "1", "u": "1", "v": "1", "diffusion": "length^2/time", "beta": "1/time"},
            "domain": {"x": [-c.length / 2, c.length / 2], "y": [-c.length / 2, c.length / 2]},
            "boundary_conditions": {"x": "periodic", "y": "periodic"},
            "solver": {"dt": c.dt, "scheme": "etdrk4", "precision": "float64"},
        }

    def _spiral(self, seed: int) -> Tensor:
        """tanh r cos (arms theta - r) and tanh r sin (arms theta - r) around a random centre, and noise, [2, N, N]."""
        c, rng = self.config, trajectory_rng(seed, "initial")
        angle, *centre = rng.uniform(-1, 1, 3)
        points = self.coordinates()["x"]
        x, y = ((p - c.offset * c.length * at) for p, at in zip((points[:, None], points[None]), centre, strict=True))
        x, y = (p - c.length * np.round(p / c.length) for p in (x, y))
        r, theta = np.hypot(x, y), np.arctan2(y, x) + np.pi * angle
        phase = self.draw("arms", seed) * theta - r
        state = torch.from_numpy(np.stack([np.tanh(r) * np.cos(phase), np.tanh(r) * np.sin(phase)]))
        if c.noise:
            for component in state:
                rough = gaussian_random_field(c.resolution, 3.5, 20.0, int(rng.integers(2**62)))
                component += c.noise / rough.std() * rough
        return state

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        diffusion = torch.stack([self.drawn(name, seeds, 2) for name in ("diffusion_u", "diffusion_v")], 1)
        solver = SpiralSolver(c.resolution, c.length, diffusion, self.drawn("beta", seeds, 2), c.dt)
        first, every = (whole_steps(interval, c.dt) or 0 for interval in (c.burn_in, c.dt_save))
        state = torch.stack([self._spiral(seed) for seed in seeds]).to(self.device)
        return solver.run(state, first, every, c.frames)

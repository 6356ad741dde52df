"""1D wave equation with a variable speed, u_tt = speed(x)^2 u_xx, as u_t = v, v_t = speed^2 u_xx.

The energy, the mean of (v^2 / speed^2 + u_x^2) / 2, is conserved. Spectral in space; in time the fourth-order symplectic
composition of leapfrog steps (Yoshida, Phys. Lett. A 150, 1990), so that the error of the energy stays bounded. Fixed and
free ends are the odd and the even periodic extension to twice the length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .convection_1d import angular_wavenumbers
from .fields import Simulation, SimulationConfig, trajectory_rng, whole_steps

BOUNDARIES = ("periodic", "fixed", "free")
STABLE = 1.57  # highest frequency times dt at which the composition is stable; the leapfrog step alone has 2
_SIDE = 1 / (2 - 2 ** (1 / 3))
WEIGHTS = (_SIDE, 1 - 2 * _SIDE, _SIDE)


@dataclass
class Wave1DConfig(SimulationConfig):
    """Data set of waves, each in a medium of its own; see `SimulationConfig` for the rest.

    resolution: points. length: of the interval.
    boundary: "periodic", "fixed" (u = 0 at both ends) or "free" (u_x = 0).
    mean_speed, contrast: log(speed / mean_speed) is a random sum of `modes` cosines scaled to the range of +-contrast.
    width: of the initial Gaussian pulse, which begins at a random place and, where speed is constant, moves one way.
    dt: time step.
    """

    frames: int = 41
    dt_save: float = 0.25
    resolution: int = 256
    length: float = 16.0
    boundary: str = "periodic"
    mean_speed: float = 2.0
    contrast: float = 0.4
    modes: int = 6
    width: float = 0.8
    dt: float = 0.00625

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_even("resolution")
        self.need_choice("boundary", BOUNDARIES)
        self.need_positive("length", "mean_speed", "modes", "width", "dt")
        if self.contrast < 0:
            raise ValueError(f"contrast={self.contrast}: must be >= 0; 0 is a constant speed")
        self.need_whole("dt_save", self.dt)
        highest = self.mean_speed * math.exp(self.contrast) * math.pi * self.resolution / self.length
        if self.dt * highest > STABLE:
            raise ValueError(
                f"dt={self.dt}: unstable on this grid with these speeds; use at most {STABLE / highest:.3g}"
            )


class WaveSolver:
    """Waves u, v [B, N] at the centres of N cells, in media of speed [B, N]."""

    def __init__(self, speed: Tensor, length: float, boundary: str, dt: float) -> None:
        self.resolution, self.boundary, self.dt = speed.shape[-1], boundary, dt
        self.squared = self._extended(speed, 1).square()
        points = self.squared.shape[-1]
        self.k = angular_wavenumbers(points, length * points / self.resolution, speed.device)

    def _extended(self, u: Tensor, sign: int) -> Tensor:
        return u if self.boundary == "periodic" else torch.cat([u, sign * u.flip(-1)], -1)

    def _derivative(self, u: Tensor, factor: Tensor) -> Tensor:
        return torch.fft.irfft(factor * torch.fft.rfft(u), n=u.shape[-1])

    def run(self, u: Tensor, v: Tensor, every: int, frames: int) -> Tensor:
        """Frames [B, frames, 2, N] of (u, v), the first at the start, then one each `every` steps."""
        sign = -1 if self.boundary == "fixed" else 1
        u, v = self._extended(u, sign), self._extended(v, sign)
        out = []
        for frame in range(frames):
            for _ in range(every if frame else 0):
                for weight in WEIGHTS:
                    h = weight * self.dt
                    u = u + 0.5 * h * v
                    v = v + h * self.squared * self._derivative(u, -self.k.square())
                    u = u + 0.5 * h * v
            out.append(torch.stack([u, v], 1)[..., : self.resolution])
        return torch.stack(out, 1)

    def energy(self, state: Tensor) -> Tensor:
        """Mean of (v^2 / speed^2 + u_x^2) / 2 of states [B, T, 2, N], [B, T]."""
        sign = -1 if self.boundary == "fixed" else 1
        u, v = (self._extended(part, sign) for part in state.unbind(2))
        # The mode N/2 counts as in -u_xx, whose form this is.
        modes = torch.fft.rfft(u, norm="forward").abs().square() * self.k.square()
        twice = torch.full_like(self.k, 2.0)
        twice[0] = twice[-1] = 1.0
        return 0.5 * ((v.square() / self.squared[:, None]).mean(-1) + (twice * modes).sum(-1))


class Wave1D(Simulation):
    """Generator; `speed` [trajectory, x] beside `fields` [trajectory, time, 2, x] of displacement and velocity."""

    config_class: ClassVar[type[SimulationConfig]] = Wave1DConfig
    channels = ("displacement", "velocity")
    static = ("speed",)

    def coordinates(self) -> dict[str, np.ndarray]:
        c = self.config
        return {"x": c.length / c.resolution * (np.arange(c.resolution) + 0.5)}

    def description(self) -> dict[str, Any]:
        c = self.config
        return {
            "equation": "u_tt = speed(x)^2 u_xx; velocity = u_t",
            "parameters": {"mean_speed": c.mean_speed, "contrast": c.contrast},
            "units": {"length": "1", "time": "1", "displacement": "1", "velocity": "1/time", "speed": "length/time"},
            "domain": {"x": [0.0, c.length]},
            "boundary_conditions": {"x": c.boundary},
            "solver": {"dt": c.dt, "scheme": "yoshida4", "precision": "float64"},
        }

    def static_field(self, name: str, seed: int) -> np.ndarray:
        c, rng = self.config, trajectory_rng(seed, "speed")
        mode = np.arange(1, c.modes + 1)
        amplitude, phase = rng.standard_normal(c.modes) / mode, rng.uniform(0, 2 * math.pi, c.modes)
        # Even about both ends where those reflect, so that the extension is smooth.
        turns, phase = (2 * math.pi, phase) if c.boundary == "periodic" else (math.pi, 0 * phase)
        x = self.coordinates()["x"][:, None] / c.length
        logarithm = (amplitude * np.cos(turns * mode * x + phase)).sum(-1)
        return np.asarray(c.mean_speed * np.exp(c.contrast * logarithm / np.abs(logarithm).max()))

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        speed = torch.from_numpy(np.stack([self.static_field("speed", seed) for seed in seeds]))
        states = [self._pulse(seed) for seed in seeds]
        u = torch.from_numpy(np.stack([u for u, _ in states]))
        v = torch.from_numpy(np.stack([slope for _, slope in states])) * speed
        solver = WaveSolver(speed.to(self.device), c.length, c.boundary, c.dt)
        return solver.run(u.to(self.device), v.to(self.device), whole_steps(c.dt_save, c.dt) or 0, c.frames)

    def _pulse(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """A Gaussian and -+ its slope: u, v / speed."""
        c, rng = self.config, trajectory_rng(seed, "pulse")
        place, sign = rng.uniform(0.25, 0.75) * c.length, rng.choice([-1.0, 1.0])
        away = self.coordinates()["x"] - place
        away -= c.length * np.round(away / c.length)
        u = np.exp(-np.square(away / c.width))
        return u, sign * 2 * away / c.width**2 * u

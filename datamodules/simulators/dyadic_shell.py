"""The stochastic dyadic shell model of turbulence: shells n = 0 ... N-1 of wave number k_n = k_0 lambda^n.

    dx_n = (c (k_(n-1)^beta x_(n-1)^2 - k_n^beta x_n x_(n+1)) - viscosity k_n^2 x_n) dt + noise,     x_(-1) = x_N = 0

The convection conserves the energy sum x_n^2 / 2 and carries it to high wave numbers. Two kinds of noise:

- additive, a dW_n on the first `forced` shells (viscous dyadic model with additive noise, arXiv 1712.05887). Ito and
  Stratonovich agree. In the mean d energy/dt = forced a^2 / 2 - viscosity sum k_n^2 x_n^2.
- transport, s (k_(n-1) x_(n-1) o dW_(n-1) - k_n x_(n+1) o dW_n), in the sense of Stratonovich: it conserves the energy of
  each path (Barbato, Flandoli and Morandin, Proc. AMS 138, 2010). As an Ito equation it has the further drift
  -s^2 (k_n^2 + k_(n-1)^2) x_n / 2.

Splitting, symmetric, weak order 2 in dt: half a step of viscosity and additive noise (Ornstein-Uhlenbeck, exact in law), half
of the transport noise (exact rotations of neighbouring shells), RK4 for convection, and back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law, SimulationConfig, trajectory_rng, whole_steps
from .integrators import constant, rk4_step
from .trajectories import Trajectories

DRAWS = 256  # steps whose noise is drawn at once


@dataclass
class DyadicShellConfig(SimulationConfig):
    """Data set of the dyadic shell model; see `SimulationConfig` for the rest.

    shells: N. ratio: lambda. k0: first wave number. beta: exponent of the convection; convection: c.
    viscosity, additive, transport: ranges of nu, a and s; 0 leaves the term out. forced: shells with additive noise.
    burn_in: time from rest to the first frame. dt: time step. start: standard deviation of the initial state, falling as
    k_n^(-beta/3) (Kolmogorov's law).
    """

    drawn: ClassVar[dict[str, Law]] = {"viscosity": "uniform", "additive": "uniform", "transport": "uniform"}

    frames: int = 256
    dt_save: float = 0.1
    burn_in: float = 10.0
    dt: float = 2.5e-3
    batch: int = 64
    shells: int = 12
    ratio: float = 2.0
    k0: float = 1.0
    beta: float = 1.0
    convection: float = 1.0
    viscosity: list[float] = field(default_factory=lambda: [1e-3, 1e-3])
    additive: list[float] = field(default_factory=lambda: [0.5, 0.5])
    transport: list[float] = field(default_factory=lambda: [0.0, 0.0])
    forced: int = 1
    start: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shells < 3:
            raise ValueError(f"shells={self.shells}: must be at least 3")
        if self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: must be greater than 1; 2 is usual")
        if not 0 <= self.forced <= self.shells:
            raise ValueError(f"forced={self.forced}: must be from 0 to shells={self.shells}")
        self.need_positive("dt", "k0")
        self.need_whole("dt_save", self.dt)
        self.need_whole("burn_in", self.dt)
        for name in ("viscosity", "additive", "transport"):
            if min(getattr(self, name)) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be >= 0")


class DyadicShell(Trajectories):
    """Generator; one Brownian motion per shell and trajectory, from the trajectory's own seed."""

    config_class: ClassVar[type[SimulationConfig]] = DyadicShellConfig
    equation = (
        "dx_n = (c (k_(n-1)^beta x_(n-1)^2 - k_n^beta x_n x_(n+1)) - viscosity k_n^2 x_n) dt + additive dW_n "
        "+ transport (k_(n-1) x_(n-1) o dW'_(n-1) - k_n x_(n+1) o dW'_n) [Stratonovich]"
    )

    def __init__(self, config: Any, seed: int, shard_bytes: int) -> None:
        self.wavenumbers = config.k0 * config.ratio ** np.arange(config.shells)
        self.rates = tuple((config.convection * self.wavenumbers[:-1] ** config.beta).tolist())  # of the convection
        super().__init__(config, seed, shard_bytes)

    def components(self) -> tuple[str, ...]:
        return tuple(f"x{n}" for n in range(self.config.shells))

    def fixed(self) -> dict[str, Any]:
        c = self.config
        return {"ratio": c.ratio, "k0": c.k0, "beta": c.beta, "c": c.convection, "forced": c.forced}

    def solver(self) -> dict[str, Any]:
        return {"scheme": "strang splitting, rk4", "dt": self.config.dt, "precision": "float64"}

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        c = self.config
        return c.start * (self.wavenumbers / c.k0) ** (-c.beta / 3) * rng.standard_normal(c.shells)

    def convection(self, x: Tensor) -> Tensor:
        """Transfer between shells, [..., N]; sum over n of x_n times it is 0."""
        k = constant(self.rates, x.dtype, x.device)
        low, high = k * x[..., :-1].square(), k * x[..., :-1] * x[..., 1:]
        zero = torch.zeros_like(x[..., :1])
        return torch.cat([zero, low], -1) - torch.cat([high, zero], -1)

    def noise(self, seeds: list[int]) -> Iterator[Tensor]:
        """Standard normal numbers of one step after another, [B, 4, N]: two halves of additive, two of transport noise."""
        rngs = [trajectory_rng(seed, "noise") for seed in seeds]
        while True:
            block = np.stack([rng.standard_normal((DRAWS, 4, self.config.shells)) for rng in rngs], 1)
            yield from torch.from_numpy(block).to(self.device)

    def steps(self, x: Tensor, p: dict[str, Tensor], seeds: list[int]) -> Iterator[Tensor]:
        """States [B, N] after 1, 2, ... steps."""
        c, half = self.config, 0.5 * self.config.dt
        k = torch.from_numpy(self.wavenumbers).to(x)
        rate = p["viscosity"][:, None] * k.square()
        decay = torch.exp(-half * rate)
        # Variance of the Ornstein-Uhlenbeck process after half a step; its limit without viscosity is `half`.
        spread = torch.where(rate > 0, -torch.expm1(-2 * half * rate) / (2 * rate).clamp_min(1e-300), half).sqrt()
        kick = p["additive"][:, None] * spread * (torch.arange(c.shells, device=x.device) < c.forced)
        turn = p["transport"][:, None] * k[:-1] * math.sqrt(half)
        turning = c.transport[1] > 0
        normals = self.noise(seeds) if turning or c.additive[1] > 0 else None
        still = torch.zeros(len(x), 4, c.shells, dtype=x.dtype, device=x.device)
        while True:
            z = next(normals) if normals is not None else still
            x = decay * x + kick * z[:, 0]
            if turning:
                x = rotate(x, turn * z[:, 2, 1:], reverse=False)
            x = rk4_step(self.convection, x, c.dt)
            if turning:
                x = rotate(x, turn * z[:, 3, 1:], reverse=True)
            x = decay * x + kick * z[:, 1]
            yield x

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        stepper = self.steps(self.initial_states(seeds), self.parameters(seeds), seeds)
        every, first = whole_steps(c.dt_save, c.dt) or 1, whole_steps(c.burn_in, c.dt) or 0
        out, x = [], self.initial_states(seeds)
        for frame in range(c.frames):
            for _ in range(first if frame == 0 else every):
                x = next(stepper)
            out.append(x)
        return torch.stack(out, 1)


def rotate(x: Tensor, angles: Tensor, reverse: bool) -> Tensor:
    """Rotate shells (n, n+1) of x [B, N] by angles [B, N-1], one pair after another: exact transport by one dW_n each."""
    columns = list(x.unbind(-1))
    cosine, sine = angles.cos().unbind(-1), angles.sin().unbind(-1)
    pairs = range(len(columns) - 1)
    for n in reversed(pairs) if reverse else pairs:
        low, high = columns[n], columns[n + 1]
        columns[n], columns[n + 1] = cosine[n] * low - sine[n] * high, sine[n] * low + cosine[n] * high
    return torch.stack(columns, -1)

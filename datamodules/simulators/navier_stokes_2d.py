"""2D incompressible Navier-Stokes in vorticity form on the periodic unit square.

    w_t + u . grad w = nu lap w + f,    u = (d_y psi, -d_x psi),    -lap psi = w

The set-up (domain, forcing, Gaussian random initial vorticity) is the benchmark of the Fourier neural operator (Li et
al., arXiv 2010.08895), or the Kolmogorov flow of the Markov neural operator (Li et al., arXiv 2106.06898), whose square
of side 2 pi is the unit square here: a Reynolds number Re there is `viscosity = 1 / (4 pi^2 Re)`. Pseudo-spectral in
space with the 2/3 rule, Crank-Nicolson for viscosity, explicit for convection. Legend of shapes: B trajectories, N points
per side, K = N/2+1 stored modes of the second axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law, Simulation, SimulationConfig, whole_steps
from .random_fields import gaussian_random_field, wavenumbers

FORCINGS = ("fno", "kolmogorov", "none")
KOLMOGOROV = 4  # waves of the forcing, and its amplitude
SCHEMES = ("euler", "ab2", "heun")


@dataclass
class NavierStokes2DConfig(SimulationConfig):
    """Data set of 2D Navier-Stokes trajectories; see `SimulationConfig` for the rest.

    resolution: points per side. viscosity: nu, with lengths in box sides and times in the unit of the forcing: a number for
    all trajectories, or a range, drawn uniformly in its logarithm.
    forcing: "fno" = 0.1 (sin 2 pi (x+y) + cos 2 pi (x+y)), "kolmogorov" = 4 cos 8 pi y, or "none": decaying turbulence.
    scheme: "euler" (that of the benchmark, first order; its dt is 1e-4), "ab2" or "heun" (second order).
    dt: time step; burn_in: time before the first frame.
    alpha, tau: spectrum of the initial vorticity, see `gaussian_random_field`.
    """

    resolution: int = 64
    viscosity: Any = 1e-3
    forcing: str = "fno"
    scheme: str = "ab2"
    dt: float = 1e-2
    burn_in: float = 0.0
    alpha: float = 2.5
    tau: float = 7.0
    batch: int = 8

    @property
    def drawn(self) -> dict[str, Law]:  # type: ignore[override]
        return {"viscosity": "log"} if isinstance(self.viscosity, list) else {}

    def __post_init__(self) -> None:
        given = self.viscosity if isinstance(self.viscosity, list) else [self.viscosity]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
            raise ValueError(f"viscosity={self.viscosity}: must be a number, or a range [low, high]")
        if not min(given, default=1) > 0:
            raise ValueError(f"viscosity={self.viscosity}: must be positive; the solver has no other dissipation")
        super().__post_init__()
        self.need_even("resolution")
        self.need_choice("forcing", FORCINGS)
        self.need_choice("scheme", SCHEMES)
        self.need_positive("dt")
        self.need_whole("dt_save", self.dt)
        self.need_whole("burn_in", self.dt)


class Solver:
    """Time stepping of a batch of vorticity fields in Fourier space, float64. `viscosity`: a number, or [B, 1, 1].

    The state is `w_hat` [B, N, K] complex: `rfft2` of the vorticity (no scaling), zero outside the 2/3 rule's modes.
    """

    def __init__(
        self,
        resolution: int,
        viscosity: float | Tensor,
        forcing: str,
        dt: float,
        scheme: str = "ab2",
        device: torch.device | None = None,
    ) -> None:
        n = self.resolution = resolution
        self.viscosity, self.dt, self.scheme = viscosity, dt, scheme
        kx, ky = (k.to(device) for k in wavenumbers(n))  # [N, 1], [1, K], integers
        self.mask = ((kx.abs() <= (n - 1) // 3) & (ky <= (n - 1) // 3)).double()
        kx, ky = 2 * math.pi * kx, 2 * math.pi * ky
        self.laplacian = kx**2 + ky**2  # of -lap
        inverse = torch.where(self.laplacian > 0, 1.0 / self.laplacian.clamp_min(1e-300), 0.0)
        self.to_velocity = torch.stack([1j * ky * inverse, -1j * kx * inverse])[:, None]  # [2, 1, N, K]
        self.from_uv = self.mask * (kx**2 - ky**2)  # -(d_xx - d_yy)
        self.from_difference = self.mask * (kx * ky)  # -d_xy
        self.forcing = torch.zeros(n, n // 2 + 1, dtype=torch.complex128, device=device)
        if forcing == "fno":
            x = torch.arange(n, dtype=torch.float64, device=device) / n
            phase = 2 * math.pi * (x[:, None] + x[None, :])
            self.forcing = torch.fft.rfft2(0.1 * (torch.sin(phase) + torch.cos(phase)))
        elif forcing == "kolmogorov":
            y = torch.arange(n, dtype=torch.float64, device=device) / n
            self.forcing = torch.fft.rfft2(KOLMOGOROV * torch.cos(2 * math.pi * KOLMOGOROV * y).expand(n, n))
        half = 0.5 * dt * viscosity * self.laplacian
        self.implicit = 1.0 / (1.0 + half)
        self.explicit = (1.0 - half) * self.implicit
        self.weight = (dt * self.implicit).to(torch.complex128)

    def transform(self, w: Tensor) -> Tensor:
        """Fields [B, N, N] -> state [B, N, K]."""
        return torch.fft.rfft2(w) * self.mask

    def field(self, w_hat: Tensor) -> Tensor:
        """State [B, N, K] -> fields [B, N, N]."""
        return torch.fft.irfft2(w_hat, s=(self.resolution, self.resolution))

    def velocity(self, w_hat: Tensor) -> Tensor:
        """State [B, N, K] -> (u, v) as [2, B, N, N]."""
        return self.field(self.to_velocity * w_hat)

    def tendency(self, w_hat: Tensor) -> Tensor:
        """Convection and forcing, -u . grad w + f, [B, N, K].

        With div u = 0, u . grad w = (d_xx - d_yy)(u v) + d_xy (v^2 - u^2) (Basdevant, JCP 50, 1983): four FFTs, not five.
        """
        u, v = self.velocity(w_hat)
        products = torch.fft.rfft2(torch.stack([u * v, v.square().sub_(u.square())]))
        return (self.from_uv * products[0]).add_(self.from_difference * products[1]).add_(self.forcing)

    def _advance(self, w_hat: Tensor, tendency: Tensor) -> Tensor:
        return torch.addcmul(self.explicit * w_hat, self.weight, tendency)

    def steps(self, w_hat: Tensor) -> Iterator[Tensor]:
        """States after 1, 2, ... steps."""
        previous: Tensor | None = None
        while True:
            now = self.tendency(w_hat)
            if self.scheme == "euler":
                slope = now
            elif self.scheme == "ab2" and previous is not None:
                slope = torch.sub(1.5 * now, previous, alpha=0.5)
            else:  # Heun; also the first step of ab2
                slope = 0.5 * (now + self.tendency(self._advance(w_hat, now)))
            w_hat, previous = self._advance(w_hat, slope), now
            yield w_hat

    def run(self, w0: Tensor, first: int, every: int, frames: int) -> Tensor:
        """Fields [B, frames, N, N] from w0 [B, N, N]: the first after `first` steps, then one each `every` steps."""
        state = self.transform(w0)
        stepper = self.steps(state)
        out = []
        for frame in range(frames):
            for _ in range(first if frame == 0 else every):
                state = next(stepper)
            out.append(self.field(state))
        return torch.stack(out, dim=1)

    def enstrophy(self, w_hat: Tensor) -> Tensor:
        """Mean of w^2 / 2 over the square, [B]."""
        return 0.5 * self.field(w_hat).square().mean((-2, -1))

    def palinstrophy(self, w_hat: Tensor) -> Tensor:
        """Mean of |grad w|^2 / 2 over the square, [B]; without forcing d enstrophy / dt = -2 nu palinstrophy."""
        return 0.5 * self.field(self.laplacian.sqrt() * w_hat).square().mean((-2, -1))


class NavierStokes2D(Simulation):
    """Generator of vorticity trajectories, array `fields` [trajectory, time, 1, x, y], and `viscosity` [trajectory] if drawn.

    Trajectory i starts from the random field of its seed, see `trajectory_seed`.
    """

    config_class: ClassVar[type[SimulationConfig]] = NavierStokes2DConfig
    channels = ("vorticity",)

    def coordinates(self) -> dict[str, np.ndarray]:
        points = np.arange(self.config.resolution) / self.config.resolution
        return {"x": points, "y": points}

    def times(self) -> np.ndarray:
        return self.config.burn_in + super().times()

    def description(self) -> dict[str, Any]:
        c = self.config
        one, unit = ({}, {"viscosity": "length^2/time"}) if c.drawn else ({"viscosity": c.viscosity}, {})
        return {
            "equation": "w_t + u . grad w = viscosity lap w + f; u = (psi_y, -psi_x); -lap psi = w",
            "parameters": {**one, "forcing": c.forcing},
            "units": {"length": "box side", "time": "1", "vorticity": "1/time", **unit},
            "domain": {"x": [0.0, 1.0], "y": [0.0, 1.0]},
            "boundary_conditions": {"x": "periodic", "y": "periodic"},
            "solver": {"dt": c.dt, "scheme": c.scheme, "precision": "float64"},
        }

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        w0 = torch.stack([gaussian_random_field(c.resolution, c.alpha, c.tau, seed) for seed in seeds])
        viscosity = self.drawn("viscosity", seeds, 2) if c.drawn else c.viscosity
        solver = Solver(c.resolution, viscosity, c.forcing, c.dt, c.scheme, self.device)
        first, every = (whole_steps(interval, c.dt) or 0 for interval in (c.burn_in, c.dt_save))
        return solver.run(w0.to(self.device), first, every, c.frames)[:, :, None]

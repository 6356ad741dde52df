"""2D incompressible Navier-Stokes in vorticity form on the periodic unit square.

    w_t + u . grad w = nu lap w + f,    u = (d_y psi, -d_x psi),    -lap psi = w

The set-up (domain, forcing, Gaussian random initial vorticity) is the benchmark of the Fourier neural operator
(Li et al., arXiv 2010.08895). Pseudo-spectral in space with the 2/3 rule, Crank-Nicolson for viscosity, explicit for
convection. Legend of shapes: B trajectories, N points per side, K = N/2+1 stored modes of the second axis.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from datamodules.format import ArraySpec

from .base import split_ranges
from .random_fields import gaussian_random_field, wavenumbers

FORCINGS = ("fno", "none")
SCHEMES = ("euler", "ab2", "heun")


def _whole(interval: float, dt: float) -> int | None:
    steps = round(interval / dt)
    return steps if math.isclose(steps * dt, interval, rel_tol=1e-9, abs_tol=1e-12) else None


@dataclass
class NavierStokes2DConfig:
    """Data set of 2D Navier-Stokes trajectories.

    resolution: points per side. viscosity: nu, with lengths in box sides and times in the unit of the forcing.
    forcing: "fno" = 0.1 (sin 2 pi (x+y) + cos 2 pi (x+y)), or "none".
    scheme: "euler" (that of the benchmark, first order; its dt is 1e-4), "ab2" or "heun" (second order).
    dt: time step; dt_save: time between frames; burn_in: time before the first frame; frames: per trajectory.
    alpha, tau: spectrum of the initial vorticity, see `gaussian_random_field`.
    train, validation, test: trajectories of each split.
    batch: trajectories solved together. The last bits of an FFT depend on it, so it is part of the config.
    """

    resolution: int = 64
    viscosity: float = 1e-3
    forcing: str = "fno"
    scheme: str = "ab2"
    dt: float = 1e-2
    dt_save: float = 1.0
    burn_in: float = 0.0
    frames: int = 21
    alpha: float = 2.5
    tau: float = 7.0
    train: int = 128
    validation: int = 16
    test: int = 16
    batch: int = 8

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution % 2:
            raise ValueError(f"resolution={self.resolution}: must be even and at least 8")
        if self.viscosity <= 0:
            raise ValueError(f"viscosity={self.viscosity}: must be positive; the solver has no other dissipation")
        if self.forcing not in FORCINGS:
            raise ValueError(f"forcing={self.forcing!r}: unknown; use one of {', '.join(FORCINGS)}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme={self.scheme!r}: unknown; use one of {', '.join(SCHEMES)}")
        if self.dt <= 0 or self.dt_save <= 0:
            raise ValueError(f"dt={self.dt}, dt_save={self.dt_save}: must be positive")
        if not _whole(self.dt_save, self.dt):
            raise ValueError(f"dt_save={self.dt_save}: must be a whole number of steps dt={self.dt}")
        if self.burn_in < 0 or _whole(self.burn_in, self.dt) is None:
            raise ValueError(f"burn_in={self.burn_in}: must be a whole number of steps dt={self.dt}")
        if self.frames < 2:
            raise ValueError(f"frames={self.frames}: a trajectory needs at least 2")
        if self.train < 1 or self.validation < 0 or self.test < 0:
            raise ValueError(
                f"train={self.train}, validation={self.validation}, test={self.test}: train >= 1, others >= 0"
            )
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: must be at least 1")


class Solver:
    """Time stepping of a batch of vorticity fields in Fourier space, float64.

    The state is `w_hat` [B, N, K] complex: `rfft2` of the vorticity (no scaling), zero outside the 2/3 rule's modes.
    """

    def __init__(self, resolution: int, viscosity: float, forcing: str, dt: float, scheme: str = "ab2") -> None:
        n = self.resolution = resolution
        self.viscosity, self.dt, self.scheme = viscosity, dt, scheme
        kx, ky = wavenumbers(n)  # [N, 1], [1, K], integers
        self.mask = ((kx.abs() <= (n - 1) // 3) & (ky <= (n - 1) // 3)).double()
        kx, ky = 2 * math.pi * kx, 2 * math.pi * ky
        self.laplacian = kx**2 + ky**2  # of -lap
        inverse = torch.where(self.laplacian > 0, 1.0 / self.laplacian.clamp_min(1e-300), 0.0)
        self.to_velocity = torch.stack([1j * ky * inverse, -1j * kx * inverse])[:, None]  # [2, 1, N, K]
        self.from_uv = self.mask * (kx**2 - ky**2)  # -(d_xx - d_yy)
        self.from_difference = self.mask * (kx * ky)  # -d_xy
        self.forcing = torch.zeros(n, n // 2 + 1, dtype=torch.complex128)
        if forcing == "fno":
            x = torch.arange(n, dtype=torch.float64) / n
            phase = 2 * math.pi * (x[:, None] + x[None, :])
            self.forcing = torch.fft.rfft2(0.1 * (torch.sin(phase) + torch.cos(phase)))
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


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of a multi-threaded FFT depend on how the batch is divided among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class NavierStokes2D:
    """Generator of vorticity trajectories, array `fields` [trajectory, time, 1, N, N] float32.

    Trajectory i starts from the random field of seed `seed + i`. Trajectories are solved in float64 in fixed groups of
    `config.batch` (i // batch) on one thread, so that its bits do not depend on shards, worker processes or the number of
    trajectories; they may differ between CPU types and torch builds.
    """

    config_class: ClassVar[type] = NavierStokes2DConfig
    version: ClassVar[int] = 1

    def __init__(self, config: NavierStokes2DConfig, seed: int, shard_bytes: int) -> None:
        self.config, self.seed = config, seed
        self.trajectories = config.train + config.validation + config.test
        per_trajectory = config.frames * (config.resolution**2 * 4 + 4)
        fit = max(1, shard_bytes // per_trajectory)
        # Whole groups per shard where that is possible: no group is solved twice.
        fit = fit // config.batch * config.batch if fit >= config.batch else fit
        self.shard_length = min(fit, self.trajectories)

    def specs(self) -> dict[str, ArraySpec]:
        c, n = self.config, self.config.resolution
        shape, names = (self.trajectories, c.frames, 1, n, n), ("trajectory", "time", "channel", "x", "y")
        axes = {"time": c.frames, "x": n, "y": n}
        coordinates = {name: ArraySpec((size,), "float64", (name,), size, size) for name, size in axes.items()}
        return {"fields": ArraySpec(shape, "float32", names, self.shard_length), **coordinates}

    def attributes(self) -> dict[str, Any]:
        c = self.config
        return {
            "kind": "fields",
            "array": "fields",
            "splits": split_ranges(train=c.train, validation=c.validation, test=c.test),
            "channels": ["vorticity"],
            "equation": "w_t + u . grad w = viscosity lap w + f; u = (psi_y, -psi_x); -lap psi = w",
            "parameters": {"viscosity": c.viscosity, "forcing": c.forcing},
            "units": {"length": "box side", "time": "1", "vorticity": "1/time"},
            "domain": {"x": [0.0, 1.0], "y": [0.0, 1.0]},
            "boundary_conditions": {"x": "periodic", "y": "periodic"},
            "dt": c.dt_save,
            "solver": {"dt": c.dt, "scheme": c.scheme, "precision": "float64"},
        }

    def source(self) -> dict[str, Any]:
        return {}

    def values(self, name: str, k: int) -> np.ndarray:
        c, spec = self.config, self.specs()[name]
        if name == "time":
            return c.burn_in + c.dt_save * np.arange(c.frames)
        if name in ("x", "y"):
            return np.arange(c.resolution) / c.resolution
        start = k * spec.shard_length
        stop = start + spec.shard_extent(k)
        out = np.empty((stop - start, *spec.shape[1:]), np.float32)
        with _one_thread():
            for group in range(start // c.batch, (stop - 1) // c.batch + 1):
                first = group * c.batch
                lo, hi = max(start, first), min(stop, first + c.batch)
                out[lo - start : hi - start, :, 0] = self._group(first)[lo - first : hi - first]
        return out

    def _group(self, first: int) -> np.ndarray:
        """Trajectories first ... first + batch - 1, [batch, frames, N, N]."""
        c = self.config
        w0 = torch.stack(
            [gaussian_random_field(c.resolution, c.alpha, c.tau, self.seed + first + j) for j in range(c.batch)]
        )
        solver = Solver(c.resolution, c.viscosity, c.forcing, c.dt, c.scheme)
        with torch.inference_mode():
            fields = solver.run(w0, round(c.burn_in / c.dt), round(c.dt_save / c.dt), c.frames)
        if not torch.isfinite(fields).all():
            raise ValueError(f"dt={c.dt}: the solution became non-finite; use a smaller time step")
        return fields.numpy()

"""Periodic 1D equations u_t + strength (u^2)_x = L u with a linear right side that is diagonal in Fourier space."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .etdrk4 import ETDRK4


def angular_wavenumbers(resolution: int, length: float, device: torch.device | None = None) -> Tensor:
    """k = 2 pi j / length of `rfft`, [N/2+1] float64."""
    k = torch.fft.rfftfreq(resolution, 1.0 / resolution, dtype=torch.float64, device=device)
    return 2 * math.pi / length * k


class ConvectionSolver:
    """Pseudo-spectral in space with the 2/3 rule (the product is free of aliasing), ETDRK4 in time.

    Args:
        linear: L by mode, real or complex, [K] or [B, K] with K = N/2+1.
        strength: of the convection: a number, or [B, 1].
    """

    def __init__(self, resolution: int, length: float, linear: Tensor, strength: float | Tensor, dt: float) -> None:
        self.resolution = resolution
        k = angular_wavenumbers(resolution, length, linear.device)
        self.mask = torch.arange(resolution // 2 + 1, device=linear.device) <= (resolution - 1) // 3
        self.convection = -1j * k * strength * self.mask
        self.stepper = ETDRK4(linear, self._convect, dt)

    def _convect(self, u_hat: Tensor) -> Tensor:
        u = torch.fft.irfft(u_hat, n=self.resolution)
        return self.convection * torch.fft.rfft(u.square())

    def run(self, u0: Tensor, first: int, every: int, frames: int) -> Tensor:
        """Fields [B, frames, N] from u0 [B, N]: the first after `first` steps, then one each `every` steps."""
        states = self.stepper.frames(torch.fft.rfft(u0) * self.mask, first, every, frames)
        return torch.fft.irfft(torch.stack(states, dim=1), n=self.resolution)

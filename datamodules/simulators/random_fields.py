"""Gaussian random fields on the periodic unit square."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

NOISE_MODES = 128  # noise is drawn for |k| < this, so that one seed is the same field at every resolution up to 256


def wavenumbers(resolution: int) -> tuple[Tensor, Tensor]:
    """Integer wave numbers of `rfft2`: [N, 1] and [1, N/2+1], float64."""
    kx = torch.fft.fftfreq(resolution, 1.0 / resolution, dtype=torch.float64)
    ky = torch.fft.rfftfreq(resolution, 1.0 / resolution, dtype=torch.float64)
    return kx[:, None], ky[None, :]


def gaussian_random_field(resolution: int, alpha: float, tau: float, seed: int) -> Tensor:
    """A sample of N(0, 2 tau^(2 alpha - 2) (-lap + tau^2)^-alpha) with zero mean, [N, N] float64.

    With alpha = 2.5 and tau = 7 this is the initial vorticity of the FNO benchmark (arXiv 2010.08895), N(0, 7^(3/2)
    (-lap + 49)^-2.5), with the factor 2 of variance that its generating code has over that formula; standard deviation
    0.262. Modes with |k_x| or |k_y| = N/2 are left out: they have no sign on the grid.
    """
    if not 2 <= resolution <= 2 * NOISE_MODES:
        raise ValueError(f"resolution={resolution}: initial fields are defined for 2 to {2 * NOISE_MODES} points")
    rng = np.random.Generator(np.random.Philox(seed))
    # Half-plane of independent complex modes; k_x runs from -(M-1) to M-1, k_y from 0 to M-1.
    noise = rng.standard_normal((2 * NOISE_MODES - 1, NOISE_MODES, 2))
    m = (resolution - 1) // 2  # largest wave number kept
    centre = NOISE_MODES - 1
    xi = torch.from_numpy(
        noise[centre - m : centre + m + 1, : m + 1, 0] + 1j * noise[centre - m : centre + m + 1, : m + 1, 1]
    )
    k = torch.arange(-m, m + 1, dtype=torch.float64)
    squared = k[:, None] ** 2 + k[None, m:] ** 2
    scale = tau ** (alpha - 1) * (4 * math.pi**2 * squared + tau**2) ** (-alpha / 2)
    half = xi * scale  # E |mode|^2 = 2 scale^2; the field is real, so mode -k is the conjugate of mode k
    half[m, 0] = 0.0
    half[:m, 0] = half[m + 1 :, 0].conj().flip(0)
    spectrum = torch.zeros(resolution, resolution // 2 + 1, dtype=torch.complex128)
    spectrum[k.long() % resolution, : m + 1] = half
    return torch.fft.irfft2(spectrum, s=(resolution, resolution), norm="forward")

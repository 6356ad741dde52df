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


LINE_MODES = 1024  # modes drawn for a periodic line, so that one seed is the same function at every resolution


def gaussian_random_line(resolution: int, alpha: float, tau: float, sigma: float, seed: int) -> Tensor:
    """A sample of N(0, sigma^2 (-d_xx + tau^2)^-alpha) with zero mean on the periodic unit interval, [N] float64.

    alpha = 2, tau = 5, sigma = 25 is the initial state of the FNO benchmark's Burgers equation (arXiv 2010.08895);
    standard deviation 0.594. The mode N/2 is left out: it has no sign on the grid.
    """
    noise = np.random.Generator(np.random.Philox(seed)).standard_normal((LINE_MODES, 2))
    m = min((resolution - 1) // 2, LINE_MODES)
    k = torch.arange(1, m + 1, dtype=torch.float64)
    scale = sigma * (4 * math.pi**2 * k**2 + tau**2) ** (-alpha / 2)
    xi = torch.from_numpy(noise[:m, 0] + 1j * noise[:m, 1])
    spectrum = torch.zeros(resolution // 2 + 1, dtype=torch.complex128)
    spectrum[1 : m + 1] = xi * scale / math.sqrt(2)  # E |mode|^2 = scale^2
    return torch.fft.irfft(spectrum, n=resolution, norm="forward")


def random_sines(resolution: int, terms: int, modes: int, rng: np.random.Generator) -> Tensor:
    """sum_i A_i sin(2 pi l_i x + phi_i) on the periodic unit interval, [N] float64.

    A ~ U(-0.5, 0.5), l in 1 ... modes, phi ~ U(0, 2 pi): the initial states of arXiv 2202.03376 and 2202.07643.
    """
    x = torch.arange(resolution, dtype=torch.float64)[:, None] / resolution
    amplitude = torch.from_numpy(rng.uniform(-0.5, 0.5, terms))
    mode = torch.from_numpy(rng.integers(1, modes + 1, terms))
    phase = torch.from_numpy(rng.uniform(0, 2 * math.pi, terms))
    return (amplitude * torch.sin(2 * math.pi * mode * x + phase)).sum(-1)


def random_waves(resolution: int, modes: int, rng: np.random.Generator) -> Tensor:
    """A periodic sum of waves of random phase at cell centres, [N, N] float64, with zero mean and largest value 1.

    All wave numbers with 0 < |k_x|, |k_y| <= modes have amplitude |k|^-1/2, as in PDEBench (arXiv 2210.07182).
    """
    k = np.arange(1, modes + 1)
    size = (k[:, None] ** 2 + k**2) ** -0.25
    phase = rng.uniform(0, 2 * math.pi, (2, modes, modes))  # of k_x > 0 with k_y > 0 and k_y < 0

    def values(n: int) -> np.ndarray:
        x = 2 * math.pi * (np.arange(n) + 0.5) / n
        e = np.exp(1j * k[:, None] * x)  # [modes, n]
        rising, falling = (
            e.T @ (size * np.exp(1j * phi)) @ other for phi, other in zip(phase, (e, e.conj()), strict=True)
        )
        return np.asarray((rising + falling).real)

    # Scaled by a grid of its own, so that one seed is the same function at every resolution.
    return torch.from_numpy(values(resolution) / np.abs(values(16 * modes)).max())

"""Two map-based model neurons. Each takes (voltage, recovery) [...] and returns the next pair."""

from __future__ import annotations

import torch
from torch import Tensor

Number = Tensor | float


def chialvo(x: Tensor, y: Tensor, a: Number, b: Number, c: Number, k: Number) -> tuple[Tensor, Tensor]:
    """Chialvo (Chaos, Solitons & Fractals 5, 1995): x -> x^2 exp(y - x) + k, y -> a y - b x + c."""
    return x.square() * torch.exp(y - x) + k, a * y - b * x + c


def rulkov(x: Tensor, y: Tensor, alpha: Number, mu: Number, sigma: Number) -> tuple[Tensor, Tensor]:
    """Rulkov (Phys. Rev. Lett. 86, 2001), the chaotic map: x -> alpha / (1 + x^2) + y, y -> y - mu (x - sigma)."""
    return alpha / (1 + x.square()) + y, y - mu * (x - sigma)

"""Normalisation layers that know their role. All of them compute in float32 or wider and return the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.roles import declare


class RMSNorm(nn.Module):
    """`y = g * x / sqrt(mean(x²) + eps)` over the last axis (arXiv:1910.07467); gain g starts at one."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        declare(self, weight="vector")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class ChannelNorm(nn.GroupNorm):
    """Group norm of `(B, C, *S)` over channel groups and space; `groups=channels` is instance norm (arXiv:1803.08494)."""

    def __init__(self, channels: int, groups: int = 1) -> None:
        super().__init__(groups, channels)
        declare(self, weight="vector", bias="vector")

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)

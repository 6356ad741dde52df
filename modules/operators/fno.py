"""Fourier neural operator on periodic or padded grids of 1, 2 or 3 dimensions (arXiv:2010.08895).

Shapes: B batch, C channels, D width, S spatial axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.layers.linear import ChannelLinear, SoftGate
from modules.layers.mlp import ChannelMLP
from modules.layers.norms import ChannelNorm
from modules.layers.spectral_conv import SpectralConv

SKIPS = ("linear", "soft-gating", "identity", "none")
NORMS = ("none", "group", "instance")


@dataclass
class FNOConfig:
    """Sizes of an FNO. The number of entries of `modes` is the number of spatial axes.

    `modes`: Fourier modes per axis, counting both signs (16 keeps wave numbers -8..7, and 0..8 on the last axis).
    `lifting_ratio`, `projection_ratio`, `channel_mlp_ratio`: hidden channels over width of the three point-wise MLPs;
    a `channel_mlp_ratio` of 0 leaves that MLP out. `skip` runs around the spectral convolution, `channel_mlp_skip`
    around the MLP. `grid` appends the coordinates in [0, 1). `padding`: fraction of each axis added as zeros on both
    sides inside the network, for fields that are not periodic; empty for none. `stabilizer="tanh"` bounds what enters
    the spectral convolution.
    """

    in_channels: int = 1
    out_channels: int = 1
    width: int = 32
    modes: list[int] = field(default_factory=lambda: [16, 16])
    depth: int = 4
    lifting_ratio: float = 2.0
    projection_ratio: float = 2.0
    channel_mlp_ratio: float = 0.5
    skip: str = "linear"
    channel_mlp_skip: str = "soft-gating"
    grid: bool = True
    norm: str = "none"
    padding: list[float] = field(default_factory=list)
    stabilizer: str = "none"

    def __post_init__(self) -> None:
        for name in ("in_channels", "out_channels", "width", "depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 1 <= len(self.modes) <= 3:
            raise ValueError(f"modes={list(self.modes)}: one number per spatial axis; give 1, 2 or 3 of them")
        if min(self.modes) < 1:
            raise ValueError(f"modes={list(self.modes)}: each axis needs at least 1 mode")
        for name in ("lifting_ratio", "projection_ratio"):
            if round(getattr(self, name) * self.width) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: leaves no hidden channel at width={self.width}; raise it"
                )
        if self.channel_mlp_ratio != 0 and round(self.channel_mlp_ratio * self.width) < 1:
            raise ValueError(
                f"channel_mlp_ratio={self.channel_mlp_ratio}: leaves no hidden channel at width={self.width}; "
                "raise it, or set 0 for no channel MLP"
            )
        for name, allowed in (("skip", SKIPS), ("channel_mlp_skip", SKIPS), ("norm", NORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)}: choose one of {', '.join(allowed)}")
        if self.stabilizer not in ("none", "tanh"):
            raise ValueError(f"stabilizer={self.stabilizer}: choose one of none, tanh")
        if self.padding and (len(self.padding) != len(self.modes) or min(self.padding) < 0):
            raise ValueError(
                f"padding={list(self.padding)}: give one fraction >= 0 for each of the {len(self.modes)} axes, or none"
            )


class FNO(nn.Module):
    """`(B, in_channels, *S) -> (B, out_channels, *S)`; the same weights apply on any grid.

    Lifting (point-wise MLP of the input and its coordinates) -> `depth` blocks -> projection (point-wise MLP).
    """

    config_class: ClassVar = FNOConfig

    def __init__(self, config: FNOConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.out_channels = config.out_channels
        self.dimensions = len(config.modes)
        self.smallest_grid = tuple(config.modes)  # on a coarser one some spectral weights would have no effect
        width = config.width
        inputs = config.in_channels + (self.dimensions if config.grid else 0)
        self.lifting = ChannelMLP(inputs, round(config.lifting_ratio * width), width, role_in="embedding")
        self.layers = nn.ModuleList(FNOBlock(config, last=i == config.depth - 1) for i in range(config.depth))
        self.projection = ChannelMLP(
            width, round(config.projection_ratio * width), config.out_channels, role_out="readout"
        )

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks in order: units of sharding, compilation, checkpointing and diagnostics."""
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        """Raises ValueError if the number of axes or channels does not fit."""
        if x.ndim != self.dimensions + 2 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"input of shape {tuple(x.shape)}: this FNO takes (batch, {self.in_channels}) "
                f"and {self.dimensions} spatial axes"
            )
        if self.config.grid:
            grid = coordinates(x.shape[2:], x.device).to(x.dtype)
            x = torch.cat([x, grid.expand(x.shape[0], *[-1] * (x.ndim - 1))], dim=1)
        x = self.lifting(x)
        pads = [round(p * n) for p, n in zip(self.config.padding, x.shape[2:], strict=False)]
        if any(pads):
            x = F.pad(x, [p for pad in reversed(pads) for p in (pad, pad)])
        for layer in self.layers:
            x = layer(x)
        for axis, pad in enumerate(pads, start=2):
            x = x.narrow(axis, pad, x.shape[axis] - 2 * pad)
        return self.projection(x)


class FNOBlock(nn.Module):
    """`z = norm(K v) + skip(v); z = σ(z); z = σ(norm(MLP(z) + mlp_skip(v)))`, σ = GELU, no σ in the last block.

    K is the spectral convolution; both skips start from the block's input v.
    """

    def __init__(self, config: FNOConfig, *, last: bool) -> None:
        super().__init__()
        width = config.width
        self.last = last
        self.stabilizer = config.stabilizer
        self.spectral = SpectralConv(width, width, config.modes)
        self.skip = _skip(config.skip, width)
        self.spectral_norm = _norm(config.norm, width)
        self.mlp: ChannelMLP | None = None
        if config.channel_mlp_ratio != 0:
            self.mlp = ChannelMLP(width, round(config.channel_mlp_ratio * width), width)
            self.mlp_skip = _skip(config.channel_mlp_skip, width)
            self.mlp_norm = _norm(config.norm, width)

    def forward(self, v: Tensor) -> Tensor:
        z = self.spectral_norm(self.spectral(torch.tanh(v) if self.stabilizer == "tanh" else v))
        if self.skip is not None:
            z = z + self.skip(v)
        if not self.last:
            z = F.gelu(z)
        if self.mlp is None:
            return z
        z = self.mlp(z)
        if self.mlp_skip is not None:
            z = z + self.mlp_skip(v)
        z = self.mlp_norm(z)
        return z if self.last else F.gelu(z)


def coordinates(shape: Sequence[int], device: torch.device) -> Tensor:
    """Coordinates in [0, 1), end point excluded, as `(1, d, *shape)` in float32."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) / n for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def _skip(kind: str, width: int) -> nn.Module | None:
    if kind == "linear":
        return ChannelLinear(width, width)
    if kind == "soft-gating":
        return SoftGate(width)
    return nn.Identity() if kind == "identity" else None


def _norm(kind: str, width: int) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    return ChannelNorm(width, groups=1 if kind == "group" else width)

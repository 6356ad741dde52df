"""Two-layer perceptrons: on the channels of a grid, and on the features of a token.

Shapes: B batch, C channels, S spatial axes, L sequence, D width.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from modules.layers.linear import ChannelLinear, Linear
from modules.roles import Role


class ChannelMLP(nn.Module):
    """`(B, in, *S) -> (B, hidden, *S) -> GELU -> (B, out, *S)` at each grid point, with biases."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, *, role_in: Role = "hidden", role_out: Role = "hidden"
    ) -> None:
        super().__init__()
        self.up = ChannelLinear(inputs, hidden, bias=True, role=role_in)
        self.down = ChannelLinear(hidden, outputs, bias=True, role=role_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class MLP(nn.Module):
    """`W_down GELU(W_up x)` on `(B, L, D)`; `branch_scale` multiplies the initial standard deviation of W_down."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False, branch_scale: float = 1.0) -> None:
        super().__init__()
        self.up = Linear(width, hidden, bias=bias, std=1.0 / math.sqrt(width))
        self.down = Linear(hidden, width, bias=bias, std=branch_scale / math.sqrt(hidden))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BLD)))


class SwiGLU(nn.Module):
    """`W_down (SiLU(W_gate x) * W_up x)` on `(B, L, D)` (arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False, branch_scale: float = 1.0) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=bias, std=1.0 / math.sqrt(width))
        self.up = Linear(width, hidden, bias=bias, std=1.0 / math.sqrt(width))
        self.down = Linear(hidden, width, bias=bias, std=branch_scale / math.sqrt(hidden))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BLD)) * self.up(x_BLD))

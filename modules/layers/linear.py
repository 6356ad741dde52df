"""Linear maps that know their role.

Shapes: B batch, C channels, S any spatial axes, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.roles import Role, declare


class Linear(nn.Linear):
    """`y = x Wᵀ + b` on the last axis; W `(out, in)` has the given role, b is a vector.

    `std` is the standard deviation of the normal initial weights; None takes uniform(±1/sqrt(in)), torch's default.
    A bias starts at zero with `std`, uniform like the weights without.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        role: Role = "hidden",
        std: float | None = None,
    ) -> None:
        self.std = std  # before the parent's constructor, which calls reset_parameters
        super().__init__(in_features, out_features, bias=bias)
        declare(self, weight=role, bias="vector")

    def reset_parameters(self) -> None:
        if self.std is None:
            bound = 1.0 / math.sqrt(self.in_features)
            nn.init.uniform_(self.weight, -bound, bound)
            if self.bias is not None:
                nn.init.uniform_(self.bias, -bound, bound)
        else:
            nn.init.normal_(self.weight, std=self.std)
            if self.bias is not None:
                nn.init.zeros_(self.bias)


class ChannelLinear(Linear):
    """The same map on axis 1 of `(B, C, *S)`, at each grid point: a 1x1 convolution in any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x.flatten(2), self.weight[:, :, None], self.bias).unflatten(2, x.shape[2:])


class Embedding(nn.Embedding):
    """Token table `(vocab, D)`, normal with standard deviation `std`.

    Integers `(*)` are looked up, `(*, D)`; features `(*, D)` are scored against each row, `(*, vocab)`: a tied readout.
    """

    def __init__(self, vocab_size: int, width: int, *, std: float) -> None:
        self.std = std
        super().__init__(vocab_size, width)
        declare(self, weight="embedding")

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) if x.is_floating_point() else super().forward(x)


class SoftGate(nn.Module):
    """`y_c = w_c x_c`: one learned factor per channel of `(B, C, *S)`, ones at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        declare(self, weight="vector")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.view(-1, *[1] * (x.ndim - 2))

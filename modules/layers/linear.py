"""Linear maps that know their role.

Shapes: B batch, C channels, S any spatial axes, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modules.roles import Role, declare
from modules.scales import declare_factors, declare_fans, normal_, scaled, uniform_


class Linear(nn.Linear):
    """`y = x Wᵀ + b` on the last axis; W `(out, in)` has the given role, b is a vector. Factor: `weight`.

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
        declare_fans(self, weight=(in_features, out_features))
        declare_factors(self, weight=1.0)

    def reset_parameters(self) -> None:
        if self.std is None:
            bound = 1.0 / math.sqrt(self.in_features)
            uniform_(self, "weight", bound)
            if self.bias is not None:
                uniform_(self, "bias", bound)
        else:
            normal_(self, "weight", self.std)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(scaled(x, self, "weight"))


class ChannelLinear(Linear):
    """The same map on axis 1 of `(B, C, *S)`, at each grid point: a 1x1 convolution in any number of dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        x = scaled(x, self, "weight")
        return F.conv1d(x.flatten(2), self.weight[:, :, None], self.bias).unflatten(2, x.shape[2:])


class Embedding(nn.Embedding):
    """Token table `(vocab, D)`, normal with standard deviation `std`.

    Integers `(*)` are looked up, `(*, D)`; with `tied` it is the readout, too: features `(*, D)` are scored against each
    row, `(*, vocab)`. Factors: `weight` on what is looked up, `score` on scores.
    """

    def __init__(self, vocab_size: int, width: int, *, std: float, tied: bool = False) -> None:
        self.std = std
        super().__init__(vocab_size, width)
        declare(self, weight="embedding")
        declare_fans(self, weight=(1, width))
        declare_factors(self, weight=1.0, **({"score": 1.0} if tied else {}))

    def reset_parameters(self) -> None:
        normal_(self, "weight", self.std)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            return F.linear(scaled(x, self, "score"), self.weight)
        return scaled(super().forward(x), self, "weight")


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

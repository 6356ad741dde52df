"""Muon: momentum, orthogonalised (https://kellerjordan.github.io/posts/muon; arXiv:2502.16982 for the scale)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.optim.matrix import MatrixOptimizer
from trainer.optim.torch_optim import _not_negative, _positive

# Of the quintic iteration: largest slope at zero, singular values end between about 0.7 and 1.2.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7


@dataclass
class MuonConfig:
    """Muon on hidden matrices, AdamW (`betas`, `eps`) on the rest, both at `lr` and `weight_decay`.

    `adjust`: `match_rms_adamw` gives updates the size of AdamW's, so that one rate suits both; `original` multiplies by
    sqrt(max(1, rows / columns)), and wants larger rates; then `adamw_lr_ratio` is the factor on the rate of AdamW.
    """

    lr: float = 1e-3
    momentum: float = 0.95
    nesterov: bool = True
    steps: int = 5
    adjust: str = "match_rms_adamw"
    adamw_lr_ratio: float = 1.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        _positive("eps", self.eps)
        _positive("adamw_lr_ratio", self.adamw_lr_ratio)
        _not_negative("weight_decay", self.weight_decay)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: must lie in [0, 1)")
        if not 1 <= self.steps < 100:
            raise ValueError(f"steps={self.steps}: must lie in [1, 99]")
        if self.adjust not in ("match_rms_adamw", "original"):
            raise ValueError(f"adjust={self.adjust}: must be match_rms_adamw or original")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: two numbers in [0, 1)")


class Muon(MatrixOptimizer):
    """The steps of `torch.optim.Muon`, bit for bit, on whole or sharded matrices.

    Matrices travel as bfloat16, in which the iteration runs anyway: half the bytes, nothing lost.
    """

    config_class: ClassVar[type] = MuonConfig
    family: ClassVar[str] = "matrix"
    exchange_dtype = torch.bfloat16
    state_names = ("momentum_buffer",)
    needs_matrices: ClassVar[bool] = True

    def __init__(self, config: MuonConfig, groups: Sequence[dict[str, Any]]) -> None:
        self.config = config
        scaled = [
            {**group, "lr": group.get("lr", config.lr) * (1 if group["role"] == "hidden" else config.adamw_lr_ratio)}
            for group in groups
        ]
        defaults = {
            "lr": config.lr,
            "weight_decay": config.weight_decay,
            "momentum": config.momentum,
            "betas": tuple(config.betas),
            "eps": config.eps,
        }
        super().__init__(scaled, defaults)

    def before(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, 1 - group["momentum"])
        return gradient.lerp(buffer, group["momentum"]) if self.config.nesterov else buffer

    def direction(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        return orthogonalize(matrix, self.config.steps)

    def apply(self, shard: Tensor, direction: Tensor, shape: torch.Size, group: dict[str, Any]) -> None:
        rows, columns = shape
        if self.config.adjust == "original":
            scale = math.sqrt(max(1, rows / columns))
        else:
            scale = 0.2 * math.sqrt(max(rows, columns))
        shard.mul_(1 - group["lr"] * group["weight_decay"])
        shard.add_(direction, alpha=-(group["lr"] * scale))


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """U V^T of a matrix [m, n] = U S V^T, roughly, by `steps` of a Newton-Schulz iteration in bfloat16."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x
    x = x / x.norm().clamp(min=_EPS)  # the spectral norm is at most one
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if tall else x

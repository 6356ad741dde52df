"""The methods that `torch.optim` has, with their configs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch


@dataclass
class AdamWConfig:
    """AdamW (arXiv:1711.05101). `weight_decay` is multiplied by the rate, as in torch."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={list(self.betas)}: two numbers in [0, 1)")
        _positive("eps", self.eps)
        _not_negative("weight_decay", self.weight_decay)


class AdamW:
    """Builds `torch.optim.AdamW`."""

    config_class: ClassVar[type] = AdamWConfig
    family: ClassVar[str] = "adam"

    def __new__(cls, config: AdamWConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:  # type: ignore[misc]
        b1, b2 = config.betas
        return torch.optim.AdamW(
            _plain(groups), lr=config.lr, betas=(b1, b2), eps=config.eps, weight_decay=config.weight_decay, foreach=True
        )


@dataclass
class SGDConfig:
    """SGD with momentum."""

    lr: float = 1e-2
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _positive("lr", self.lr)
        _not_negative("momentum", self.momentum)
        _not_negative("weight_decay", self.weight_decay)
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true needs momentum > 0")


class SGD:
    """Builds `torch.optim.SGD`."""

    config_class: ClassVar[type] = SGDConfig
    family: ClassVar[str] = "sgd"

    def __new__(cls, config: SGDConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:  # type: ignore[misc]
        return torch.optim.SGD(
            _plain(groups),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            foreach=True,
        )


def _plain(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "role"} for group in groups]


def _positive(key: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{key}={value}: must be greater than 0 and finite")


def _not_negative(key: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{key}={value}: must be at least 0 and finite")

"""The rate against the length of training and the batch: rate = rate0 (D/D0)^-0.32 (B/B0)^1/2, with exponents to choose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from trainer.parametrization.parts import Kind, Part, VectorsConfig, positive
from trainer.parametrization.rule import Case, Growth, Rule

# Published, and contested: horizon arXiv:2409.19913 and arXiv:2603.28743; batch arXiv:2205.10287. `keel fit` replaces them.
LR_HORIZON = -0.32
LR_BATCH = 0.5

SCOPES = ("all", "hidden")


def rate_factor(
    data: float, batch: float, *, lr_horizon: float = LR_HORIZON, lr_batch: float = LR_BATCH
) -> tuple[float, float]:
    """Factors on a rate from the ratios of data seen and of batches to those that it was tuned at: (horizon, batch)."""
    return data**lr_horizon, batch**lr_batch


@dataclass
class HorizonConfig(VectorsConfig):
    """`base_data`, `base_batch`: tokens (samples, where these are no token sequences) seen in all and per step by the run
    that the rate was tuned on. `lr_horizon`, `lr_batch`: exponents. `law_scope`: all tensors, or only hidden ones follow
    the horizon (arXiv:2603.28743 prints the latter, its code has the former)."""

    base_data: float = 0.0
    base_batch: float = 0.0
    lr_horizon: float = LR_HORIZON
    lr_batch: float = LR_BATCH
    law_scope: str = "all"

    def __post_init__(self) -> None:
        for name in ("base_data", "base_batch"):
            positive(name, getattr(self, name))
        for name in ("lr_horizon", "lr_batch"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: must be finite")
        if self.law_scope not in SCOPES:
            raise ValueError(f"law_scope={self.law_scope}: choose one of {', '.join(SCOPES)}")


class Horizon(Part):
    """Multiplies rates by `rate_factor` of the run's data and batch. A run that is resumed for longer keeps its rates."""

    config_class: ClassVar[type] = HorizonConfig
    kind: ClassVar[Kind] = "law"
    config: HorizonConfig

    def rule(self, tensor: Growth, case: Case) -> Rule:
        config = self.config
        horizon, batch = rate_factor(
            case.data / config.base_data,
            case.batch / config.base_batch,
            lr_horizon=config.lr_horizon,
            lr_batch=config.lr_batch,
        )
        follows = config.law_scope == "all" or tensor.role in ("hidden", "spectral")
        return Rule(tensor.role, (horizon if follows else 1.0) * batch)

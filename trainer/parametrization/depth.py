"""Depth-muP: residual branches and rates that follow the number of blocks (arXiv:2310.02244, arXiv:2505.01618)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trainer.parametrization.parts import BasedConfig, Kind, Part
from trainer.parametrization.rule import Case, Growth, Rule, Setting

SCOPES = ("blocks", "all")


@dataclass
class DepthConfig(BasedConfig):
    """`branch_exponent`: branches are multiplied by depth^-exponent, 1/2 for depth-muP, 1 for CompleteP. `rate_scope`:
    the rate rule holds for the tensors of the blocks, or for all (as in arXiv:2603.28743)."""

    branch_exponent: float = 0.5
    rate_scope: str = "blocks"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.5 <= self.branch_exponent <= 1:
            raise ValueError(f"branch_exponent={self.branch_exponent}: must lie in [0.5, 1]")
        if self.rate_scope not in SCOPES:
            raise ValueError(f"rate_scope={self.rate_scope}: choose one of {', '.join(SCOPES)}")


class Depth(Part):
    """With l the ratio of depths and p the exponent: branches l^-p, rates l^(p-1) with Adam and l^(2p-1) with SGD.

    Gradients in branches shrink as l^-p, and Adam's epsilon with them.

    The rules are about branches that are added to a stream which passes the blocks unchanged. An FNO has none: its blocks put
    the sum of the spectral path and the skip, whatever that is, through a GELU, so that it is refused.
    """

    config_class: ClassVar[type] = DepthConfig
    kind: ClassVar[Kind] = "depth"
    config: DepthConfig

    def rule(self, tensor: Growth, case: Case) -> Rule:
        power = self.config.branch_exponent
        rate = case.depth ** (power - 1 if case.family == "adam" else 2 * power - 1)
        if not tensor.repeated:
            return Rule(tensor.role, rate if self.config.rate_scope == "all" else 1.0)
        eps = case.depth**-power if self.config.scale_epsilon else 1.0
        return Rule(tensor.role, rate, eps_scale=eps)

    def factor(self, setting: Setting, case: Case) -> float | None:
        return setting.own * case.depth**-self.config.branch_exponent if setting.kind == "branch" else None

"""NTK parametrisation (arXiv:1806.07572): weights start at one scale at any width, and are multiplied by fan_in^-1/2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trainer.parametrization.parts import BasedConfig, Kind, Part
from trainer.parametrization.rule import Case, Growth, Rule, Setting


@dataclass
class NTKConfig(BasedConfig):
    """See `BasedConfig`."""


class NTK(Part):
    """In terms of W = n^-a w, w ~ n^-b, rate ~ n^-c: input (0, 0, 0), hidden and readout (1/2, 0, 0) with SGD.

    With Adam, whose step does not feel the multiplier, c = 1/2 (arXiv:2407.05872), so that a step changes a function by
    no more at any width.
    """

    config_class: ClassVar[type] = NTKConfig
    kind: ClassVar[Kind] = "width"

    def rule(self, tensor: Growth, case: Case) -> Rule:
        start, role = 1.0 / tensor.std, tensor.role
        if role not in ("hidden", "spectral", "readout"):
            return Rule(role, eps_scale=self._eps(tensor.fan_out), init_scale=start)
        narrower = tensor.fan_in**-0.5
        rate = narrower if case.family == "adam" else 1.0
        eps = self._eps(tensor.fan_in if role == "readout" else tensor.fan_in**2)
        return Rule(role, rate, 1.0, eps, start, narrower)

    def factor(self, setting: Setting, case: Case) -> float | None:
        if setting.kind == "score" and setting.weight is not None:
            return setting.own * setting.weight.fan_out**-0.5
        return None

    def _eps(self, growth: float) -> float:
        return growth**-0.5 if self.config.scale_epsilon else 1.0

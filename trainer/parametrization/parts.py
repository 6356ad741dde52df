"""What the parts of a parametrisation have in common: a part is a rule for one tensor and for one factor of a module."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from trainer.parametrization.rule import Case, Growth, Rule, Setting

Kind = Literal["width", "depth", "law"]
DECAYS = ("constant", "with_rate", "independent")
FAMILIES = ("adam", "sgd")


class Part:
    """Changes nothing. Subclasses say what they change; at most one of each `kind` makes a parametrisation."""

    config_class: ClassVar[type]
    kind: ClassVar[Kind]

    def __init__(self, config: Any) -> None:
        self.config = config

    def rule(self, tensor: Growth, case: Case) -> Rule:
        """The factors for one tensor."""
        return Rule(tensor.role)

    def factor(self, setting: Setting, case: Case) -> float | None:
        """What a module's factor becomes; None: this part leaves it as it is."""
        return None


@dataclass
class VectorsConfig:
    """`decay_vectors`: also decay gains and biases."""

    decay_vectors: bool = False


@dataclass
class BasedConfig(VectorsConfig):
    """What rules over a base model share.

    `base`: fields of the model that differ in the base model, such as `{width: 64, heads: 2}`: at these sizes the run is
    that of the standard parametrisation, and the rules say how it changes from there.
    `decay`: `constant`, each tensor loses the same part of itself in a step whatever the rules do to its rate, as with
    Adam of PyPI's mup; `with_rate`, in proportion to its rate (mup's `decoupled_wd`); `independent`, weight_decay times
    the schedule, whatever the rate (arXiv:2309.14322). `scale_epsilon`: Adam's epsilon follows the size of gradients.
    """

    base: dict[str, Any] = field(default_factory=dict)
    decay: str = "constant"
    scale_epsilon: bool = True

    def __post_init__(self) -> None:
        if not self.base:
            raise ValueError("base: give the fields of the base model that differ, such as base.width=64")
        if self.decay not in DECAYS:
            raise ValueError(f"decay={self.decay}: choose one of {', '.join(DECAYS)}")


def positive(name: str, value: float) -> None:
    """Raises ValueError unless `value` is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: must be greater than 0 and finite")

"""What a parametrisation says of one tensor."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Factors on the configured rate and weight decay of one tensor, and its role."""

    role: str
    lr_scale: float = 1.0
    decay_scale: float = 1.0

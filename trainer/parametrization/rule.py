"""What a parametrisation says of one tensor, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """Factors on what is configured for one tensor, and its role.

    Attributes:
        lr_scale, decay_scale, eps_scale: on the optimiser's rate, weight decay and epsilon.
        init_scale: on the initial values that the module draws.
        weight_factor: what the module multiplies its stored weight by (`modules.scales`).
    """

    role: str
    lr_scale: float = 1.0
    decay_scale: float = 1.0
    eps_scale: float = 1.0
    init_scale: float = 1.0
    weight_factor: float = 1.0

    def times(self, other: Rule) -> Rule:
        """Both rules, one after the other."""
        return Rule(
            self.role,
            self.lr_scale * other.lr_scale,
            self.decay_scale * other.decay_scale,
            self.eps_scale * other.eps_scale,
            self.init_scale * other.init_scale,
            self.weight_factor * other.weight_factor,
        )


@dataclass(frozen=True)
class Growth:
    """One tensor beside the same tensor of the base model.

    Attributes:
        fan_in, fan_out: ratios to the base model's; of a vector, fan_out is the ratio of lengths.
        std: standard deviation of its initial values as the module draws them over that of the base model (1: constant).
        repeated: whether it lies in one of the network's blocks.
    """

    role: str
    fan_in: float = 1.0
    fan_out: float = 1.0
    std: float = 1.0
    repeated: bool = False


@dataclass(frozen=True)
class Case:
    """What holds for all tensors of a run.

    Attributes:
        family: of the optimiser: adam (steps of about the rate, whatever the gradient) or sgd.
        lr: the configured rate.
        depth: number of blocks over that of the base model.
        data, batch: what the run sees in all and in a step, in tokens (samples, where these are no token sequences).
    """

    family: str
    lr: float
    depth: float = 1.0
    data: float = 1.0
    batch: float = 1.0


@dataclass(frozen=True)
class Setting:
    """A factor of a module (`modules.scales`) as it is and as it is in the base model, and the growth of its weight."""

    kind: str
    own: float
    base: float
    weight: Growth | None = None

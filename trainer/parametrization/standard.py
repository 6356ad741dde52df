"""Standard parametrisation: one rate for all; vectors (gains, biases) are not decayed."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from modules.roles import roles
from trainer.parametrization.rule import Rule


@dataclass
class StandardConfig:
    """`decay_vectors`: also decay gains and biases."""

    decay_vectors: bool = False


class Standard:
    """Every tensor trains at the configured rate, with the initial scale that its module gave it."""

    config_class: ClassVar[type] = StandardConfig

    def __init__(self, config: StandardConfig) -> None:
        self.config = config

    def rules(self, network: nn.Module) -> dict[str, Rule]:
        """Parameter name -> rule, for the unsharded `network`."""
        plain = 1.0 if self.config.decay_vectors else 0.0
        return {
            name: Rule(role, decay_scale=plain if role == "vector" else 1.0) for name, role in roles(network).items()
        }

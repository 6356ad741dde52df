"""Standard parametrisation: one rate for all; vectors (gains, biases) are not decayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trainer.parametrization.parts import Kind, Part, VectorsConfig


@dataclass
class StandardConfig(VectorsConfig):
    """`decay_vectors`: also decay gains and biases."""


class Standard(Part):
    """Every tensor trains at the configured rate, with the initial scale that its module gave it."""

    config_class: ClassVar[type] = StandardConfig
    kind: ClassVar[Kind] = "width"

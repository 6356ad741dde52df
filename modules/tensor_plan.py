"""How the matrices of a network can be split over devices that compute one sample together (tensor parallelism).

A network that allows it has a method `tensor_plan() -> TensorPlan`. The plan is data: it names modules and says how
each is cut; nothing here and nothing in the network knows of devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["column", "row", "gather", "heads", "replicate", "share"]


@dataclass(frozen=True)
class TensorPlan:
    """Cuts of a network over n devices (arXiv:1909.08053); activations between the cuts are whole on each device.

    `splits`: module path -> how it is cut, `*` standing for one part of a path, such as `layers.*.mlp.up`:

    - `column`: a linear map cut along its outputs; takes the whole input, gives this device's part of the last axis.
    - `row`: a linear map cut along its inputs; takes this device's part, gives the whole output (one all-reduce).
    - `gather`: a table or linear map cut along its rows; takes the whole input, gives the whole output.
    - `heads`: a module between a column and a row map that works on `(B, L, heads, features)` and has the same
      parameters for each head; its input and output are cut along the heads.
    - `replicate`: whole on each device, and so are its input and output.

    - `share`: a module without parameters of its own whose `column` maps all take its input: with it, the gradient of
      that input is reduced once and not once per map.

    Every module that owns parameters must be covered. `divisible`: config field -> value that n must divide.
    """

    splits: Mapping[str, Split]
    divisible: Mapping[str, int] = field(default_factory=dict)

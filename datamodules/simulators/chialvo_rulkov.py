"""Chains of Chialvo and Rulkov neurons, coupled both ways by linear diffusion of the voltages.

    x_i -> map_i(x_i, y_i) + from_left_(i-1) (x_(i-1) - x_i) + from_right_i (x_(i+1) - x_i)

with the maps of `neuron_maps`. The default "crc", two Chialvo neurons with a Rulkov neuron between them and four
strengths (sigma_12 and sigma_32 act on the outer neurons, sigma_21 and sigma_23 on the inner one), is the heterogeneous
chain of Ghosh, Nair, Fatoyinbo and Muni (arXiv 2405.05675).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law, SimulationConfig
from .integrators import constant
from .neuron_maps import chialvo, rulkov
from .trajectories import IteratedMap, MapConfig


@dataclass
class ChialvoRulkovConfig(MapConfig):
    """Data set of a chain of neurons; see `MapConfig` for the rest.

    chain: one letter a neuron, c (Chialvo) or r (Rulkov).
    from_left, from_right: strengths on each link, on the neuron at its right end and at its left end.
    a, b, c, k: of Chialvo neurons; alpha, mu, sigma: of Rulkov neurons; ranges.
    """

    drawn: ClassVar[dict[str, Law]] = {
        "a": "uniform", "b": "uniform", "c": "uniform", "k": "uniform",
        "alpha": "uniform", "mu": "uniform", "sigma": "uniform",
    }  # fmt: skip

    chain: str = "crc"
    from_left: list[float] = field(default_factory=lambda: [0.05, 0.01])
    from_right: list[float] = field(default_factory=lambda: [0.01, 0.05])
    a: list[float] = field(default_factory=lambda: [0.89, 0.89])
    b: list[float] = field(default_factory=lambda: [0.18, 0.18])
    c: list[float] = field(default_factory=lambda: [0.28, 0.28])
    k: list[float] = field(default_factory=lambda: [0.03, 0.03])
    alpha: list[float] = field(default_factory=lambda: [4.3, 4.3])
    mu: list[float] = field(default_factory=lambda: [1e-3, 1e-3])
    sigma: list[float] = field(default_factory=lambda: [-1.0, -1.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.chain) < 2 or set(self.chain) - set("cr"):
            raise ValueError(f"chain={self.chain!r}: must be two letters or more, each c (Chialvo) or r (Rulkov)")
        for name in ("from_left", "from_right"):
            if len(getattr(self, name)) != len(self.chain) - 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: needs one strength for each of the {len(self.chain) - 1} links"
                )


class ChialvoRulkov(IteratedMap):
    """Generator; initial voltages are uniform in [0, 1], recoveries too for Chialvo and in [-3.5, -2.5] for Rulkov."""

    config_class: ClassVar[type[SimulationConfig]] = ChialvoRulkovConfig
    equation = (
        "x_i -> map_i(x_i, y_i) + from_left (x_(i-1) - x_i) + from_right (x_(i+1) - x_i); "
        "Chialvo: x^2 exp(y - x) + k, a y - b x + c; Rulkov: alpha / (1 + x^2) + y, y - mu (x - sigma)"
    )

    def components(self) -> tuple[str, ...]:
        n = range(len(self.config.chain))
        return tuple(f"x{i}" for i in n) + tuple(f"y{i}" for i in n)

    def fixed(self) -> dict[str, Any]:
        c = self.config
        return {"chain": c.chain, "from_left": list(c.from_left), "from_right": list(c.from_right)}

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        is_rulkov = np.array([letter == "r" for letter in self.config.chain])
        voltage, recovery = rng.uniform(0, 1, (2, len(is_rulkov)))
        return np.concatenate([voltage, np.where(is_rulkov, recovery - 3.5, recovery)])

    def step(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        c, n = self.config, len(self.config.chain)
        q = {name: value[..., None] for name, value in p.items()}
        voltage, recovery = x[..., :n], x[..., n:]
        # Each map is evaluated where it belongs only: elsewhere the exponential could overflow.
        places = [tuple(i for i, letter in enumerate(c.chain) if letter == kind) for kind in "cr"]
        first_c = tuple(sorted(range(n), key=(*places[0], *places[1]).__getitem__))
        is_c, is_r, order = (constant(indices, torch.int64, x.device) for indices in (*places, first_c))
        cx, cy = chialvo(voltage[..., is_c], recovery[..., is_c], q["a"], q["b"], q["c"], q["k"])
        rx, ry = rulkov(voltage[..., is_r], recovery[..., is_r], q["alpha"], q["mu"], q["sigma"])
        fired, recovered = torch.cat([cx, rx], -1)[..., order], torch.cat([cy, ry], -1)[..., order]
        rise = voltage.diff(dim=-1)  # x_(i+1) - x_i on each link
        right, left = (constant(tuple(links), x.dtype, x.device) for links in (c.from_right, c.from_left))
        zero = torch.zeros_like(voltage[..., :1])
        coupled = torch.cat([right * rise, zero], -1) - torch.cat([zero, left * rise], -1)
        return torch.cat([fired + coupled, recovered], -1)

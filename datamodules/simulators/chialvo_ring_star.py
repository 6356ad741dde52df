"""Chialvo neurons on a ring-star network with pairwise and higher-order diffusive coupling.

Neuron 0 is the hub; neurons 1 ... N-1 form a ring, each joined to its two neighbours and to the hub. Recovery follows
`neuron_maps.chialvo`; the voltage gets

    x_i -> chialvo(x_i, y_i) + sum_j w_ij (x_j - x_i) + triadic sum_(i,j,k) (x_j + x_k - 2 x_i)

with w = star on spokes and w = ring on the ring; the second sum runs over the triangles of the graph. N = 4, where the
graph is complete and has four triangles, is the smallest such network (Nair, Ghosh, Fatoyinbo and Muni,
arXiv 2405.06000: two-body and three-body linear diffusive couplings).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law, SimulationConfig
from .neuron_maps import chialvo
from .trajectories import IteratedMap, MapConfig


@dataclass
class ChialvoRingStarConfig(MapConfig):
    """Data set of a Chialvo ring-star network; see `MapConfig` for the rest.

    neurons: N with the hub. a, b, c, k: of the neurons. star, ring, triadic: coupling strengths. All but N are ranges.
    The defaults (pairs repel, triples attract) give chaos without synchrony; star = ring = 0.05 synchronises.
    """

    drawn: ClassVar[dict[str, Law]] = {
        "a": "uniform", "b": "uniform", "c": "uniform", "k": "uniform",
        "star": "uniform", "ring": "uniform", "triadic": "uniform",
    }  # fmt: skip

    neurons: int = 4
    a: list[float] = field(default_factory=lambda: [0.89, 0.89])
    b: list[float] = field(default_factory=lambda: [0.18, 0.18])
    c: list[float] = field(default_factory=lambda: [0.28, 0.28])
    k: list[float] = field(default_factory=lambda: [0.03, 0.03])
    star: list[float] = field(default_factory=lambda: [-0.02, -0.02])
    ring: list[float] = field(default_factory=lambda: [-0.01, -0.01])
    triadic: list[float] = field(default_factory=lambda: [0.005, 0.005])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neurons < 4:
            raise ValueError(f"neurons={self.neurons}: must be at least 4, a hub and a ring of three")


class ChialvoRingStar(IteratedMap):
    """Generator; initial voltages and recoveries are uniform in [0, 1]."""

    config_class: ClassVar[type[SimulationConfig]] = ChialvoRingStarConfig
    equation = (
        "x_i -> x_i^2 exp(y_i - x_i) + k + sum_j w_ij (x_j - x_i) + triadic sum_(i,j,k) (x_j + x_k - 2 x_i); "
        "y_i -> a y_i - b x_i + c; w = star to the hub (neuron 0), ring along the ring"
    )

    def components(self) -> tuple[str, ...]:
        n = range(self.config.neurons)
        return tuple(f"x{i}" for i in n) + tuple(f"y{i}" for i in n)

    def fixed(self) -> dict[str, Any]:
        return {"neurons": self.config.neurons}

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(0, 1, 2 * self.config.neurons)

    @cached_property
    def laplacians(self) -> dict[str, Tensor]:
        """The linear maps [N, N] by which voltages act on voltages, one per strength, on the device; rows sum to 0."""
        n = self.config.neurons
        weights = {name: torch.zeros(n, n, dtype=torch.float64) for name in ("star", "ring", "triadic")}
        weights["star"][0, 1:] = weights["star"][1:, 0] = 1
        for i in range(1, n):
            j = i % (n - 1) + 1
            weights["ring"][i, j] = weights["ring"][j, i] = 1
        linked = weights["star"] + weights["ring"]
        for triangle in combinations(range(n), 3):
            if all(linked[i, j] for i, j in combinations(triangle, 2)):
                for i, j in combinations(triangle, 2):
                    weights["triadic"][i, j] += 1
                    weights["triadic"][j, i] += 1
        return {name: (w - torch.diag(w.sum(1))).to(self.device) for name, w in weights.items()}

    def step(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        n = self.config.neurons
        voltage, recovery = x[..., :n], x[..., n:]
        a, b, c, k = (p[name][..., None] for name in ("a", "b", "c", "k"))
        fired, recovered = chialvo(voltage, recovery, a, b, c, k)
        coupled = sum(p[name][..., None] * (voltage @ w.T) for name, w in self.laplacians.items())
        return torch.cat([fired + coupled, recovered], -1)

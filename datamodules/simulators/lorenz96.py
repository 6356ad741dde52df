"""The Lorenz 96 model (Proc. ECMWF Seminar on Predictability, 1996), with one level or two, on a ring of K sites.

    x_k' = (x_(k+1) - x_(k-2)) x_(k-1) - x_k + F - (h c / b) sum_j y_(j,k)
    y_j' = -c b y_(j+1) (y_(j+2) - y_(j-1)) - c y_j + (h c / b) x_k(j)

The second level has J variables per site, all on one ring of J K; without it (J = 0) the sum is absent. The products conserve
sum x^2 + sum y^2, and so does the coupling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law, SimulationConfig
from .trajectories import Ode, OdeConfig


@dataclass
class Lorenz96Config(OdeConfig):
    """Data set of Lorenz 96 trajectories; see `OdeConfig` for the rest.

    sites: K. forcing: F, a range. fast: J, variables of the second level per site; 0: one level.
    coupling, time_ratio, amplitude_ratio: h, c and b of the second level (without effect if fast = 0).
    """

    drawn: ClassVar[dict[str, Law]] = {"forcing": "uniform"}

    sites: int = 40
    forcing: list[float] = field(default_factory=lambda: [8.0, 8.0])
    fast: int = 0
    coupling: float = 1.0
    time_ratio: float = 10.0
    amplitude_ratio: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sites < 4:
            raise ValueError(f"sites={self.sites}: must be at least 4, as a site depends on three others")
        if self.fast < 0:
            raise ValueError(f"fast={self.fast}: must be >= 0; 0 leaves the second level out")
        self.need_positive("time_ratio", "amplitude_ratio")


class Lorenz96(Ode):
    """Generator; the initial state is F plus noise of standard deviation 1 (0.1 on the second level)."""

    config_class: ClassVar[type[SimulationConfig]] = Lorenz96Config
    equation = (
        "x_k' = (x_(k+1) - x_(k-2)) x_(k-1) - x_k + forcing - (h c / b) sum_j y_(j,k); "
        "y_j' = -c b y_(j+1) (y_(j+2) - y_(j-1)) - c y_j + (h c / b) x_k(j)"
    )

    def components(self) -> tuple[str, ...]:
        c = self.config
        slow = tuple(f"x{k}" for k in range(c.sites))
        return slow + tuple(f"y{k}_{j}" for k in range(c.sites) for j in range(c.fast))

    def fixed(self) -> dict[str, Any]:
        c = self.config
        second = {"fast": c.fast, "h": c.coupling, "c": c.time_ratio, "b": c.amplitude_ratio} if c.fast else {}
        return {"sites": c.sites, **second}

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        c = self.config
        slow = np.mean(c.forcing) + rng.standard_normal(c.sites)
        return np.concatenate([slow, 0.1 * rng.standard_normal(c.sites * c.fast)])

    def rhs(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        c = self.config
        x, y = x[..., : c.sites], x[..., c.sites :]
        slow = (x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + p["forcing"][..., None]
        if not c.fast:
            return slow
        g = c.coupling * c.time_ratio / c.amplitude_ratio
        slow = slow - g * y.unflatten(-1, (c.sites, c.fast)).sum(-1)
        turn = c.amplitude_ratio * y.roll(-1, -1) * (y.roll(-2, -1) - y.roll(1, -1))
        fast = -c.time_ratio * (turn + y) + g * x.repeat_interleave(c.fast, -1)
        return torch.cat([slow, fast], -1)

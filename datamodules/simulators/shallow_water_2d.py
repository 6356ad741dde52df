"""2D shallow water over a flat bottom: a column of water, the radial dam break of PDEBench (arXiv 2210.07182).

    h_t + div (h v) = 0,    (h v)_t + div (h v v + g h^2 / 2) = 0

Finite volumes (see `finite_volume`) with the HLL flux, whose tangential momentum goes with the mass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law as Draw
from .fields import Simulation, SimulationConfig, trajectory_rng
from .finite_volume import BOUNDARIES, LIMITERS, FiniteVolumes, Pad

SUBCELLS = 8  # points per cell and axis that find the share of a cell inside the column


@dataclass
class ShallowWater2DConfig(SimulationConfig):
    """Data set of dam breaks; see `SimulationConfig` for the rest.

    resolution: cells per side. length: of a side. gravity: g.
    radius, inner_height: ranges for the column. outer_height: of the water around it.
    offset: the column stands at most this share of a side from the middle.
    boundary: "outflow" or "periodic". limiter: minmod, mc or van_leer. cfl: see `FiniteVolumes`.
    """

    drawn: ClassVar[dict[str, Draw]] = {"radius": "uniform", "inner_height": "uniform"}

    dt_save: float = 0.05
    batch: int = 8
    resolution: int = 128
    length: float = 5.0
    gravity: float = 1.0
    radius: list[float] = field(default_factory=lambda: [0.3, 0.7])
    inner_height: list[float] = field(default_factory=lambda: [2.0, 2.0])
    outer_height: float = 1.0
    offset: float = 0.0
    boundary: str = "outflow"
    limiter: str = "minmod"
    cfl: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_even("resolution")
        self.need_positive("length", "gravity", "radius", "inner_height", "outer_height", "cfl")
        if not 0 <= self.offset <= 0.5:
            raise ValueError(f"offset={self.offset}: must be from 0 to 0.5")
        if self.cfl > 0.5:
            raise ValueError(f"cfl={self.cfl}: unstable; use at most 0.5")
        self.need_choice("boundary", BOUNDARIES)
        self.need_choice("limiter", tuple(LIMITERS))


class ShallowWater:
    """The law: conserved (h, h u, h v), primitive (h, u, v)."""

    def __init__(self, gravity: float) -> None:
        self.gravity = gravity

    def primitive(self, q: Tensor) -> Tensor:
        return torch.cat([q[:, :1], q[:, 1:] / q[:, :1]], 1)

    def conserved(self, w: Tensor) -> Tensor:
        return torch.cat([w[:, :1], w[:, 1:] * w[:, :1]], 1)

    def rate(self, w: Tensor, spacing: tuple[float, float]) -> Tensor:
        c = (self.gravity * w[:, 0]).sqrt()
        return (w[:, 1].abs() + c) / spacing[0] + (w[:, 2].abs() + c) / spacing[1]

    def diffusive_flux(self, w: Tensor, axis: int, spacing: tuple[float, float], pad: Pad) -> None:
        return None

    def flux(self, left: Tensor, right: Tensor, axis: int) -> Tensor:
        """HLL with the speeds of Davis; where the mass comes from decides about the momentum along the face."""
        (h_l, u_l, t_l), (h_r, u_r, t_r) = ((w[:, 0], w[:, 1 + axis], w[:, 2 - axis]) for w in (left, right))
        c_l, c_r = (self.gravity * h_l).sqrt(), (self.gravity * h_r).sqrt()
        slow = torch.minimum(u_l - c_l, u_r - c_r).clamp_max(0.0)
        fast = torch.maximum(u_l + c_l, u_r + c_r).clamp_min(0.0)

        def hll(f_l: Tensor, f_r: Tensor, q_l: Tensor, q_r: Tensor) -> Tensor:
            return (fast * f_l - slow * f_r + fast * slow * (q_r - q_l)) / (fast - slow)

        m_l, m_r = h_l * u_l, h_r * u_r
        mass = hll(m_l, m_r, h_l, h_r)
        half = 0.5 * self.gravity
        normal = hll(m_l * u_l + half * h_l.square(), m_r * u_r + half * h_r.square(), m_l, m_r)
        tangential = mass * torch.where(mass > 0, t_l, t_r)
        return torch.stack([mass, normal, tangential] if axis == 0 else [mass, tangential, normal], 1)


class ShallowWater2D(Simulation):
    """Generator; `radius` and `inner_height` [trajectory] beside `fields` [trajectory, time, 3, x, y]."""

    config_class: ClassVar[type[SimulationConfig]] = ShallowWater2DConfig
    channels = ("height", "velocity_x", "velocity_y")

    def coordinates(self) -> dict[str, np.ndarray]:
        c = self.config
        centres = c.length * ((np.arange(c.resolution) + 0.5) / c.resolution - 0.5)
        return {"x": centres, "y": centres}

    def description(self) -> dict[str, Any]:
        c = self.config
        return {
            "equation": "h_t + div (h v) = 0; (h v)_t + div (h v v + gravity h^2 / 2) = 0",
            "parameters": {"gravity": c.gravity, "outer_height": c.outer_height, "offset": c.offset},
            "units": {
                "length": "1",
                "time": "1",
                "height": "length",
                "velocity_x": "length/time",
                "velocity_y": "length/time",
                "radius": "length",
            },
            "domain": {"x": [-c.length / 2, c.length / 2], "y": [-c.length / 2, c.length / 2]},
            "boundary_conditions": {"x": c.boundary, "y": c.boundary},
            "solver": {"scheme": f"MUSCL ({c.limiter}), HLL, Heun", "cfl": c.cfl, "precision": "float64"},
        }

    def _column(self, seed: int) -> np.ndarray:
        """Mean heights of the cells, [N, N]; the edge of the column is sampled below the size of a cell."""
        c = self.config
        centre = c.offset * c.length * trajectory_rng(seed, "centre").uniform(-1, 1, 2)
        n = c.resolution * SUBCELLS
        points = c.length * ((np.arange(n) + 0.5) / n - 0.5)
        inside = np.hypot(points[:, None] - centre[0], points - centre[1]) <= self.draw("radius", seed)
        share = inside.reshape(c.resolution, SUBCELLS, c.resolution, SUBCELLS).mean((1, 3))
        return np.asarray(c.outer_height + share * (self.draw("inner_height", seed) - c.outer_height))

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        h = torch.from_numpy(np.stack([self._column(seed) for seed in seeds])).to(self.device)
        w = torch.stack([h, torch.zeros_like(h), torch.zeros_like(h)], 1)
        spacing = c.length / c.resolution
        solver = FiniteVolumes(ShallowWater(c.gravity), (spacing, spacing), c.boundary, c.limiter, c.cfl)
        return solver.run(w, c.dt_save, c.frames)

    def unstable(self) -> str:
        return f"cfl={self.config.cfl}"

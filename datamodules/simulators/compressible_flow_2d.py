"""2D compressible flow of an ideal gas on the periodic unit square: Euler, or Navier-Stokes with constant viscosity.

    d_t (rho, rho v, E) + div (rho v, rho v v + p - sigma, (E + p) v - sigma . v) = 0,    E = p / (gamma - 1) + rho |v|^2 / 2
    sigma = viscosity (grad v + grad v^T - 2/3 div v) + viscosity div v

The equations (shear and bulk viscosity equal, no conduction of heat) are those of PDEBench's 2D compressible flow (arXiv
2210.07182), and the initial states are in its manner: long waves of random phase in all four fields. Finite volumes (see `finite_volume`) with the HLLC flux (Toro, Spruce and Speares, Shock
Waves 4, 1994), central differences for the viscous stress.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .fields import Law as Draw
from .fields import Simulation, SimulationConfig, trajectory_rng
from .finite_volume import LIMITERS, FiniteVolumes, Pad
from .random_fields import random_waves


@dataclass
class CompressibleFlow2DConfig(SimulationConfig):
    """Data set of compressible flows; see `SimulationConfig` for the rest.

    resolution: cells per side. gamma: ratio of specific heats.
    mach: range of the Mach number of the initial state: rms speed over the speed of sound at mean density and pressure.
    viscosity: range, shear and bulk alike; [0, 0] is the Euler equations.
    density, temperature: ranges of the means; pressure = density * temperature.
    density_contrast, pressure_contrast: ranges of the largest relative departure from the mean.
    modes: highest wave number of the initial state. limiter: minmod, mc or van_leer. cfl: see `FiniteVolumes`.
    """

    drawn: ClassVar[dict[str, Draw]] = {
        "mach": "log",
        "viscosity": "log",
        "density": "uniform",
        "temperature": "uniform",
        "density_contrast": "uniform",
        "pressure_contrast": "uniform",
    }

    dt_save: float = 0.05
    batch: int = 8
    resolution: int = 128
    gamma: float = 5 / 3
    mach: list[float] = field(default_factory=lambda: [0.1, 1.0])
    viscosity: list[float] = field(default_factory=lambda: [0.0, 0.0])
    density: list[float] = field(default_factory=lambda: [0.1, 10.0])
    temperature: list[float] = field(default_factory=lambda: [0.1, 10.0])
    density_contrast: list[float] = field(default_factory=lambda: [0.01, 0.2])
    pressure_contrast: list[float] = field(default_factory=lambda: [0.01, 0.2])
    modes: int = 4
    limiter: str = "mc"
    cfl: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_even("resolution")
        self.need_positive("mach", "density", "temperature", "modes", "cfl")
        if self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma}: must be above 1")
        for name in ("density_contrast", "pressure_contrast"):
            low, high = getattr(self, name)
            if low < 0 or high > 0.9:
                raise ValueError(f"{name}={[low, high]}: must lie within 0 and 0.9")
        if self.cfl > 0.5:
            raise ValueError(f"cfl={self.cfl}: unstable; use at most 0.5")
        if self.modes >= self.resolution // 2:
            raise ValueError(f"modes={self.modes}: {self.resolution} cells resolve fewer than {self.resolution // 2}")
        self.need_choice("limiter", tuple(LIMITERS))


class IdealGas:
    """The law: conserved (rho, rho u, rho v, E), primitive (rho, u, v, p); viscosity [B, 1, 1] or None."""

    def __init__(self, gamma: float, viscosity: Tensor | None = None) -> None:
        self.gamma, self.viscosity = gamma, viscosity

    def primitive(self, q: Tensor) -> Tensor:
        rho, m_x, m_y, energy = q.unbind(1)
        u, v = m_x / rho, m_y / rho
        return torch.stack([rho, u, v, (self.gamma - 1) * (energy - 0.5 * (m_x * u + m_y * v))], 1)

    def conserved(self, w: Tensor) -> Tensor:
        rho, u, v, p = w.unbind(1)
        return torch.stack([rho, rho * u, rho * v, self._energy(rho, u, v, p)], 1)

    def _energy(self, rho: Tensor, u: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return p / (self.gamma - 1) + 0.5 * rho * (u.square() + v.square())

    def rate(self, w: Tensor, spacing: tuple[float, float]) -> Tensor:
        c = (self.gamma * w[:, 3] / w[:, 0]).sqrt()
        rate = (w[:, 1].abs() + c) / spacing[0] + (w[:, 2].abs() + c) / spacing[1]
        if self.viscosity is not None:  # 4/3 of shear and 1 of bulk viscosity act on compression
            rate = rate + 2 * (7 / 3) * self.viscosity / w[:, 0] * (spacing[0] ** -2 + spacing[1] ** -2)
        return rate

    def flux(self, left: Tensor, right: Tensor, axis: int) -> Tensor:
        """HLLC, with Einfeldt's estimates of the fastest waves."""
        (r_l, u_l, t_l, p_l), (r_r, u_r, t_r, p_r) = (
            (w[:, 0], w[:, 1 + axis], w[:, 2 - axis], w[:, 3]) for w in (left, right)
        )
        e_l, e_r = self._energy(r_l, u_l, t_l, p_l), self._energy(r_r, u_r, t_r, p_r)
        weight = 1 / (1 + (r_r / r_l).sqrt())  # of the left state in Roe's mean
        u, t = weight * u_l + (1 - weight) * u_r, weight * t_l + (1 - weight) * t_r
        enthalpy = weight * (e_l + p_l) / r_l + (1 - weight) * (e_r + p_r) / r_r
        c = ((self.gamma - 1) * (enthalpy - 0.5 * (u.square() + t.square()))).sqrt()
        s_l = torch.minimum(u_l - (self.gamma * p_l / r_l).sqrt(), u - c)
        s_r = torch.maximum(u_r + (self.gamma * p_r / r_r).sqrt(), u + c)
        into_l, into_r = r_l * (s_l - u_l), r_r * (s_r - u_r)
        contact = (p_r - p_l + into_l * u_l - into_r * u_r) / (into_l - into_r)
        # The state beside the contact that the face x/t = 0 lies on, then its flux by the jump across the outer wave.
        on_left = contact >= 0
        rho, normal, tangential, p, energy, wave, into = (
            torch.where(on_left, a, b)
            for a, b in ((r_l, r_r), (u_l, u_r), (t_l, t_r), (p_l, p_r), (e_l, e_r), (s_l, s_r), (into_l, into_r))
        )
        star = into / (wave - contact)
        work = energy / rho + (contact - normal) * (contact + p / into)
        jump = torch.where(on_left, wave.clamp_max(0.0), wave.clamp_min(0.0))  # 0 where all waves run to one side
        mass = rho * normal + jump * (star - rho)
        along = rho * normal.square() + p + jump * (star * contact - rho * normal)
        across = rho * normal * tangential + jump * (star - rho) * tangential
        heat = (energy + p) * normal + jump * (star * work - energy)
        return torch.stack([mass, along, across, heat] if axis == 0 else [mass, across, along, heat], 1)

    def diffusive_flux(self, w: Tensor, axis: int, spacing: tuple[float, float], pad: Pad) -> Tensor | None:
        """Minus the viscous stress and its work."""
        if self.viscosity is None:
            return None
        other, dim = 1 - axis, axis - 2
        velocity = pad(w[:, 1:3], 1, axis)
        along = velocity.diff(dim=dim) / spacing[axis]  # d/d(axis) of (u, v) on faces
        wide = pad(velocity, 1, other)
        n = velocity.shape[other - 2]
        centred = (wide.narrow(other - 2, 2, n) - wide.narrow(other - 2, 0, n)) / (2 * spacing[other])

        def on_faces(x: Tensor) -> Tensor:
            return 0.5 * (x.narrow(dim, 0, x.shape[dim] - 1) + x.narrow(dim, 1, x.shape[dim] - 1))

        beside, mean = on_faces(centred), on_faces(velocity)
        divergence = along[:, axis] + beside[:, other]
        normal = self.viscosity * (2 * along[:, axis] + divergence / 3)
        shear = self.viscosity * (along[:, other] + beside[:, axis])
        work = normal * mean[:, axis] + shear * mean[:, other]
        stress = [normal, shear] if axis == 0 else [shear, normal]
        return -torch.stack([torch.zeros_like(work), *stress, work], 1)


class CompressibleFlow2D(Simulation):
    """Generator; `mach`, `viscosity`, ... [trajectory] beside `fields` [trajectory, time, 4, x, y]."""

    config_class: ClassVar[type[SimulationConfig]] = CompressibleFlow2DConfig
    channels = ("density", "velocity_x", "velocity_y", "pressure")

    def coordinates(self) -> dict[str, np.ndarray]:
        centres = (np.arange(self.config.resolution) + 0.5) / self.config.resolution
        return {"x": centres, "y": centres}

    def description(self) -> dict[str, Any]:
        c = self.config
        return {
            "equation": "rho_t + div (rho v) = 0; (rho v)_t + div (rho v v + p - sigma) = 0; "
            "E_t + div ((E + p) v - sigma . v) = 0; E = p / (gamma - 1) + rho |v|^2 / 2; "
            "sigma = viscosity (grad v + grad v^T + 1/3 div v)",
            "parameters": {"gamma": c.gamma, "modes": c.modes},
            "units": {
                "length": "box side",
                "time": "1",
                "density": "1",
                "velocity_x": "length/time",
                "velocity_y": "length/time",
                "pressure": "density length^2/time^2",
                "viscosity": "density length^2/time",
            },
            "domain": {"x": [0.0, 1.0], "y": [0.0, 1.0]},
            "boundary_conditions": {"x": "periodic", "y": "periodic"},
            "solver": {"scheme": f"MUSCL ({c.limiter}), HLLC, Heun", "cfl": c.cfl, "precision": "float64"},
        }

    def _state(self, seed: int) -> Tensor:
        """Random smooth (rho, u, v, p), [4, N, N]."""
        c, rng = self.config, trajectory_rng(seed, "initial")
        rho, u, v, p = (random_waves(c.resolution, c.modes, rng) for _ in range(4))
        density, pressure = self.draw("density", seed), self.draw("density", seed) * self.draw("temperature", seed)
        sound = (c.gamma * pressure / density) ** 0.5
        speed = self.draw("mach", seed) * sound / (u.square() + v.square()).mean().sqrt()
        return torch.stack(
            [
                density * (1 + self.draw("density_contrast", seed) * rho),
                speed * u,
                speed * v,
                pressure * (1 + self.draw("pressure_contrast", seed) * p),
            ]
        )

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        viscosity = self.drawn("viscosity", seeds, 2) if c.viscosity[1] else None
        spacing = 1.0 / c.resolution
        solver = FiniteVolumes(IdealGas(c.gamma, viscosity), (spacing, spacing), "periodic", c.limiter, c.cfl)
        state = torch.stack([self._state(seed) for seed in seeds]).to(self.device)
        return solver.run(state, c.dt_save, c.frames)

    def unstable(self) -> str:
        return f"cfl={self.config.cfl}"

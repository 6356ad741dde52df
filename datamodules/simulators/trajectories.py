"""What all systems without space share: ordinary differential equations and maps, written as time series.

Arrays: `fields` [trajectory, time, channel] float32, `time`, and one array [trajectory] per drawn parameter.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from datamodules.format import ArraySpec

from .fields import Simulation, SimulationConfig, trajectory_rng, whole_steps
from .integrators import dopri5, iterate, rk4

CHUNK_BYTES = 4096  # frames are a few bytes: a chunk of one frame would be mostly checksum and index
SCHEMES = ("rk4", "dopri5")


@dataclass
class OdeConfig(SimulationConfig):
    """Data set of an ordinary differential equation; see `SimulationConfig` for the rest.

    burn_in: time from the initial state to the first frame, to reach the attractor.
    scheme: "rk4" with the fixed step dt, or "dopri5" with steps chosen for the tolerances rtol and atol.
    """

    frames: int = 512
    dt_save: float = 0.05
    burn_in: float = 10.0
    scheme: str = "rk4"
    dt: float = 0.01
    rtol: float = 1e-9
    atol: float = 1e-9
    batch: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_choice("scheme", SCHEMES)
        self.need_positive("dt", "rtol", "atol")
        if self.scheme == "rk4":
            self.need_whole("dt_save", self.dt)
            self.need_whole("burn_in", self.dt)
        elif self.burn_in < 0:
            raise ValueError(f"burn_in={self.burn_in}: must be >= 0")


@dataclass
class MapConfig(SimulationConfig):
    """Data set of a map; see `SimulationConfig` for the rest. Time counts iterations.

    burn_in: iterations from the initial state to the first frame. dt_save: iterations between frames.
    """

    frames: int = 512
    burn_in: int = 1000
    batch: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need_whole("dt_save", 1.0)
        if self.burn_in < 0:
            raise ValueError(f"burn_in={self.burn_in}: must be >= 0")


class Trajectories(Simulation):
    """A generator of time series. A subclass gives `equation`, `components`, `initial` and how to solve."""

    equation: ClassVar[str]
    units: ClassVar[dict[str, str]] = {"time": "1"}

    @abstractmethod
    def components(self) -> tuple[str, ...]:
        """Names of the components that are stored."""

    @abstractmethod
    def initial(self, rng: np.random.Generator) -> np.ndarray:
        """A random initial state, [C] float64."""

    def observe(self, x: Tensor) -> Tensor:
        """What is stored of states [..., C]: [..., len(channels)]."""
        return x

    def solver(self) -> dict[str, Any]:
        """How it is solved, for the attributes."""
        return {"precision": "float64"}

    def fixed(self) -> dict[str, Any]:
        """Parameters that are the same in all trajectories, for the attributes."""
        return {}

    @property
    def channels(self) -> tuple[str, ...]:
        """The same: they may depend on the config."""
        return self.components()

    def coordinates(self) -> dict[str, np.ndarray]:
        return {}

    def description(self) -> dict[str, Any]:
        return {
            "equation": self.equation,
            "parameters": self.fixed(),
            "units": dict(self.units),
            "domain": {},
            "boundary_conditions": {},
            "solver": self.solver(),
        }

    def specs(self) -> dict[str, ArraySpec]:
        specs = super().specs()
        frame = 4 * len(self.channels)
        frames = self.config.frames
        chunk = max(n for n in range(1, frames + 1) if frames % n == 0 and (n == 1 or n * frame <= CHUNK_BYTES))
        return {**specs, "fields": dataclasses.replace(specs["fields"], chunk_length=chunk)}

    def initial_states(self, seeds: list[int]) -> Tensor:
        """Initial states [B, C] of the trajectories of these seeds."""
        states = np.stack([self.initial(trajectory_rng(seed, "initial")) for seed in seeds])
        return torch.from_numpy(states).to(self.device)

    def parameters(self, seeds: list[int]) -> dict[str, Tensor]:
        """The drawn parameters of the trajectories of these seeds, [B] each."""
        return {name: self.drawn(name, seeds) for name in self.config.drawn}


class Ode(Trajectories):
    """A generator of trajectories of x' = rhs(x, parameters)."""

    @abstractmethod
    def rhs(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """Time derivative of states [..., C] with parameters [...] each."""

    def solver(self) -> dict[str, Any]:
        c = self.config
        step = {"dt": c.dt} if c.scheme == "rk4" else {"rtol": c.rtol, "atol": c.atol}
        return {"scheme": c.scheme, **step, "precision": "float64"}

    def solve(self, seeds: list[int]) -> Tensor:
        c, p = self.config, self.parameters(seeds)
        x = self.initial_states(seeds)
        if c.scheme == "rk4":
            every, first = whole_steps(c.dt_save, c.dt) or 1, whole_steps(c.burn_in, c.dt) or 0
            states = rk4(lambda x: self.rhs(x, p), x, c.dt, first, every, c.frames)
        else:
            times = [c.burn_in + c.dt_save * i for i in range(c.frames)]
            states = dopri5(lambda x: self.rhs(x, p), x, times, c.rtol, c.atol)
        return self.observe(states)

    def unstable(self) -> str:
        c = self.config
        return f"dt={c.dt}" if c.scheme == "rk4" else f"scheme={c.scheme}"


class IteratedMap(Trajectories):
    """A generator of trajectories of x_(n+1) = step(x_n, parameters)."""

    units: ClassVar[dict[str, str]] = {"time": "iteration"}

    @abstractmethod
    def step(self, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        """The next states of states [..., C] with parameters [...] each."""

    def solve(self, seeds: list[int]) -> Tensor:
        c, p = self.config, self.parameters(seeds)
        x = self.initial_states(seeds)
        states = iterate(lambda x: self.step(x, p), x, c.burn_in, round(c.dt_save), c.frames)
        if not torch.isfinite(states).all():
            raise ValueError(f"{type(self).__name__}: a trajectory ran to infinity; use weaker coupling")
        return self.observe(states)

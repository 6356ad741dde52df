"""Any system of the package `dysts` (Gilpin, arXiv 2110.05266) by name: flows, delay equations and maps.

The package is optional: `pip install dysts`. It integrates flows and maps itself, one trajectory after the other. Its delay
equations are solved by `delay` here, as its own solver is of order 1 in the interval between the frames; as in dysts, their
channels are the solution at equally spaced times from t back to t - tau, and the past is constant.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from .delay import DelaySolution
from .fields import SimulationConfig, trajectory_rng
from .trajectories import Trajectories

METHODS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
DELAY_STEPS = 400  # per period or delay, whichever is shorter
MODULES = {"map": "dysts.maps", "flow": "dysts.flows"}  # a name that both have means the flow


@dataclass
class DystsConfig(SimulationConfig):
    """Data set of one system of dysts; see `SimulationConfig` for the rest.

    system: its class name, such as Lorenz or Henon. kind: "flow" (delay equations too) or "map", for a name that both have, such
    as Duffing; empty: the flow if there is one. dt_save: in periods of its dominant oscillation as dysts lists them;
    iterations for a map (a whole number). burn_in: frames dropped at the start.
    spread: standard deviation of the initial state around the listed one, relative to each component.
    method, rtol, atol: of scipy's solve_ivp; Radau is for stiff systems. Without effect on delay equations and maps.
    device: "cpu", as dysts solves with NumPy.
    """

    frames: int = 512
    dt_save: float = 0.02
    system: str = "Lorenz"
    kind: str = ""
    burn_in: int = 100
    spread: float = 0.01
    method: str = "RK45"
    rtol: float = 1e-9
    atol: float = 1e-9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "cpu":
            raise ValueError(f"device={self.device!r}: dysts solves with NumPy, on the CPU alone; use device: cpu")
        self.need_positive("rtol", "atol")
        self.need_choice("kind", ("", *MODULES))
        self.need_choice("method", METHODS)
        if self.burn_in < 0:
            raise ValueError(f"burn_in={self.burn_in}: must be >= 0")
        if self.spread < 0:
            raise ValueError(f"spread={self.spread}: must be >= 0")


def find_system(name: str, kind: str = "") -> Any:
    """An instance of the system; ValueError if dysts is not installed or has no such system of that kind ("" for any)."""
    known: dict[str, type] = {}
    for module in [MODULES[kind]] if kind else MODULES.values():
        try:
            members = vars(importlib.import_module(module))
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "dysts":
                raise
            raise ValueError(f"system={name}: needs the package dysts; pip install dysts") from error
        # What the module defines itself: base classes are imported into it.
        known |= {key: value for key, value in members.items() if getattr(value, "__module__", "") == module}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see dysts.systems.get_attractor_list()"
        raise ValueError(f"system={name}: dysts has no such {kind or 'system'}; {hint}")
    return known[name]()


class DystsSystem(Trajectories):
    """Generator; channels are x0, x1, ... after dysts' own mapping of unbounded components to bounded ones."""

    config_class: ClassVar[type[SimulationConfig]] = DystsConfig
    version: ClassVar[int] = 3
    equation = "a system of the package dysts, see parameters.system"

    def __init__(self, config: Any, seed: int, shard_bytes: int) -> None:
        self.system = find_system(config.system, config.kind)
        if not hasattr(self.system, "ic"):
            raise ValueError(f"system={config.system}: dysts lists no initial state for it; choose another system")
        self.is_map, self.is_delay = not hasattr(self.system, "period"), hasattr(self.system, "delayed_rhs")
        if self.is_map and config.dt_save != round(config.dt_save):
            raise ValueError(f"dt_save={config.dt_save}: must be a whole number of iterations for a map")
        super().__init__(config, seed, shard_bytes)

    def components(self) -> tuple[str, ...]:
        size = np.atleast_1d(self.system.ic).size if self.is_map else int(self.system.dimension)
        return tuple(f"x{i}" for i in range(size))

    def description(self) -> dict[str, Any]:
        return {**super().description(), "units": {"time": "iteration" if self.is_map else "period"}}

    def fixed(self) -> dict[str, Any]:
        found = {
            "system": self.config.system,
            "values": {k: np.asarray(v).tolist() for k, v in self.system.params.items()},
        }
        if not self.is_map:
            found["period"] = float(self.system.period)
            found["largest_lyapunov_exponent"] = float(self.system.maximum_lyapunov_estimated)
        return found

    def solver(self) -> dict[str, Any]:
        c = self.config
        if self.is_delay:
            return {"package": "dysts", "scheme": "rk4, hermite", "dt": self.delay_step, "precision": "float64"}
        method = {} if self.is_map else {"method": c.method, "rtol": c.rtol, "atol": c.atol}
        return {"package": "dysts", **method, "precision": "float64"}

    def source(self) -> dict[str, Any]:
        try:
            return {"dysts": importlib.metadata.version("dysts")}
        except importlib.metadata.PackageNotFoundError:
            return {"dysts": "unknown"}

    @property
    def delay_step(self) -> float:
        """The longest step of a delay equation."""
        return float(min(self.system.tau, self.system.period)) / DELAY_STEPS

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        listed = np.asarray(self.system.ic, np.float64)
        return np.asarray(listed * (1 + self.config.spread * rng.standard_normal(listed.shape)))

    def solve(self, seeds: list[int]) -> Tensor:
        return torch.from_numpy(np.stack([self.trajectory(seed) for seed in seeds]))

    def trajectory(self, seed: int) -> np.ndarray:
        """The frames [frames, C] of the trajectory of this seed."""
        c = self.config
        start = self.initial(trajectory_rng(seed, "initial"))
        n, every = c.burn_in + c.frames, round(c.dt_save) if self.is_map else 1
        # dysts spreads n points over n / pts_per_period periods, both ends included.
        options = {"pts_per_period": n / ((n - 1) * c.dt_save), "method": c.method, "rtol": c.rtol, "atol": c.atol}
        try:
            if self.is_delay:
                series = self.delayed(float(start[0]), n)
            else:
                series = self.system.make_trajectory(n * every, init_cond=start, **({} if self.is_map else options))
        except (ArithmeticError, ValueError) as error:
            raise ValueError(f"system={c.system}: dysts could not integrate a trajectory ({error})") from error
        if series is None:
            raise ValueError(
                f"system={c.system}: dysts could not integrate a trajectory; use a smaller spread or Radau"
            )
        series = np.asarray(series, np.float64).reshape(-1, len(self.channels))
        return series[every - 1 :: every][c.burn_in :]

    def delayed(self, past: float, n: int) -> np.ndarray:
        """n points [n, C] of a delay equation, the first at t = tau."""
        tau, every = float(self.system.tau), self.config.dt_save * float(self.system.period)
        times = tau + every * np.arange(n)[:, None] - np.linspace(0, tau, len(self.channels))
        parameters = self.system.param_list
        f = lambda x, before, t: float(self.system._rhs(x, before, t, *parameters))  # noqa: E731
        return DelaySolution(f, past, tau, float(times.max()), self.delay_step)(times)

    def unstable(self) -> str:
        return f"system={self.config.system}"

"""Skew products: a chaotic driver x pushes a response y, both drawn at random (the training data of Panda, arXiv 2505.13755).

    x' = f_d(x)
    y_j' = gain_j f_r(y)_j + push_j R_j f_d(x)_(order_j),    R_j = rms f_r,j / rms f_d,order_j

Base flows are those of `quadratic_flows`, each in units of its own period. The coupling acts on flows: the response feels
the driver's velocity, its components in random order. Scaling by rms makes the two terms of equal size for gain = push = 1
(up to one factor per component this is Panda's scaling of both by 1 / rms). Parameters, gain and push are drawn as
p (1 + spread N(0, 1)), where with probability 1/2 the change has the sign of p.

A drawn system counts when it stays bounded, moves, is steady, is on no line, has a broad spectrum and its response is chaotic
by the 0-1 test; otherwise another one is drawn. Time is in periods.

Panda's code (github.com/abao1999/panda at c229e7c) differs in these points:

- base systems: pairs of different ones among the flows of dysts without delay (129 in dysts 0.96, of 3 to 10 components, driven
  ones too); here 8 autonomous quadratic ones of 3 components, and a system may drive its like
- time: each system in its own units, the longer period counts; here both have period 1
- coupling: both flows times 1 / rms, components that the driver lacks padded with zeros; here one factor R_j on the driver's
- spread 0.5 (here 0.2), plus a variance of 1e-6, of parameters and of both scales; its script of skew products leaves the sign of
  the change free (its config has the 1/2); push is 1 before it is spread (here 0.5)
- selection: of the trajectories that are stored; here of a reference of 50 periods, on whose points they start (there: on the
  second half of 40 periods)
- thresholds, there and here: line 0.99 and 0.98; deviations 15 and 10; rest in the last 10 % and 5 %; spectrum 4 peaks above 1e-5
  and 3 above 1e-4; 0-1 test: a fifth of K over 100 frequencies at least 0.2, of any component, and the median of K over 50 at
  least 0.5, of the response; stationary by the ADF or KPSS test, and means of both halves within one standard deviation
- solver: Radau at rtol 1e-9, atol 1e-10, with a limit of 300 s; here DOPRI5 at 1e-8 with a limit of steps
- size: 4,096 frames over 40 periods, 5,000 pairs with 4 draws of parameters and 1 start each; here `frames`, `dt_save`, and
  as many systems as asked for with `per_system` starts each
- splits: by pairs, 70 to 30; here each split draws its own systems from the same base flows
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from datamodules.format import ArraySpec

from . import attractors
from .fields import SimulationConfig, trajectory_rng
from .integrators import Rhs, dopri5, rk4
from .quadratic_flows import FLOWS, evaluate
from .trajectories import Trajectories

WIDTH = max(len(flow.parameters) for flow in FLOWS.values())
STEPS = 80  # per period of the reference trajectory, by RK4: its statistics matter, not its path
RATE = 10  # values per period of it
STRIDE = 2  # of these, the 0-1 test takes every second
REFERENCE, TRANSIENT = 50, 10  # periods
MAX_STEPS = 10_000  # of the integrator between two frames; more means that a solution runs away
ROUNDS = 50


@dataclass
class SkewProductConfig(SimulationConfig):
    """Data set of skew products; see `SimulationConfig` for the rest. Counts of splits and batch are trajectories.

    dt_save: in periods. drivers, responses: names of base flows to draw from.
    spread: of parameters, gain and push, relative. strength: of the push before it is spread; 0 leaves the response alone.
    per_system: trajectories of each system, from different states of its attractor. Splits and batch are multiples of it, so
    that no system is in two splits. tries: systems drawn at once for each that is wanted.
    """

    frames: int = 512
    dt_save: float = 0.02
    batch: int = 16
    drivers: list[str] = field(default_factory=lambda: sorted(FLOWS))
    responses: list[str] = field(default_factory=lambda: sorted(FLOWS))
    spread: float = 0.2
    strength: float = 0.5
    per_system: int = 4
    tries: int = 4
    rtol: float = 1e-8
    atol: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        for which in ("drivers", "responses"):
            for name in getattr(self, which):
                if name not in FLOWS:
                    raise ValueError(f"{which}={name}: unknown; use some of {', '.join(sorted(FLOWS))}")
            if not getattr(self, which):
                raise ValueError(f"{which}=[]: name at least one base flow")
        if self.spread < 0:
            raise ValueError(f"spread={self.spread}: must be >= 0")
        self.need_positive("per_system", "tries", "rtol", "atol")
        for which in ("train", "validation", "test", "batch"):
            if getattr(self, which) % self.per_system:
                raise ValueError(f"{which}={getattr(self, which)}: must be a multiple of per_system={self.per_system}")


@dataclass(frozen=True)
class System:
    """One drawn system; `row` is what the array `parameters` tells of it (see `COLUMNS`)."""

    driver: np.ndarray  # [3, 10]
    response: np.ndarray  # [3, 10], gain included
    coupling: np.ndarray  # [3, 3]: response component, driver component
    start: np.ndarray  # [6]
    row: np.ndarray


COLUMNS = (
    ["driver", "response"]
    + [f"{which}_parameter{i}" for which in ("driver", "response") for i in range(WIDTH)]
    + [f"{which}{j}" for which in ("order", "gain", "push") for j in range(3)]
)


def draw_system(config: SkewProductConfig, rng: np.random.Generator) -> System:
    """A random driver, response and coupling."""

    def spread(values: np.ndarray) -> np.ndarray:
        change = config.spread * np.abs(values) * rng.standard_normal(len(values))
        aligned = np.sign(values) * np.abs(change)
        return np.asarray(values + np.where(rng.random(len(values)) < 0.5, aligned, change))

    picked, sides, rows = [], [], []
    for names in (config.drivers, config.responses):
        name = names[rng.integers(len(names))]
        flow = FLOWS[name]
        values = spread(np.array(list(flow.parameters.values())))
        picked.append(flow)
        sides.append(flow.period * flow.coefficients(values))
        rows.append((sorted(FLOWS).index(name), np.pad(values, (0, WIDTH - len(values)))))
    order, gain, push = rng.permutation(3), spread(np.ones(3)), spread(config.strength * np.ones(3))
    coupling = np.zeros((3, 3))
    coupling[np.arange(3), order] = push * np.array(picked[1].rms) / np.array(picked[0].rms)[order]
    start = np.concatenate([flow.start for flow in picked])
    row = np.concatenate([[rows[0][0], rows[1][0]], rows[0][1], rows[1][1], order, gain, push])
    return System(sides[0], gain[:, None] * sides[1], coupling, start, row)


class SkewProduct(Trajectories):
    """Generator of `fields` [trajectory, time, 6] (driver x, y, z, response x, y, z) and `parameters` [trajectory, column]."""

    config_class: ClassVar[type[SimulationConfig]] = SkewProductConfig
    equation = "x' = f_d(x); y_j' = gain_j f_r(y)_j + push_j R_j f_d(x)_(order_j)"
    units: ClassVar[dict[str, str]] = {"time": "period of the base flow"}

    def __init__(self, config: Any, seed: int, shard_bytes: int) -> None:
        super().__init__(config, seed, shard_bytes)
        self._rows: dict[int, np.ndarray] = {}

    def components(self) -> tuple[str, ...]:
        return ("driver_x", "driver_y", "driver_z", "response_x", "response_y", "response_z")

    def fixed(self) -> dict[str, Any]:
        c = self.config
        return {"flows": sorted(FLOWS), "spread": c.spread, "strength": c.strength, "per_system": c.per_system}

    def solver(self) -> dict[str, Any]:
        return {"scheme": "dopri5", "rtol": self.config.rtol, "atol": self.config.atol, "precision": "float64"}

    def initial(self, rng: np.random.Generator) -> np.ndarray:
        return draw_system(self.config, rng).start

    def specs(self) -> dict[str, ArraySpec]:
        specs = super().specs()
        shape, length = (self.trajectories, len(COLUMNS)), specs["fields"].shard_length
        names = {"columns": list(COLUMNS)}
        parameters = ArraySpec(shape, "float64", ("trajectory", "column"), length, attributes=names)
        return {**specs, "parameters": parameters}

    def values(self, name: str, k: int) -> np.ndarray:
        if name != "parameters":
            return super().values(name, k)
        spec, batch = self.specs()[name], self.config.batch
        rows = []
        start = k * spec.shard_length
        for i, seed in enumerate(self.seeds(start, start + spec.shard_extent(k)), start):
            # Which system was good depends on the bits of a chaotic solution: that of this process, which wrote the fields
            # as well if `make` asks.
            if seed not in self._rows:
                self.group(i // batch * batch)
            rows.append(self._rows[seed])
        return np.stack(rows)

    def rhs(self, systems: list[System]) -> Rhs:
        """The right-hand side [B, 6] -> [B, 6] of these systems."""
        flows = np.stack([[system.driver, system.response] for system in systems])
        coefficients = torch.from_numpy(flows).to(self.device)  # [B, 2, 3, 10]
        coupling = torch.from_numpy(np.stack([system.coupling for system in systems])).to(self.device)

        def rhs(x: Tensor) -> Tensor:
            both = evaluate(coefficients, x.unflatten(1, (2, 3)))
            both[:, 1] += (coupling * both[:, :1]).sum(-1)
            return both.flatten(1)

        return rhs

    def solve(self, seeds: list[int]) -> Tensor:
        c = self.config
        members = {seeds[i]: seeds[i : i + c.per_system] for i in range(0, len(seeds), c.per_system)}
        firsts = list(members)  # a system has the seed of its first trajectory
        done: dict[int, tuple[System, Tensor]] = {}
        for turn in range(ROUNDS):
            wanted = [seed for seed in firsts if seed not in done]
            if not wanted:
                break
            drawn = [
                (seed, draw_system(c, trajectory_rng(seed, f"system {attempt}")))
                for seed in wanted
                for attempt in range(turn * c.tries, (turn + 1) * c.tries)
            ]
            chosen: dict[int, tuple[System, np.ndarray]] = {}
            for (seed, system), reference in zip(drawn, self._references([s for _, s in drawn]), strict=True):
                if reference is not None:
                    chosen.setdefault(seed, (system, reference))
            done.update(self._trajectories(chosen, members))
        if len(done) < len(firsts):
            raise ValueError(f"spread={c.spread}: no chaotic system in {ROUNDS * c.tries} draws; use a smaller spread")
        self._rows.update({seed: done[first][0].row for first in firsts for seed in members[first]})
        return torch.cat([done[seed][1] for seed in firsts])

    def _references(self, systems: list[System]) -> list[np.ndarray | None]:
        """For each system a trajectory [T, 6] on its attractor, or None if it is not a chaotic one."""
        start = torch.from_numpy(np.stack([system.start for system in systems])).to(self.device)
        first, every = TRANSIENT * STEPS, STEPS // RATE
        x = rk4(self.rhs(systems), start, 1 / STEPS, first, every, REFERENCE * RATE).cpu().numpy()
        good = attractors.bounded(x)
        for test in (attractors.moving, attractors.steady, attractors.not_linear, attractors.broadband):
            good[good] = test(x[good])
        good[good] = (attractors.zero_one(x[good][:, ::STRIDE, 3:]) >= 0.5).any(1)
        return [series if ok else None for series, ok in zip(x, good, strict=True)]

    def _trajectories(
        self, chosen: dict[int, tuple[System, np.ndarray]], members: dict[int, list[int]]
    ) -> dict[int, tuple[System, Tensor]]:
        """The trajectories [per_system, frames, 6] of systems, without those of which one ran away."""
        c = self.config
        if not chosen:
            return {}
        systems, starts = [], []
        for first, (system, reference) in chosen.items():
            for seed in members[first]:
                systems.append(system)
                starts.append(reference[trajectory_rng(seed, "initial").integers(len(reference))])
        start = torch.from_numpy(np.stack(starts)).to(self.device)
        times = [c.dt_save * i for i in range(c.frames)]
        x = dopri5(self.rhs(systems), start, times, c.rtol, c.atol, attractors.LIMIT, MAX_STEPS)
        blocks = x.reshape(len(chosen), c.per_system, c.frames, 6)
        return {
            seed: (system, block)
            for (seed, (system, _)), block in zip(chosen.items(), blocks, strict=True)
            if torch.isfinite(block).all()
        }

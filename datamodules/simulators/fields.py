"""What all simulations of fields share: configs, the arrays they write, and the grouping that keeps their bits.

A simulation writes `fields` [trajectory, time, channel, *space] float32, its coordinates, and one array per quantity that
differs between trajectories: a number [trajectory] (a viscosity) or a static field [trajectory, *space] (a wave speed).
"""

from __future__ import annotations

import math
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from datamodules.format import ArraySpec

from . import base
from .base import split_ranges

Law = Literal["uniform", "log", "integer"]
DEVICES = re.compile(r"cpu|cuda(:(0|[1-9]\d?))?")
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "ALLOC_FAILED",
)  # torch on a GPU and on the CPU; cuFFT and cuBLAS


def whole_steps(interval: float, dt: float) -> int | None:
    """How many steps dt the interval is; None if that is no whole number."""
    steps = round(interval / dt)
    return steps if math.isclose(steps * dt, interval, rel_tol=1e-9, abs_tol=1e-12) else None


def trajectory_seed(seed: int, i: int) -> int:
    """The seed of trajectory i of a data set of this seed, 128 bits: data sets of other seeds have no trajectory in common."""
    # As a spawn key: [seed, i] as entropy is padded with zeros, so that [2^32 + 1, 0] would be [1, 1].
    low, high = np.random.SeedSequence(seed, spawn_key=(i,)).generate_state(2, np.uint64).tolist()
    return int(low | high << 64)


def trajectory_rng(seed: int, purpose: str) -> np.random.Generator:
    """Random numbers of one trajectory for one purpose, so that a new quantity does not change the old ones."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())])))


@dataclass
class SimulationConfig:
    """What every simulation has.

    frames: saved per trajectory. dt_save: time between them.
    train, validation, test: trajectories of each split.
    batch: trajectories solved together. The last bits of an FFT depend on it, so it is part of the config. A GPU wants
        many more than the default, as far as they fit into its memory.
    device: where they are solved, "cpu", "cuda" or "cuda:<index>"; the bits depend on it too. With "cuda" the worker
        processes of `make` take the GPUs in turn.

    A field named in `drawn` is a range `[low, high]` from which each trajectory draws its value (`low == high` fixes it).
    """

    drawn: ClassVar[dict[str, Law]] = {}
    steady: ClassVar[bool] = False  # no time: one frame, and dt_save has no meaning

    frames: int = 21
    dt_save: float = 1.0
    train: int = 128
    validation: int = 16
    test: int = 16
    batch: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.steady and (self.frames != 1 or self.dt_save != 1):
            raise ValueError(
                f"frames={self.frames}, dt_save={self.dt_save}: a steady problem has one frame; leave them out"
            )
        if not self.steady and self.frames < 2:
            raise ValueError(f"frames={self.frames}: a trajectory needs at least 2")
        if self.train < 1 or self.validation < 0 or self.test < 0:
            raise ValueError(
                f"train={self.train}, validation={self.validation}, test={self.test}: train >= 1, others >= 0"
            )
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}: must be at least 1")
        if not DEVICES.fullmatch(self.device):
            raise ValueError(f"device={self.device!r}: simulators run on cpu, cuda or cuda:<index> only")
        self.need_positive("dt_save")
        for name, law in self.drawn.items():
            given = getattr(self, name)
            if len(given) != 2 or not all(math.isfinite(end) for end in given) or given[0] > given[1]:
                raise ValueError(f"{name}={given}: must be a range [low, high] with low <= high")
            if law == "log" and given[0] <= 0 and tuple(given) != (0, 0):
                raise ValueError(
                    f"{name}={given}: must be positive, as it is drawn in its logarithm, or [0, 0] for none"
                )

    def need_positive(self, *names: str) -> None:
        """ValueError unless these fields, or both ends of these ranges, are positive."""
        for name in names:
            given = getattr(self, name)
            if min(given if isinstance(given, list) else [given]) <= 0:
                raise ValueError(f"{name}={given}: must be positive")

    def need_even(self, *names: str) -> None:
        """ValueError unless these resolutions are even and at least 8."""
        for name in names:
            given = getattr(self, name)
            if given < 8 or given % 2:
                raise ValueError(f"{name}={given}: must be even and at least 8")

    def need_choice(self, name: str, known: tuple[str, ...]) -> None:
        """ValueError unless this field is one of `known`."""
        if getattr(self, name) not in known:
            raise ValueError(f"{name}={getattr(self, name)!r}: unknown; use one of {', '.join(known)}")

    def need_whole(self, name: str, dt: float) -> None:
        """ValueError unless this interval is a whole number (0 included) of steps dt."""
        given = getattr(self, name)
        if given < 0 or whole_steps(given, dt) is None:
            raise ValueError(f"{name}={given}: must be a whole number of steps dt={dt}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of a multi-threaded FFT depend on how the batch is divided among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Simulation(ABC):
    """A generator of fields. A subclass gives `channels`, `coordinates`, `description` and `solve`.

    Trajectory i depends on (config, seed, i) alone, see `trajectory_seed`. Trajectories are solved in float64 in fixed groups of `config.batch`
    (i // batch) on one thread, so that the bits of one do not depend on shards, worker processes or the number of
    trajectories; they may differ between CPU types, devices and torch builds.
    """

    config_class: ClassVar[type[SimulationConfig]]
    version: ClassVar[int] = 2
    static: ClassVar[tuple[str, ...]] = ()  # names of static fields, each [trajectory, *space]

    def __init__(self, config: Any, seed: int, shard_bytes: int) -> None:
        self.config, self.seed = config, seed
        self.trajectories = config.train + config.validation + config.test
        shape = (len(self.channels), *(len(axis) for axis in self.coordinates().values()))
        fit = max(1, shard_bytes // (config.frames * (math.prod(shape) * 4 + 4)))
        # Whole groups per shard where that is possible: no group is solved twice.
        fit = fit // config.batch * config.batch if fit >= config.batch else fit
        self.shard_length = min(fit, self.trajectories)

    # What a subclass says.

    @property
    @abstractmethod
    def channels(self) -> tuple[str, ...]:
        """Names of the channels."""

    @abstractmethod
    def coordinates(self) -> dict[str, np.ndarray]:
        """The space axes in order: name -> points, float64."""

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """Group attributes of the equation: equation, parameters, units, domain, boundary_conditions, solver; plain JSON."""

    @abstractmethod
    def solve(self, seeds: list[int]) -> Tensor:
        """Frames [B, frames, channel, *space] float64 of the trajectories of these seeds.

        ValueError where the numbers of the config cannot be solved.
        """

    def static_field(self, name: str, seed: int) -> np.ndarray:
        """A static field of the trajectory of this seed, [*space] float64."""
        raise KeyError(name)

    def times(self) -> np.ndarray:
        """Times of the frames, [frames] float64."""
        return self.config.dt_save * np.arange(self.config.frames)

    # What it gets.

    def seeds(self, start: int, stop: int) -> list[int]:
        """The seeds of trajectories start ... stop - 1."""
        return [trajectory_seed(self.seed, i) for i in range(start, stop)]

    def draw(self, name: str, seed: int) -> float:
        """The value of a drawn parameter in the trajectory of this seed."""
        (low, high), law = getattr(self.config, name), self.config.drawn[name]
        if low == high:
            return float(low)
        u = trajectory_rng(seed, name).random()
        if law == "integer":
            return float(min(math.floor(low + u * (high - low + 1)), high))
        if law == "log":
            return float(min(max(low * (high / low) ** u, low), high))
        return float(low + u * (high - low))

    def drawn(self, name: str, seeds: list[int], axes: int = 0) -> Tensor:
        """Drawn values [B, 1, ...] with `axes` axes of extent 1 behind, on the device."""
        values = torch.tensor([self.draw(name, seed) for seed in seeds], dtype=torch.float64, device=self.device)
        return values.reshape(-1, *(1 for _ in range(axes)))

    @property
    def device(self) -> torch.device:
        """Where to solve; ValueError if it is not there."""
        name, device = self.config.device, torch.device(self.config.device)
        if device.type == "cpu":
            return device
        count, worker = torch.cuda.device_count() if torch.cuda.is_available() else 0, base.worker()
        if count == 0:
            raise ValueError(f"device={name!r}: torch finds no GPU here; use device: cpu")
        if device.index is not None and device.index >= count:
            raise ValueError(f"device={name!r}: the last GPU here is cuda:{count - 1}; use device: cuda for any")
        return torch.device("cuda", worker % count) if device.index is None and worker is not None else device

    def specs(self) -> dict[str, ArraySpec]:
        c, axes = self.config, self.coordinates()
        names, space = tuple(axes), tuple(len(points) for points in axes.values())
        shape = (self.trajectories, c.frames, len(self.channels), *space)
        fields = ArraySpec(shape, "float32", ("trajectory", "time", "channel", *names), self.shard_length)
        lengths = {"time": c.frames, **dict(zip(names, space, strict=True))}
        coordinates = {name: ArraySpec((n,), "float64", (name,), n, n) for name, n in lengths.items()}
        static = {
            name: ArraySpec((self.trajectories, *space), "float32", ("trajectory", *names), self.shard_length)
            for name in self.static
        }
        n = self.trajectories
        numbers = {name: ArraySpec((n,), "float64", ("trajectory",), n, n) for name in c.drawn}
        return {"fields": fields, **coordinates, **static, **numbers}

    def attributes(self) -> dict[str, Any]:
        c = self.config
        return {
            "kind": "fields",
            "array": "fields",
            "splits": split_ranges(train=c.train, validation=c.validation, test=c.test),
            "channels": list(self.channels),
            "dt": None if c.steady else c.dt_save,
            "per_trajectory": {name: list(getattr(c, name)) for name in c.drawn},
            "static_fields": list(self.static),
            **self.description(),
        }

    def source(self) -> dict[str, Any]:
        """Nothing; ValueError if the device is not there, before anything is written."""
        _ = self.device
        return {}

    def values(self, name: str, k: int) -> np.ndarray:
        spec = self.specs()[name]
        if name == "time":
            return self.times()
        if name in self.coordinates():
            return self.coordinates()[name]
        start = k * spec.shard_length
        stop = start + spec.shard_extent(k)
        if name in self.config.drawn:
            return np.array([self.draw(name, seed) for seed in self.seeds(start, stop)])
        if name in self.static:
            return np.stack([self.static_field(name, seed) for seed in self.seeds(start, stop)])
        out = np.empty((stop - start, *spec.shape[1:]), np.float32)
        batch = self.config.batch
        for group in range(start // batch, (stop - 1) // batch + 1):
            first = group * batch
            lo, hi = max(start, first), min(stop, first + batch)
            out[lo - start : hi - start] = self.group(first)[lo - first : hi - first]
        return out

    def group(self, first: int) -> np.ndarray:
        """Trajectories first ... first + batch - 1, [batch, frames, channel, *space] float64.

        ValueError if they become non-finite, or do not fit into the memory of the device.
        """
        batch = self.config.batch
        try:
            with _one_thread(), torch.inference_mode():
                fields = self.solve(self.seeds(first, first + batch))
                finite = bool(torch.isfinite(fields).all())
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and not any(told in str(error) for told in NO_MEMORY):
                raise
            where = f"{batch} trajectories do not fit into the memory of {self.device}"
            raise ValueError(f"batch={batch}: {where}; use a smaller batch or fewer workers") from error
        if not finite:
            raise ValueError(f"{self.unstable()}: the solution became non-finite; use a smaller time step")
        return np.asarray(fields.cpu().numpy())

    def unstable(self) -> str:
        """The setting to blame for a solution that blew up."""
        return f"dt={self.config.dt}"

"""The schema of a run: one dataclass per section, each refusing values that cannot work."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")
SCHEDULES = ("constant", "cosine", "linear", "wsd")
ACCELERATORS = ("auto", "cpu", "cuda")


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then `name`; `decay_steps` counts from the end for `wsd`."""

    name: str = "cosine"
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    decay_steps: int = 0

    def __post_init__(self) -> None:
        _choice("name", self.name, SCHEDULES)
        _at_least("warmup_steps", self.warmup_steps, 0)
        _at_least("decay_steps", self.decay_steps, 0)
        if not 0.0 <= self.min_lr_ratio <= 1.0:
            raise ValueError(f"min_lr_ratio={self.min_lr_ratio}: must lie in [0, 1]")
        if self.decay_steps and self.name != "wsd":
            raise ValueError(
                f"decay_steps={self.decay_steps} has no effect with name={self.name}; use name=wsd or drop it"
            )
        if self.name == "wsd" and not self.decay_steps:
            raise ValueError("name=wsd needs decay_steps > 0 (the length of the final decay)")


@dataclass
class TrainConfig:
    """The loop. `global_batch` counts samples over all ranks; `micro_batch` per rank and forward (0: all at once)."""

    max_steps: int = 1000
    global_batch: int = 16
    micro_batch: int = 0
    grad_clip: float = 0.0
    val_every: int = 0
    precision: str = "32-true"
    deterministic: bool = False

    def __post_init__(self) -> None:
        _at_least("max_steps", self.max_steps, 1)
        _at_least("global_batch", self.global_batch, 1)
        _at_least("micro_batch", self.micro_batch, 0)
        _at_least("grad_clip", self.grad_clip, 0)
        _at_least("val_every", self.val_every, 0)
        _choice("precision", self.precision, PRECISIONS)


@dataclass
class ResourcesConfig:
    """What one run occupies. `threads`: CPU threads per process (0: cores divided by processes)."""

    accelerator: str = "auto"
    nodes: int = 1
    processes_per_node: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        _choice("accelerator", self.accelerator, ACCELERATORS)
        _at_least("nodes", self.nodes, 1)
        _at_least("processes_per_node", self.processes_per_node, 1)
        _at_least("threads", self.threads, 0)

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node


@dataclass
class CheckpointConfig:
    """Commit every `every` steps (0: only at the end); keep the last `keep_last` and each `keep_every`-th step."""

    every: int = 100
    keep_last: int = 2
    keep_every: int = 0
    part_mib: int = 256

    def __post_init__(self) -> None:
        _at_least("every", self.every, 0)
        if self.keep_last < 2:
            raise ValueError(
                f"keep_last={self.keep_last}: at least 2 are kept, so that a bad one can be fallen back from"
            )
        if self.keep_every and (not self.every or self.keep_every % self.every):
            raise ValueError(f"keep_every={self.keep_every} must be a multiple of every={self.every}")
        _at_least("part_mib", self.part_mib, 1)


@dataclass
class LogConfig:
    """Metrics leave the device every `every` steps and go to the store at least every `flush_seconds`.

    `trace` also logs the ids of the samples of each step, as they were decoded.
    """

    every: int = 10
    flush_seconds: float = 10.0
    trace: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        _at_least("every", self.every, 1)
        if not self.flush_seconds > 0:
            raise ValueError(f"flush_seconds={self.flush_seconds}: must be greater than 0")


@dataclass
class DiagnosticsConfig:
    """Stability diagnostics (see `trainer.diagnostics`), collected every `every` steps (0: never)."""

    every: int = 0
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        from trainer.diagnostics import DIAGNOSTICS

        _at_least("every", self.every, 0)
        for name in self.names:
            _choice("names", name, tuple(DIAGNOSTICS))
        if self.names and not self.every:
            raise ValueError("names are given but every=0: nothing would be collected; set every > 0")
        if self.every and not self.names:
            raise ValueError(f"every={self.every} but names is empty: choose from {', '.join(sorted(DIAGNOSTICS))}")


@dataclass
class RunConfig:
    """One run. `url` is where everything that the run writes goes."""

    model: Any
    task: Any
    data: Any
    optim: Any
    strategy: Any
    parametrization: Any
    url: str
    name: str = "run"
    seed: int = 0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)

    def __reduce__(self) -> tuple[Any, ...]:
        # The classes of the polymorphic sections are made at load time; a config travels as its plain content.
        from trainer.config import load

        return load, (dataclasses.asdict(self),)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step and process."""
        local = self.train.global_batch // self.resources.world_size
        return local // self.train.micro_batch if self.train.micro_batch else 1

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        world, batch, micro = self.resources.world_size, self.train.global_batch, self.train.micro_batch
        if batch % world:
            raise ValueError(
                f"train.global_batch={batch} does not divide over resources.nodes x processes_per_node = {world} "
                f"processes; nearest valid: {_multiples(batch, world)}"
            )
        if micro and (batch // world) % micro:
            raise ValueError(
                f"train.micro_batch={micro} does not divide the {batch // world} samples of a process "
                f"(train.global_batch={batch} over {world} processes)"
            )
        schedule = self.schedule
        if schedule.warmup_steps + schedule.decay_steps > self.train.max_steps:
            raise ValueError(
                f"schedule.warmup_steps + decay_steps = {schedule.warmup_steps + schedule.decay_steps} "
                f"exceed train.max_steps={self.train.max_steps}"
            )


def _multiples(batch: int, world: int) -> str:
    below, above = batch // world * world, (batch // world + 1) * world
    return f"{below} or {above}" if below else f"{above}"


def _choice(key: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")


def _at_least(key: str, value: float, low: float) -> None:
    if not value >= low or value == float("inf"):  # also refuses nan
        raise ValueError(f"{key}={value}: must be at least {low}")

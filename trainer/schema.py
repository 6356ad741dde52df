"""The schema of a run: one dataclass per section, each refusing values that cannot work."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
ACTIVATION_CHECKPOINTING = ("none", "block", "selective")
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
    """The loop. `global_batch` counts samples over all ranks; `micro_batch` per rank and forward (0: all at once).

    `precision`: see `trainer.strategies.precision`. `compile`: each block of the network by `torch.compile`.
    `activation_checkpointing`: what the backward pass computes again instead of keeping it: nothing, each `block`, or,
    `selective`, only what is cheap (see `trainer.strategies.blocks`). `ema_decay`: keep a running average of the weights
    with this decay per step (0: none); `ema_validation`: validate with it.
    """

    max_steps: int = 1000
    global_batch: int = 16
    micro_batch: int = 0
    grad_clip: float = 0.0
    val_every: int = 0
    precision: str = "32-true"
    compile: bool = False
    activation_checkpointing: str = "none"
    ema_decay: float = 0.0
    ema_validation: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        _at_least("max_steps", self.max_steps, 1)
        _at_least("global_batch", self.global_batch, 1)
        _at_least("micro_batch", self.micro_batch, 0)
        _at_least("grad_clip", self.grad_clip, 0)
        _at_least("val_every", self.val_every, 0)
        self.precision = "32-true" if self.precision == "32" else self.precision
        _choice("precision", self.precision, PRECISIONS)
        _choice("activation_checkpointing", self.activation_checkpointing, ACTIVATION_CHECKPOINTING)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: must lie in [0, 1)")
        if self.ema_validation and not (self.ema_decay and self.val_every):
            raise ValueError("ema_validation=true has no effect without ema_decay > 0 and val_every > 0")


@dataclass
class ResourcesConfig:
    """What one run occupies.

    accelerator: `cuda`, `cpu`, or `auto`: CUDA where each process of a node has a GPU, else the CPU.
    threads: CPU threads per process (0: cores divided by processes).
    """

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
    """When a run is saved, how, and what is kept.

    Saved: every `every` steps (0: only at the end), when `every_minutes` have passed since the last save (0: never), at the
    steps divisible by `keep_every`, and, with `best`, before each validation.
    Kept: the last `keep_last`; each `keep_every`-th step and one per `keep_minutes`, for good; the `keep_best` with the best
    value of the validation metric `best` (such as val/loss; `best_mode`: min or max).
    `background`: training goes on while a save is uploaded. `tolerate`: so many saves in a row may fail before training
    stops; the last one, at the end, may not. `self_check`: the loss of one stored sample must be the same before saving and after loading.
    """

    every: int = 100
    every_minutes: float = 0.0
    keep_last: int = 2
    keep_every: int = 0
    keep_minutes: float = 0.0
    best: str = ""
    best_mode: str = "min"
    keep_best: int = 1
    background: bool = False
    tolerate: int = 0
    self_check: bool = False
    part_mib: int = 256

    def __post_init__(self) -> None:
        for name in ("every", "every_minutes", "keep_every", "keep_minutes", "tolerate"):
            _at_least(name, getattr(self, name), 0)
        if self.keep_last < 2:
            raise ValueError(
                f"keep_last={self.keep_last}: at least 2 are kept, so that a bad one can be fallen back from"
            )
        if self.keep_every and self.every and self.keep_every % self.every:
            raise ValueError(f"keep_every={self.keep_every} must be a multiple of every={self.every}")
        _at_least("keep_best", self.keep_best, 1)
        _choice("best_mode", self.best_mode, ("min", "max"))
        if not self.best and (self.keep_best, self.best_mode) != (1, "min"):
            raise ValueError("keep_best and best_mode have no effect without best; set best=val/<metric>")
        if self.best and not self.best.startswith("val/"):
            raise ValueError(f"best={self.best}: must be a validation metric such as val/loss")
        _at_least("part_mib", self.part_mib, 1)

    def retention(self) -> Any:
        """The rule by which old checkpoints go."""
        from trainer.checkpoint import Retention

        names = ("keep_last", "keep_every", "keep_minutes", "keep_best", "best", "best_mode")
        return Retention(**{name: getattr(self, name) for name in names})


NONFINITE = ("stop", "skip", "rollback")
SPIKE = ("ignore", "skip", "rollback", "lower_rate", "stop")


@dataclass
class RecoveryConfig:
    """What a run does by itself when something goes wrong. Policies: see `trainer.callbacks.recovery`.

    `nonfinite`: a loss or gradient that is no number. `spike`: a loss more than `threshold` robust standard deviations
    above the median of the last `window` steps (the first `window` steps are not judged). `rollback_commits`: how many
    commits back; `rate_factor`: what `lower_rate` multiplies the rate by; `max_events`: after so many the run stops as
    diverged. `parity_every`: steps between checks that replicas hold the same parameters (0: never).
    `init_timeout_seconds` from the set-up of the model until the first step is done, and for a save;
    `step_timeout_seconds` for anything else: what takes longer ends the process, with the stacks of all ranks in the store
    (0: no watchdog). Before that set-up a process waits for the store and for other ranks, within their own time limits
    (`strategy.timeout_seconds`). `max_restarts`: how often
    the launcher starts the processes again, from the last commit, after one was killed, hung, crashed or lost the store,
    without a new commit in between: each one gives the full number back.
    """

    nonfinite: str = "stop"
    spike: str = "ignore"
    threshold: float = 10.0
    window: int = 64
    rollback_commits: int = 1
    rate_factor: float = 0.5
    max_events: int = 10
    parity_every: int = 0
    init_timeout_seconds: float = 1800.0
    step_timeout_seconds: float = 600.0
    max_restarts: int = 0

    def __post_init__(self) -> None:
        _choice("nonfinite", self.nonfinite, NONFINITE)
        _choice("spike", self.spike, SPIKE)
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold={self.threshold}: must be greater than 0 and finite")
        _at_least("window", self.window, 8)
        _at_least("rollback_commits", self.rollback_commits, 1)
        if not 0 < self.rate_factor < 1:
            raise ValueError(f"rate_factor={self.rate_factor}: must lie between 0 and 1")
        _at_least("max_events", self.max_events, 0)
        _at_least("parity_every", self.parity_every, 0)
        _at_least("step_timeout_seconds", self.step_timeout_seconds, 0)
        if self.init_timeout_seconds < self.step_timeout_seconds:
            raise ValueError(
                f"init_timeout_seconds={self.init_timeout_seconds} is below "
                f"step_timeout_seconds={self.step_timeout_seconds}: the first step takes the longest"
            )
        _at_least("max_restarts", self.max_restarts, 0)


@dataclass
class WeightsConfig:
    """What a fresh run starts from in place of random weights; a resumed one has its own.

    `url`: another run, a .safetensors file or its .index.json. `step`: of that run (0: its last). `ema`: its averaged weights.
    `map`: regular expression -> replacement for names in the source; the first that is found changes a name, an empty
    result leaves the tensor out. `strict`: everything must fit; otherwise what does not is reported and left as it is.
    `state`: a branch of that run: it goes on from the step with all of its state (optimiser, counters, place in the data),
    while the rates and other settings are those of this config.
    """

    url: str = ""
    step: int = 0
    ema: bool = False
    map: dict[str, str] = field(default_factory=dict)
    strict: bool = True
    state: bool = False

    def __post_init__(self) -> None:
        _at_least("step", self.step, 0)
        if not self.url and (self.step or self.ema or self.map or not self.strict or self.state):
            raise ValueError("step, ema, map, strict and state have no effect without url; set weights.url")
        if self.url.endswith((".safetensors", ".json")) and (self.step or self.ema or self.state):
            raise ValueError(f"step, ema and state are those of a run; {self.url} is a file")
        if self.state and (self.ema or self.map or not self.strict):
            raise ValueError("state takes a run's state as it is: leave out ema, map and strict")


@dataclass
class LogConfig:
    """Metrics leave the device every `every` steps and go to the store at least every `flush_seconds`.

    `trace` also logs the ids of the samples of each step, as they were decoded. Copies for other tools, see
    `trainer.callbacks.loggers`: `tensorboard` in the run's URL (a remote one gets it at the end of an
    attempt: one that is killed leaves none), `wandb` to the project of that name, `mlflow` to that
    tracking URI (none when empty).
    """

    every: int = 10
    flush_seconds: float = 10.0
    trace: bool = False
    progress: bool = True
    tensorboard: bool = False
    wandb: str = ""
    mlflow: str = ""

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
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    log: LogConfig = field(default_factory=LogConfig)
    diagnostics: DiagnosticsConfig = field(default_factory=DiagnosticsConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)

    def __reduce__(self) -> tuple[Any, ...]:
        # The classes of the polymorphic sections are made at load time; a config travels as its plain content.
        from trainer.config import load

        return load, (dataclasses.asdict(self),)

    @property
    def data_parallel(self) -> int:
        """Ranks, or groups of tensor-parallel ranks, that read different samples."""
        return self.resources.world_size // getattr(self.strategy, "tensor", 1)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimiser step and process."""
        local = self.train.global_batch // self.data_parallel
        return local // self.train.micro_batch if self.train.micro_batch else 1

    def __post_init__(self) -> None:
        _at_least("seed", self.seed, 0)
        processes, batch, micro = self.resources.world_size, self.train.global_batch, self.train.micro_batch
        tensor, replicate = getattr(self.strategy, "tensor", 1), getattr(self.strategy, "replicate", 1)
        if processes % (tensor * replicate):
            raise ValueError(
                f"strategy.tensor={tensor} x strategy.replicate={replicate} does not divide "
                f"resources.nodes x processes_per_node = {processes} processes"
            )
        world = self.data_parallel
        if batch % world:
            raise ValueError(
                f"train.global_batch={batch} does not divide over resources.nodes x processes_per_node "
                f"{'/ strategy.tensor ' if tensor > 1 else ''}= {world} processes; nearest valid: {_multiples(batch, world)}"
            )
        if micro and (batch // world) % micro:
            raise ValueError(
                f"train.micro_batch={micro} does not divide the {batch // world} samples of a process "
                f"(train.global_batch={batch} over {world} processes)"
            )
        self._check_rollback()
        if self.checkpoint.best and not self.train.val_every:
            raise ValueError(f"checkpoint.best={self.checkpoint.best} needs validation; set train.val_every > 0")
        self._check_schedule()

    def _check_rollback(self) -> None:
        recovery, saved = self.recovery, self.checkpoint
        if "rollback" not in (recovery.nonfinite, recovery.spike):
            return
        if not (saved.every or saved.every_minutes or saved.keep_every or saved.best):
            raise ValueError(
                "recovery asks for a rollback but checkpoint.every, every_minutes, keep_every and best are not set: there "
                "would be no commit to go back to"
            )
        if recovery.rollback_commits > saved.keep_last:
            raise ValueError(
                f"recovery.rollback_commits={recovery.rollback_commits} exceeds checkpoint.keep_last={saved.keep_last}: so "
                "many commits are not kept"
            )

    def _check_schedule(self) -> None:
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

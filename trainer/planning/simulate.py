"""One optimiser step of a run on a machine that is not there: the real task, strategy, optimiser and loop, traced."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from modules.tasks.base import Task
from trainer import config as configs
from trainer import strategies
from trainer.build import _task, optimizer_and_scheduler, rules
from trainer.callbacks.ema import EMA
from trainer.callbacks.guard import Guard
from trainer.callbacks.recovery import Recovery
from trainer.planning.fake import accelerator_kernels, fake_tensors, fake_world, with_values
from trainer.planning.tracking import (
    BACKWARD,
    BATCH,
    STEP,
    UNDO,
    Counts,
    Route,
    Snapshot,
    Tracker,
    Traffic,
    Work,
    categorise,
    storages,
)
from trainer.quiet import quiet
from trainer.schema import RunConfig

log = logging.getLogger("keel.dryrun")

# The first step makes the optimiser's state; from the second on all steps are alike.
_TRACED_STEP = 2
_TRACED_MICRO_BATCHES = 3
_GRANULE = 512  # the smallest block of torch's CUDA allocator


@dataclass
class Trace:
    """What one steady step of rank 0 holds and sends.

    Attributes:
        parameters: elements of the whole model; `checkpoint_bytes`: of all ranks, parameters, their averages, buffers,
            optimiser state.
        memory: bytes by category (`tracking.CATEGORIES`) at the highest point of the step, which lies in `phase`.
        traffic: collectives of one optimiser step.
        work: the operations of one optimiser step, by their size.
        flops_per_sample: forward and backward; None where they cannot be counted.
        by_arithmetic: ZeRO's share of parameters, gradients and states was calculated, the rest traced (DeepSpeed's
            engine works on addresses); `host_bytes`: what it keeps in the host's memory, per rank.
        micro_batch: samples of one forward; `accumulation`: forwards of a step; `data_parallel`: ranks with own samples.
    """

    parameters: int = 0
    checkpoint_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)
    phase: str = ""
    traffic: dict[Route, Traffic] = field(default_factory=dict)
    work: Counter[Work] = field(default_factory=Counter)
    flops_per_sample: int | None = None
    by_arithmetic: bool = False
    host_bytes: int = 0
    micro_batch: int = 1
    accumulation: int = 1
    data_parallel: int = 1
    tokens_per_sample: int = 1

    @property
    def peak(self) -> int:
        """Bytes of all categories at the highest point."""
        return sum(self.memory.values())


def trace(config: RunConfig, *, accelerator: bool = False) -> Trace:
    """Traces a step of `config` as rank 0 of its `resources`; needs neither data nor that machine.

    Args:
        config: resolved; `train.compile` is ignored: a compiled step needs at most what is traced here.
        accelerator: allocate and fuse as an accelerator does, not as this CPU.

    Raises:
        RuntimeError: the process belongs to a process group, or the model cannot run without values.
    """
    from trainer.flops import count_flops
    from trainer.run import _trainer

    quiet()
    resources, accumulation = config.resources, config.accumulation
    micro = config.train.global_batch // config.data_parallel // accumulation
    # Micro-batches between the first and the last are alike: one is traced and counted as often as it occurs.
    few = config.data_parallel * micro * min(accumulation, _TRACED_MICRO_BATCHES)
    train = dataclasses.replace(config.train, compile=False, global_batch=few, micro_batch=micro)
    config = dataclasses.replace(config, train=train)
    with fake_world(resources.world_size, resources.processes_per_node):
        with torch.device("meta"):
            bare = _task(config)
        by_name = rules(config, bare)
        found = Trace(
            parameters=sum(p.numel() for p in bare.network.parameters()),
            tokens_per_sample=bare.tokens_per_sample(),
            accumulation=accumulation,
            data_parallel=config.data_parallel,
            micro_batch=micro,
        )
        try:
            found.flops_per_sample = count_flops(bare, 1)
        except RuntimeError as error:
            log.warning("%s; no FLOP figures", error)
        kernels = accelerator_kernels() if accelerator else contextlib.nullcontext()
        granule = _GRANULE if accelerator else 1
        with kernels, fake_tensors(), Tracker(granule, resources.processes_per_node) as tracker:
            task = _task(config)
            zero = config.strategy if config.strategy.name == "deepspeed" else None
            strategy = strategies.build(config if zero is None else _replicated(config), None)  # nothing is saved
            task.prepare = strategy.prepare
            task.optimizers_factory = lambda network: optimizer_and_scheduler(config, network, by_name)
            guard, average = _extras(config)
            probe = Probe(tracker, found, guard, average)
            callbacks: list[pl.Callback] = [callback for callback in (guard, average, probe) if callback is not None]
            trainer = _trainer(config, "cpu", strategy, callbacks)
            if zero is not None:
                strategy.configure_ddp = lambda: None
            elif config.strategy.name == "ddp" and resources.world_size > 1:
                strategy.configure_ddp = lambda: probe.replicate(task.network, config.strategy.bucket_mib << 20)
            strategy.setup_environment = with_values(strategy.setup_environment)  # meshes
            strategy.model_to_device = strategy.teardown = lambda: None  # it is where it shall be, and dies there
            trainer.fit_loop.epoch_loop.max_steps = _TRACED_STEP
            trainer.limit_val_batches = 0
            trainer.fit(task, train_dataloaders=_Batches(task, found.micro_batch))
    if zero is not None:
        _as_zero(found, config)
    return found


def _extras(config: RunConfig) -> tuple[Guard | None, EMA | None]:
    """The callbacks of a run that hold copies of its state on the device."""
    silent: Any = SimpleNamespace(subscribe=lambda reader: None, push=lambda values: None, register=lambda *_: None)
    guard = Recovery(silent, config.recovery).guard()
    if guard is not None:
        guard._restore = lambda *_: _undo(guard)  # type: ignore[method-assign]
    decay = config.train.ema_decay
    return guard, EMA(decay, silent) if decay else None


def _undo(guard: Guard) -> None:
    """What the guard puts back after a step is made and dropped: step counts, whose values are known, would lose them."""
    if guard._bad is not None:
        for part, copy in guard._before:
            torch.where(guard._bad, copy, part)
    guard._before, guard._bad = [], None


def _replicated(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, strategy=configs.section("strategy", {"name": "ddp"}))


def _as_zero(found: Trace, config: RunConfig) -> None:
    """Turns the trace of a replicated model into that of ZeRO (arXiv:1910.02054, section 5; offload arXiv:2101.06840).

    Each rank also has a float32 copy of its part of the parameters, and buckets in which gradients are reduced.
    """
    zero, world, memory = config.strategy, config.resources.world_size, found.memory
    width = 2 if config.train.precision == "bf16-true" else 4
    weights, averages = found.parameters * width, found.parameters * 4 if config.train.ema_decay else 0
    states = found.checkpoint_bytes - weights - averages
    if width == 2:
        states *= 2  # moments of the float32 copies
    found.checkpoint_bytes = found.parameters * 4 + averages + states  # the copies are saved, not what was made of them
    masters = found.parameters * 4 // world
    memory["optimiser"] = states // world + masters
    memory["averages"] //= world
    memory["gradients"] = weights // (world if zero.stage >= 2 else 1) + min(zero.bucket_mib << 20, weights)
    if zero.stage == 3:
        memory["parameters"] = weights // world
        memory["gathered"] = min(weights, 10**9 * width)  # so many stay gathered
    if zero.offload_optimizer:
        found.host_bytes += memory["optimiser"]
        memory["optimiser"] = 0
    if zero.offload_parameters:
        found.host_bytes += memory["parameters"]
        memory["parameters"] = 0
    local = config.resources.processes_per_node
    gathers = 2 * found.accumulation if zero.stage == 3 else 1
    reduces = found.accumulation if zero.stage >= 2 else 1
    if world > 1:
        found.traffic[Route("all-gather", world, local)] = Traffic(gathers, gathers * weights)
        found.traffic[Route("reduce-scatter", world, local)] = Traffic(reduces, reduces * weights)
    found.by_arithmetic = True


class _Batches:
    """Endless batches of the right shapes."""

    def __init__(self, task: Task, size: int) -> None:
        self.task, self.size = task, size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.task.example_batch(self.size, "cpu")


class Probe(pl.Callback):
    """Tells the tracker what the loop does, and reads it at the end of the traced step."""

    def __init__(self, tracker: Tracker, trace: Trace, guard: Guard | None, average: EMA | None) -> None:
        self.tracker, self.trace, self.guard, self.average = tracker, trace, guard, average
        self._gradients: set[int] = set()
        self._buckets: list[Tensor] = []
        self._replicated: list[Tensor] = []
        self._bucket_bytes = self._sent_buffers = 0
        self._last_micro_batch = True
        self._middle: Counts | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        self.tracker.forward()
        self._last_micro_batch = (index + 1) % trainer.accumulate_grad_batches == 0
        if trainer.global_step == _TRACED_STEP - 1 and index % trainer.accumulate_grad_batches == 0:
            self.tracker.restart()
        elif trainer.global_step == _TRACED_STEP - 1 and index % _TRACED_MICRO_BATCHES == 1:
            self._middle = self.tracker.counts()
        elif trainer.global_step == _TRACED_STEP - 1 and index % _TRACED_MICRO_BATCHES == 2:
            self.tracker.repeat_since(self._middle, self.trace.accumulation - _TRACED_MICRO_BATCHES)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        self.tracker.phase = BACKWARD

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.tracker.phase = STEP
        self._gradients |= self.tracker.ids(p.grad for p in pl_module.parameters() if p.grad is not None)
        if self.guard is not None:
            self.tracker.mark(UNDO, (copy for _, copy in self.guard._before))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.tracker.phase = BATCH
        if trainer.global_step == _TRACED_STEP:
            self._read(trainer, pl_module, self.tracker.finish())

    # ------------------------------------------------------------------------------------------- replicated data parallel
    def replicate(self, network: nn.Module, bucket_bytes: int) -> None:
        """What `DistributedDataParallel` does to memory and traffic; its reducer is C++ that reads addresses.

        Gradients are views of buckets that live as long as the run. A gradient that autograd makes is copied into its
        bucket in the last micro-batch of a step, and freed.
        """
        trained: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        self._buckets = [torch.empty_like(p) for p in trained]
        for parameter, bucket in zip(trained, self._buckets, strict=True):
            parameter.register_post_accumulate_grad_hook(self._into(bucket))
        self._replicated = trained
        self._sent_buffers = sum(_bytes(buffer) for buffer in network.buffers())
        self._bucket_bytes = bucket_bytes

    def _into(self, bucket: Tensor) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self._last_micro_batch:
                parameter.grad = bucket

        return hook

    # -------------------------------------------------------------------------------------------------------- internals
    def _read(self, trainer: pl.Trainer, task: pl.LightningModule, peak: Snapshot) -> None:
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        optimiser = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        ids = self.tracker.ids
        known = {
            "parameters": ids(task.parameters()),
            "buffers": ids(task.buffers()),
            "optimiser": ids(optimiser),
            "gradients": self._gradients | ids(self._buckets),
            "averages": ids(self.average._averages if self.average is not None else ()),
        }
        found = self.trace
        found.memory, found.phase = categorise(peak, known), peak.phase
        found.traffic, found.work = self.tracker.traffic, self.tracker.work
        world = trainer.world_size
        local = self.tracker.local
        if self._buckets:
            size = sum(_bytes(p) for p in self._replicated)
            found.traffic[Route("all-reduce", world, local)] = Traffic(math.ceil(size / self._bucket_bytes), size)
            if self._sent_buffers:
                count = found.accumulation
                found.traffic[Route("broadcast", world, local)] = Traffic(count, count * self._sent_buffers)
        averages = self.average._averages if self.average is not None else []
        kept = [*task.parameters(), *task.buffers(), *optimiser, *averages]
        found.checkpoint_bytes = sum(value.numel() * value.element_size() for value in kept)  # whole, of DTensors too


def _bytes(tensor: Tensor) -> int:
    return sum(storage.nbytes() for storage in storages(tensor))

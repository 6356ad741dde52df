"""Which callbacks a run has, in which order. A new callback is one line in `assemble`.

The order is a contract, see `trainer.callbacks`: position and rows of a step come before its checkpoint.
A callback with a method `record()` adds the fields that it returns to the record of the run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from datamodules.position import StreamPosition
from datamodules.store import Store
from modules.tasks.base import Task
from trainer import signals
from trainer.callbacks import loggers, parity
from trainer.callbacks.checkpoint import Checkpoint
from trainer.callbacks.diagnostics import DiagnosticsLog
from trainer.callbacks.ema import EMA
from trainer.callbacks.guard import NONFINITE
from trainer.callbacks.heartbeat import Heartbeat
from trainer.callbacks.metrics import MetricsLog
from trainer.callbacks.preemption import Preemption
from trainer.callbacks.progress import Progress
from trainer.callbacks.pruning import Pruning, judge
from trainer.callbacks.recovery import Recovery, Rollback
from trainer.callbacks.selfcheck import SelfCheck
from trainer.callbacks.throughput import Throughput
from trainer.callbacks.validation import MissedValidation
from trainer.callbacks.watchdog import Watchdog
from trainer.checkpoint import Checkpointer
from trainer.config import to_dict
from trainer.distributed import on_rank_zero
from trainer.flops import peak_and_source
from trainer.outcome import LOSS_WINDOW
from trainer.records import MetricsWriter, TraceWriter, read_attempts
from trainer.rollback import SkipWindow, skips
from trainer.schema import RunConfig


@dataclass
class Parts:
    """What callbacks are made from.

    Attributes:
        store: the run's URL.
        checkpointer: over `store`'s `checkpoints/`.
        attempt: number of this attempt, 1 for the first.
        flops: forward and backward of one sample; None: not counted.
        trace: where the ids of samples go, if anywhere.
        rollback: what this attempt goes back for, if it does.
        tell: puts the cause of a sudden end into the record; any rank and thread may call it.
    """

    config: RunConfig
    accelerator: str
    store: Store
    checkpointer: Checkpointer
    strategy: Any
    task: Task
    data: Any
    attempt: int
    flops: int | None
    writer: MetricsWriter
    trace: TraceWriter | None
    rollback: Rollback | None = None
    tell: Callable[[str], None] = lambda line: None


@dataclass
class Watch:
    """The callbacks of a run in their order, and those that the run itself asks."""

    metrics: MetricsLog
    recovery: Recovery
    preemption: Preemption
    throughput: Throughput
    heartbeat: Heartbeat
    pruning: Pruning | None = None
    loggers: loggers.Loggers | None = None
    callbacks: list[pl.Callback] = field(default_factory=list)
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=LOSS_WINDOW))

    def record(self) -> dict[str, Any]:
        """What the callbacks add to the record."""
        found: dict[str, Any] = {}
        for callback in self.callbacks:
            if hasattr(callback, "record"):
                found |= callback.record()
        return found


def assemble(parts: Parts) -> Watch:
    """The callbacks of a run. Collective."""
    config, task, rank = parts.config, parts.task, dist.get_rank()
    metrics = MetricsLog(parts.writer, every=config.log.every, trace=parts.trace)
    positions, rollbacks = on_rank_zero(lambda: skips(parts.store))
    recovery, preemption = Recovery(metrics, config.recovery, rollbacks), Preemption()
    name = torch.cuda.get_device_name() if parts.accelerator == "cuda" else "cpu"
    throughput = Throughput(
        metrics,
        global_batch=config.train.global_batch,
        tokens_per_sample=task.tokens_per_sample(),
        flops_per_sample=parts.flops,
        peak=peak_and_source(name, config.train.precision),
        first_start=on_rank_zero(lambda: read_attempts(parts.store)[0].get("time")),
    )
    watchdog = Watchdog(
        parts.store,
        parts.attempt,
        init_seconds=config.recovery.init_timeout_seconds,
        step_seconds=config.recovery.step_timeout_seconds,
        tell=parts.tell,
    )

    @contextmanager
    def stalled() -> Iterator[None]:
        with watchdog.saving(), throughput.stalled():
            yield

    def healthy(step: int, module: torch.nn.Module) -> bool:
        if config.recovery.parity_every:  # what is saved is what all replicas hold
            parity.check(module, step)
        return recovery.finite(step, module)

    check = SelfCheck(config.train.precision) if config.checkpoint.self_check else None
    parts.checkpointer.before_commit = metrics.settle  # no resume leaves a hole in the curves
    saver = Checkpoint(
        parts.checkpointer,
        config.checkpoint,
        before_save=lambda: before_save(metrics, check),
        healthy=healthy,
        stalled=stalled,
        event=metrics.event,
        val_every=config.train.val_every,
    )
    heartbeat = Heartbeat(
        parts.store,
        metrics,
        watchdog,
        about={
            "name": config.name,
            "attempt": parts.attempt,
            "max_steps": config.train.max_steps,
            "accelerator": name,
            "strategy": config.strategy.name,
            "tokens_per_sample": task.tokens_per_sample(),
            "parameters": sum(p.numel() for p in task.network.parameters()),
        },
        committed=lambda: (
            parts.checkpointer.committed or (parts.strategy.loaded and (parts.strategy.loaded, 0.0)) or None
        ),
        obey=signals.ask,
    )
    watch = Watch(metrics, recovery, preemption, throughput, heartbeat)
    skipped = config.recovery.nonfinite == "skip"
    metrics.subscribe(
        lambda rows: watch.losses.extend(
            row["loss"] for row in rows if "loss" in row and not (skipped and row.get(NONFINITE))
        )
    )

    callbacks = watch.callbacks
    callbacks.append(watchdog)
    callbacks.append(StreamPosition())
    callbacks.append(SkipWindow(positions, parts.rollback))
    if config.diagnostics.every:
        callbacks.append(DiagnosticsLog(config.diagnostics.names, config.diagnostics.every, metrics))
    guard = recovery.guard()
    if guard is not None:
        callbacks.append(guard)
    if config.train.ema_decay:
        callbacks.append(EMA(config.train.ema_decay, parts.checkpointer, validate=config.train.ema_validation))
    if config.recovery.parity_every:
        callbacks.append(parity.Parity(config.recovery.parity_every))
    callbacks += [metrics, recovery, preemption, *([check] if check else []), saver]
    judged = judge()
    if judged is not None:
        watch.pruning = Pruning(judged, parts.store, metrics, lambda: mean(watch.losses))
        callbacks.append(watch.pruning)
    if config.train.val_every and parts.strategy.parent is None:  # the step that a branch begins at is its parent's
        callbacks.append(MissedValidation(parts.store, config.train.val_every))
    if config.log.progress and rank == 0:
        callbacks.append(
            Progress(
                metrics,
                samples_per_step=config.train.global_batch,
                tokens_per_sample=task.tokens_per_sample(),
                name=config.name,
            )
        )
    callbacks.append(heartbeat)
    callbacks.append(watchdog.ready)
    loggers.check(config.log)  # on all ranks: they have the same packages
    if rank == 0:
        kinds = loggers.sinks(config.log, parts.store, name=config.name, settings=to_dict(config))
        watch.loggers = loggers.Loggers(metrics, parts.store, kinds, hurried=lambda: preemption.signal is not None)
        callbacks.append(watch.loggers)
    callbacks.append(throughput)  # last
    return watch


def mean(losses: Collection[float]) -> float | None:
    """Of the last training losses; None where there is none."""
    return sum(losses) / len(losses) if losses else None


def before_save(metrics: MetricsLog, check: SelfCheck | None) -> None:
    """What comes before a save, on all ranks: rows leave the device, and the stored sample is measured."""
    metrics.flush(wait=False)
    if check is not None:
        check.measure()

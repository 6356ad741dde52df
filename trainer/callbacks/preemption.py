"""Signals end a run at a step boundary, saved."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from trainer import signals
from trainer.callbacks.stopping import stop


class Preemption(pl.Callback):
    """SIGTERM, SIGUSR1 or SIGINT on any rank stops all ranks after the same step; the checkpoint callback then saves.

    A handler only keeps the signal (see `trainer.signals`). After each step the ranks begin a maximum of what they received
    over gloo and read the one that they began a step earlier, so no step waits for it and no device is asked.

    `signal` is the signal that all ranks agreed on, None while there is none. A run that goes back to an earlier commit at
    that moment asks anew after its first step: who received the signal has it still.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: Any = None
        self._group: Any = None
        self._step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        signals.note()
        if dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step or self.signal is not None:
            return
        self._step = trainer.global_step
        if self._group is None:
            agreed = signals.received()
        else:
            agreed = 0
            if self._pending is not None:
                self._pending.wait()
                agreed = int(self._flag)
            if not agreed:
                self._flag = torch.tensor([signals.received()])
                self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if agreed:
            self.signal = agreed
            if trainer.global_step < trainer.max_steps:  # else this is the end anyway, with its validation
                stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

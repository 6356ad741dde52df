"""When a run is saved."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import lightning.pytorch as pl

from datamodules.store import Store
from trainer.checkpoint import step_name


class Checkpoint(pl.Callback):
    """Commits every `every` optimiser steps and at the end of training.

    Args:
        store: the `checkpoints/` prefix of the run.
        every: optimiser steps between commits (0: only at the end).
        before_save: called on all ranks first. It puts the metric rows up to this step into the store, so that no resume
            leaves a hole in the curves, and learns whether the run is still healthy.
        healthy: asked on all ranks with step and module; False once the run has diverged: its state is not worth keeping,
            and must not push out a good one.
        stalled: wraps the time that training stands still.
    """

    def __init__(
        self,
        store: Store,
        every: int,
        *,
        before_save: Callable[[], None],
        healthy: Callable[[int, pl.LightningModule], bool],
        stalled: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.store, self.every = store, every
        self._before_save, self._healthy, self._stalled = before_save, healthy, stalled
        self._last = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.every and trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        if step == self._last:  # saved, or a micro-batch within a step
            return
        with self._stalled():
            self._before_save()
            if self._healthy(step, trainer.lightning_module):
                trainer.save_checkpoint(self.store.join(step_name(step)), weights_only=False)
        self._last = step

"""Keeps the data stream's position in step with the optimiser."""

from typing import Any

import lightning.pytorch as pl


class StreamPosition(pl.Callback):
    """Advances the data module by one global batch per optimiser step, so that its state is what was trained on.

    Runs before the checkpoint callback. The loader itself is usually a few batches ahead.
    """

    def __init__(self, global_batch: int) -> None:
        self.global_batch = global_batch
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            trainer.datamodule.advance(self.global_batch)  # type: ignore[attr-defined]

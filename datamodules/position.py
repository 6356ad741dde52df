"""Keeps the position of a streaming data module in step with the optimiser."""

from typing import Any

import lightning


class StreamPosition(lightning.Callback):
    """Advances the trainer's data module by one global batch per optimiser step, so that its state is what was trained on.

    A ``StreamingDataModule`` adds it to a trainer that has none. Must come before what saves checkpoints. The loader itself
    is usually a few batches ahead.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """``ValueError`` if an optimiser step of the trainer is not a global batch of the data."""
        self._step = trainer.global_step
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.accumulate_grad_batches != data.share.accumulation:
            raise ValueError(
                f"accumulate_grad_batches={trainer.accumulate_grad_batches}: global_batch={data.global_batch} on "
                f"{data.share.world_size} ranks is {data.share.accumulation} micro-batches of {data.share.micro}; "
                f"set it to {data.share.accumulation}"
            )
        # A run that is resumed with other micro-batches, or from within a global batch, begins that batch again: Lightning
        # steps when the batches of the epoch so far are a multiple.
        counted = trainer.fit_loop.epoch_loop.batch_progress.current
        begun = counted.ready % data.share.accumulation
        for name in ("ready", "started", "processed", "completed"):
            setattr(counted, name, getattr(counted, name) - begun)

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            data.advance(data.global_batch)

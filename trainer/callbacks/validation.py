"""Validation that a kill has cut off."""

import lightning.pytorch as pl

from datamodules.store import Store
from trainer.distributed import on_rank_zero
from trainer.records import read_metrics


class MissedValidation(pl.Callback):
    """Validates before the first step of a resumed run whose checkpoint was saved and whose validation was then lost.

    Asks for the step that was really loaded: a damaged checkpoint is fallen back from.

    Args:
        store: the run's URL.
        every: steps between validations.
    """

    def __init__(self, store: Store, every: int) -> None:
        self.store, self.every = store, every

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if not step or step % self.every or not on_rank_zero(lambda: self._missing(step)):
            return
        trainer.validating = True
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False  # from its first sample: the progress that was loaded is that of an earlier validation
        loop.run()
        trainer.training = True

    def _missing(self, step: int) -> bool:
        return not any(
            row["step"] == step and any(name.startswith("val/") for name in row) for row in read_metrics(self.store)
        )

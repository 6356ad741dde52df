"""Validation that a kill has cut off."""

import lightning.pytorch as pl


class MissedValidation(pl.Callback):
    """Validates before the first step of a resumed run: its checkpoint was saved, and its validation then lost."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

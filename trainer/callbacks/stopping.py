"""How a callback ends training before its last step."""

import lightning.pytorch as pl


def stop(trainer: pl.Trainer) -> None:
    """Ends training after this step, without the validation that Lightning would do first: who stops a run has little
    time, or has seen enough. One that was due is made up for by the attempt that goes on from here."""
    trainer.should_stop = True
    trainer.limit_val_batches = 0

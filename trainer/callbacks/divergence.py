"""A run whose loss is no number any more is over, and that is a result."""

import math

import lightning.pytorch as pl

from trainer.callbacks.metrics import MetricsLog
from trainer.records import Row


class Divergence(pl.Callback):
    """Stops training at the first step whose loss is not finite; `step` is that step, None while all is well.

    It reads the reduced rows, which are the same on all ranks, so all ranks stop at the same step and no step waits for
    the device. The steps between the bad one and the next reduction are lost work, never a saved checkpoint.
    """

    def __init__(self, log: MetricsLog) -> None:
        self.step: int | None = None
        self._log = log
        self._trainer: pl.Trainer | None = None
        log.subscribe(self._look)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer

    @property
    def healthy(self) -> bool:
        return self.step is None

    def _look(self, rows: list[Row]) -> None:
        if self.step is not None:
            return
        bad = next((row for row in rows if "loss" in row and not math.isfinite(row["loss"])), None)
        if bad is not None:
            self.step = bad["step"]
            self._log.event(bad["step"], "diverged", loss=bad["loss"])
            if self._trainer is not None:
                self._trainer.should_stop = True

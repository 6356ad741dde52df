"""Whether a run is worth going on with, asked at each validation of whoever started it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping

import lightning.pytorch as pl

from datamodules.store import Store
from trainer.callbacks.metrics import MetricsLog
from trainer.callbacks.stopping import stop
from trainer.distributed import on_rank_zero

JUDGE, JUDGE_SETTINGS = "KEEL_JUDGE", "KEEL_JUDGE_SETTINGS"  # module:function, and JSON that it reads itself

# (run's store, step, metrics) -> why the run shall end, or None. Metrics are those of the validation, and `loss`, the mean of
# the last training losses. Called on rank 0 while the others wait.
Judge = Callable[[Store, int, Mapping[str, float]], str | None]


def judge() -> Judge | None:
    """The judge that the environment names, if any.

    Raises:
        ValueError: there is no such function.
    """
    name = os.environ.get(JUDGE, "")
    if not name:
        return None
    module, _, attribute = name.partition(":")
    try:
        found: Judge = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{JUDGE}={name}: no such function ({error}); write it as module:function") from error
    return found


class Pruning(pl.Callback):
    """Ends the run, saved and with status `pruned`, when the judge says so. All ranks do the same.

    `why` is what the judge said, empty while the run goes on.
    """

    def __init__(self, judge: Judge, store: Store, log: MetricsLog, loss: Callable[[], float | None]) -> None:
        self.why = ""
        self._judge, self._store, self._log, self._loss = judge, store, log, loss

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if self.why or not step or step >= trainer.max_steps:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        loss = self._loss()
        if loss is not None:
            metrics["loss"] = loss
        self.why = on_rank_zero(lambda: self._judge(self._store, step, metrics)) or ""
        if self.why:
            self._log.event(step, "pruned", why=self.why)
            stop(trainer)

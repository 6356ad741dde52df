"""Collects the stability diagnostics on every k-th optimiser step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning
import torch

from trainer.callbacks.metrics import MetricsLog
from trainer.diagnostics import build
from trainer.diagnostics.base import Context


class DiagnosticsLog(lightning.Callback):
    """Columns `diag/<name>/<what>` on steps `every`, `2 every`, ... in the rows of `log`. Comes before it in the list.

    Raises ValueError before training for an unknown name or a network that a diagnostic cannot measure.
    """

    def __init__(self, names: Sequence[str], every: int, log: MetricsLog) -> None:
        if every < 1:
            raise ValueError(f"diagnostics.every={every}: must be at least 1")
        self.every, self._log = every, log
        self._diagnostics = build(names)
        self._target: int | None = None  # the step being measured

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        if stage == "fit":
            for diagnostic in self._diagnostics.values():
                diagnostic.check(pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step + 1
        if self._target is not None or step % self.every:
            return
        self._target = step
        context = Context(pl_module, pl_module.network, batch)
        for diagnostic in self._diagnostics.values():
            diagnostic.start(context)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._target is not None:
            # Callbacks run before the module, which finishes the mean over uneven counts here. It does so once, whoever
            # calls; without it the gradients would be measured before they have their scale.
            pl_module.on_before_optimizer_step(optimizer)
            with torch.no_grad():
                for diagnostic in self._diagnostics.values():
                    diagnostic.before_step()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._target is None or trainer.global_step < self._target:
            return
        with torch.no_grad():
            for name, diagnostic in self._diagnostics.items():
                self._log.push({f"diag/{name}/{what}": value for what, value in diagnostic.collect().items()})
        self._stop()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._target = None
        for diagnostic in self._diagnostics.values():
            diagnostic.stop()

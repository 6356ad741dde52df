"""A running average of the weights, which lies and is saved like the weights themselves."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.checkpoint import Checkpointer


class EMA(pl.Callback):
    """`average <- decay average + (1 - decay) weights` after each optimiser step, from the initial weights on.

    In float32, of this rank's shard: no communication, and memory for one more copy of the trained parameters, split as
    they are. Checkpoints hold it as `ema.<parameter>`, into any world size and strategy.

    Comes after what may undo a step and before the checkpoint callback.

    Args:
        decay: per step, in [0, 1).
        checkpointer: that of the run, at which the averages are registered.
        validate: validation sees the averages in place of the weights, which come back bit for bit.
    """

    def __init__(self, decay: float, checkpointer: Checkpointer, *, validate: bool = False) -> None:
        self.decay, self.validate = decay, validate
        self._averages: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._strategy: Any = None
        self._step = 0
        checkpointer.register("ema", self._named)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._strategy = trainer.strategy

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weights = [weight.float() for weight in _shards(self._strategy.masters())]
        torch._foreach_lerp_(_shards(self._averages), weights, 1 - self.decay)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.validate:
            self._begin()
            self._kept = [weight.clone() for weight in _shards(self._strategy.masters())]
            self._put(_shards(self._averages))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._kept:
            self._put(self._kept)
            self._kept = []

    @torch.no_grad()
    def _begin(self) -> None:
        if not self._averages:
            self._averages = [weight.detach().to(torch.float32, copy=True) for weight in self._strategy.masters()]

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(_shards(self._strategy.masters()), values)
        self._strategy.weights_changed()

    def _named(self) -> dict[str, Tensor]:
        self._begin()
        return self._strategy.named(self._averages)


def _shards(tensors: list[Tensor]) -> list[Tensor]:
    """What this rank holds of each tensor; shares the memory."""
    return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]

"""Whether a resumed run computes what the saved one did."""

import logging
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from trainer.checkpoint import CheckpointError
from trainer.distributed import on_rank_zero

log = logging.getLogger("keel.checkpoint")

# Relative differences that other sums over another number of ranks may cause.
_TOLERANCE = {"32-true": 1e-4}
_TOLERANCE_OF_HALF = 2e-2


class SelfCheck(pl.Callback):
    """The loss of one stored sample (the first that rank 0 trained on) is kept in each checkpoint and computed again after
    loading, without gradient and dropout. When they differ, the code, the data's statistics, the precision or a weight is
    not what it was.

    Costs one forward pass of one sample per save. Must stand before the checkpoint callback, which calls `measure`.

    Args:
        precision: of the run; says how far the two may lie apart.
    """

    def __init__(self, precision: str) -> None:
        self.tolerance = _TOLERANCE.get(precision, _TOLERANCE_OF_HALF)
        self._batch: dict[str, Tensor] | None = None
        self._loss: float | None = None
        self._step = 0
        self._trainer: pl.Trainer | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares, after a resume. Collective."""
        if self._batch is None or self._loss is None:
            return
        loss = self._measure(trainer, pl_module)
        # `not <=` also catches nan
        if not abs(loss - self._loss) <= self.tolerance * max(abs(self._loss), 1e-8):
            raise CheckpointError(
                f"resume self-check failed: a stored sample had the loss {self._loss:.9g} when step {self._step} was saved, "
                f"and has {loss:.9g} after loading: the code, the precision or the statistics of the data have changed; "
                "undo that, or resume with checkpoint.self_check=false"
            )
        log.info("resume self-check: loss %.9g of the stored sample, %.9g when it was saved", loss, self._loss)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._batch is None:
            first = {name: value[:1].detach().cpu().clone() for name, value in batch.items()}
            self._batch = on_rank_zero(lambda: first)

    def measure(self) -> None:
        """Computes the loss to be saved. Collective."""
        if self._trainer is not None and self._batch is not None:
            self._loss = self._measure(self._trainer, self._trainer.lightning_module)
            self._step = self._trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._batch, "loss": self._loss, "step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batch, self._loss, self._step = state_dict["batch"], state_dict["loss"], state_dict["step"]

    def _measure(self, trainer: pl.Trainer, module: Any) -> float:
        assert self._batch is not None
        device = module.device
        batch = {name: value.to(device) for name, value in self._batch.items()}
        training = module.training
        module.eval()
        try:
            devices = [device] if device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
                total, count, _ = module.loss_terms(trainer.precision_plugin.convert_input(batch))
        finally:
            module.train(training)
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()  # whole parameters would outlive a change of the shards
        pair = torch.stack([total.detach().double(), torch.as_tensor(count, device=device).double()])
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast(pair, src=0)  # ranks may differ in the last bit
        return float(pair[0] / pair[1])

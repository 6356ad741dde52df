"""A run whose numbers are no numbers any more is over, and that is a result."""

import math

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from trainer.callbacks.metrics import MetricsLog
from trainer.records import Row


class Divergence(pl.Callback):
    """Stops training at the first step whose loss is not finite; `step` is that step, None while all is well.

    It reads the reduced rows, which are the same on all ranks, so all ranks stop at the same step and no step waits for
    the device. What was trained between the bad step and the next reduction is lost, and never saved: before a save
    `finite` looks at the parameters, too.
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

    def finite(self, step: int, module: nn.Module) -> bool:
        """Whether the run is healthy and all parameters of all ranks are finite after `step`. Collective."""
        if self.healthy:
            local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
            good = torch.stack([p.detach().isfinite().all() for p in local]).all().float()
            if dist.get_world_size() > 1:
                dist.all_reduce(good, dist.ReduceOp.MIN)
            if not bool(good):
                self._end(step, "parameters are not finite")
        return self.healthy

    def _look(self, rows: list[Row]) -> None:
        bad = next((row for row in rows if "loss" in row and not math.isfinite(row["loss"])), None)
        if self.healthy and bad is not None:
            self._end(bad["step"], f"loss {bad['loss']}")

    def _end(self, step: int, why: str) -> None:
        self.step = step
        self._log.event(step, "diverged", why=why)
        if self._trainer is not None:
            self._trainer.should_stop = True

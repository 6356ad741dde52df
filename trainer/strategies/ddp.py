"""Data parallel: every process holds the whole model (torch `DistributedDataParallel`)."""

from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.checkpoint import Checkpointer
from trainer.strategies import precision as precisions
from trainer.strategies.base import Checkpointed


@dataclass
class DDPConfig:
    """`timeout_seconds`: how long a collective may take before the process gives up."""

    timeout_seconds: float = 1800.0
    bucket_mib: int = 25

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0 or self.bucket_mib <= 0:
            raise ValueError("timeout_seconds and bucket_mib must be greater than 0")


class DDP(Checkpointed, DDPStrategy):
    """Lightning's DDP strategy on CPU (gloo) or CUDA (NCCL), with Keel's checkpoints."""

    config_class: ClassVar[type] = DDPConfig

    def __init__(self, config: DDPConfig, checkpointer: Checkpointer) -> None:
        super().__init__(
            timeout=timedelta(seconds=config.timeout_seconds),
            bucket_cap_mb=config.bucket_mib,
            gradient_as_bucket_view=True,
        )
        self.checkpointer = checkpointer

    def prepare(self, network: nn.Module) -> None:
        precisions.cast_weights(network, self.train_config.precision)
        super().prepare(network)

    def configure_ddp(self) -> None:
        if self.world_size > 1:  # a lone process has nobody to share gradients with: no wrapper, no copies
            super().configure_ddp()
            assert isinstance(self.model, DistributedDataParallel)
            settle_buckets(self.model)


def settle_buckets(model: DistributedDataParallel) -> None:
    """Lays the gradients out for their all-reduce once and for all, before the first step. Collective.

    torch does it after the first backward pass, in the order in which gradients came. The place of a gradient decides the
    order in which the ranks' values are added: so the first step after every resume would differ, in the last bit, from the
    same step of a run that was not interrupted (on three ranks or more). Here an empty backward pass brings the gradients
    in the reverse order of the parameters, which is about that of a real one.
    """
    reducer, parameters = model.reducer, [p for p in model.module.parameters() if p.requires_grad]
    with torch.enable_grad():
        reducer.prepare_for_forward()
        reducer.prepare_for_backward([])
        total = sum(p.flatten()[:1].sum() * 0 for p in parameters)
        assert isinstance(total, torch.Tensor)
        total.backward()  # the last summand first
    reducer._rebuild_buckets()
    for parameter in parameters:
        parameter.grad = None

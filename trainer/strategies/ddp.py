"""Data parallel: every process holds the whole model (torch `DistributedDataParallel`)."""

from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

from lightning.pytorch.strategies import DDPStrategy
from torch import nn

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

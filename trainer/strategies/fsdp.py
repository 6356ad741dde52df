"""Fully sharded data parallel, FSDP2 (`fully_shard`, arXiv:2304.11277): each block's parameters are split over ranks."""

from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from trainer.checkpoint import Checkpointer
from trainer.strategies.base import Checkpointed


@dataclass
class FSDPConfig:
    """`reshard_after_forward`: free a block's full parameters after its forward (less memory, one more all-gather)."""

    reshard_after_forward: bool = True
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds={self.timeout_seconds}: must be greater than 0")


class FSDP(Checkpointed, ModelParallelStrategy):
    """Lightning's model-parallel strategy with one data-parallel mesh, and Keel's checkpoints."""

    config_class: ClassVar[type] = FSDPConfig

    def __init__(self, config: FSDPConfig, checkpointer: Checkpointer) -> None:
        super().__init__(
            data_parallel_size=dist.get_world_size(),
            tensor_parallel_size=1,
            timeout=timedelta(seconds=config.timeout_seconds),
        )
        self.config, self.checkpointer = config, checkpointer

    def prepare(self, network: nn.Module) -> None:
        shard(network, self.device_mesh["data_parallel"], self.config.reshard_after_forward)


def shard(network: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool) -> None:
    """Splits each block of `network` over `mesh`, and what lies outside of blocks with the root."""
    for block in network.blocks():  # type: ignore[operator]
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    # The root keeps its parameters between forward and backward: they are needed again at once.
    fully_shard(network, mesh=mesh, reshard_after_forward=False)

"""Fully sharded data parallel, FSDP2 (`fully_shard`, arXiv:2304.11277): each block's parameters are split over ranks.

With `replicate` > 1 it is hybrid (HSDP): that many copies of the model, each split over the ranks of one copy. With
`tensor` > 1 the matrices of each block are cut over neighbouring ranks, too, by the network's own plan.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from modules.roles import roles
from trainer.checkpoint import Checkpointer
from trainer.strategies import deferred, tensor_parallel
from trainer.strategies import precision as precisions
from trainer.strategies.base import Checkpointed
from trainer.strategies.mesh import Layout, Meshes, build_meshes

SHARDING = ("full_shard", "shard_grad_op")


@dataclass
class FSDPConfig:
    """`sharding`: `full_shard` frees a block's whole parameters after its forward and gathers them again for its
    backward; `shard_grad_op` keeps them in between (more memory, one all-gather less).

    `replicate`: copies of the model; only gradients pass between them. `tensor`: ranks that compute one sample
    together. Both must divide the number of processes. `whole_gradients`: with several micro-batches per step, keep
    the sum of the whole gradients on each rank and reduce once (memory for communication); copies of the model reduce
    once per step anyhow.
    """

    sharding: str = "full_shard"
    replicate: int = 1
    tensor: int = 1
    whole_gradients: bool = False
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if self.sharding not in SHARDING:
            raise ValueError(f"sharding={self.sharding}: must be one of {', '.join(SHARDING)}")
        for name in ("replicate", "tensor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds={self.timeout_seconds}: must be greater than 0")


class FSDP(Checkpointed, ModelParallelStrategy):
    """Lightning's model-parallel strategy with Keel's meshes and checkpoints; the network is never whole on a rank."""

    config_class: ClassVar[type] = FSDPConfig
    defers_initialisation: ClassVar[bool] = True

    def __init__(self, config: FSDPConfig, checkpointer: Checkpointer) -> None:
        super().__init__(timeout=timedelta(seconds=config.timeout_seconds))
        self.config, self.checkpointer = config, checkpointer
        self._meshes: Meshes | None = None

    @classmethod
    def check(cls, config: Any, network: nn.Module) -> None:
        tensor_parallel.check(network, config.tensor)

    @classmethod
    def replicates(cls, config: Any) -> bool:
        return bool(config.replicate > 1 or config.tensor > 1)  # what is not cut is whole on all ranks of `tensor`

    @property
    def layout(self) -> Layout:
        return Layout(dist.get_world_size(), self.config.replicate, self.config.tensor)

    @property
    def meshes(self) -> Meshes:
        """Made at first use, which is collective."""
        if self._meshes is None:
            self._meshes = build_meshes(self.layout, self.device_type)
        return self._meshes

    def setup_environment(self) -> None:
        # Not ModelParallelStrategy's own, which makes a mesh without replicas.
        ParallelStrategy.setup_environment(self)
        self._setup_distributed()
        self._device_mesh = self.meshes.data

    def prepare(self, network: nn.Module) -> None:
        precisions.cast_weights(network, self.train_config.precision)
        if self.meshes.tensor is not None:
            tensor_parallel.apply(network, self.meshes.tensor)
        super().prepare(network)
        shard(
            network,
            self.meshes.data,
            reshard_after_forward=self.config.sharding == "full_shard",
            precision=self.train_config.precision,
        )
        if deferred.is_recorded(network):
            deferred.replay(network, self.root_device)

    def weights_changed(self) -> None:
        # After a forward without a backward the root's gathered weights are still there; they are old now.
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around all micro-batches of a step but the last: what need not be sent yet is not."""
        assert self.lightning_module is not None
        network: Any = self.lightning_module.network
        whole, replicas = self.config.whole_gradients, self.config.replicate > 1
        if whole:
            network.set_requires_gradient_sync(False)
        elif replicas:
            network.set_requires_all_reduce(False)
        try:
            yield
        finally:
            if whole:
                network.set_requires_gradient_sync(True)
            elif replicas:
                network.set_requires_all_reduce(True)


def shard(
    network: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool = True, precision: str = "32-true"
) -> None:
    """Splits each block of `network` over `mesh`, and what lies outside of blocks with the root.

    In mixed precision a block's weights are gathered in the compute dtype, but for spectral ones, which meet float32
    transforms and are gathered by themselves.
    """
    low, wide = precisions.policy(precision), precisions.policy(precision, low=False)
    for block in network.blocks():  # type: ignore[operator]
        if low != wide:
            owners = {path.rpartition(".")[0] for path, role in roles(block).items() if role == "spectral"}
            for path in sorted(owners):
                unit = block.get_submodule(path)
                fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=wide)
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=low)
    # The root keeps its parameters between forward and backward: they are needed again at once.
    fully_shard(network, mesh=mesh, reshard_after_forward=False, mp_policy=wide)
    network.register_forward_hook(_reshard_without_backward)


def _reshard_without_backward(module: Any, inputs: Any, output: Any) -> None:
    # After a forward without gradient (validation, a diagnostic) no backward would free the root, and until the next one
    # its parameters were other objects than the optimiser's: whoever looks for their gradients would find none.
    if not torch.is_grad_enabled():
        module.reshard()

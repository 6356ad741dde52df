"""DeepSpeed ZeRO (arXiv:1910.02054, offload arXiv:2101.06840): optimiser, gradients, parameters split by stage."""

import importlib.util
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer import diagnostics, optim
from trainer.checkpoint import Checkpointer
from trainer.config import ConfigError
from trainer.strategies import precision as precisions
from trainer.strategies.base import Checkpointed
from trainer.strategies.zero import ZeroState

# DeepSpeed calls collectives of torch by names that torch has renamed, and torch says so at every call.
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")


@dataclass
class DeepSpeedConfig:
    """`stage` 1 splits the optimiser's states over ranks, 2 also the gradients, 3 also the parameters.

    `offload_optimizer`, `offload_parameters` (stage 3): keep them in the host's memory. `bucket_mib`: size of the
    float32 buffers in which gradients are reduced.
    """

    stage: int = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket_mib: int = 64
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise ValueError(f"stage={self.stage}: must be 1, 2 or 3")
        if self.offload_parameters and self.stage != 3:
            raise ValueError(f"offload_parameters=true needs stage=3: stage {self.stage} does not split the parameters")
        if self.timeout_seconds <= 0 or self.bucket_mib <= 0:
            raise ValueError("timeout_seconds and bucket_mib must be greater than 0")


class DeepSpeed(Checkpointed, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, on CUDA (NCCL) and on the CPU (gloo), with Keel's checkpoints.

    Parameters become stretches of flat buffers, so optimisers that need whole matrices cannot run here.
    """

    config_class: ClassVar[type] = DeepSpeedConfig

    def __init__(self, config: DeepSpeedConfig, checkpointer: Checkpointer) -> None:
        try:
            _installed()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.config_keel, self.checkpointer = config, checkpointer
        on_cuda = dist.is_initialized() and "nccl" in str(dist.get_backend_config())
        if not on_cuda:
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is first imported
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            super().__init__(config=_settings(config), logging_level=logging.ERROR)
        self._timeout = timedelta(seconds=config.timeout_seconds)
        self._state: ZeroState | None = None

    @classmethod
    def check_run(cls, config: Any) -> None:
        super().check_run(config)
        _installed()
        name = "strategy.name=deepspeed"
        if config.train.precision not in PRECISIONS:
            raise ValueError(
                f"train.precision={config.train.precision} does not run with {name}: use {', '.join(PRECISIONS)}, "
                "or strategy.name=fsdp"
            )
        if config.train.compile and config.strategy.stage == 3:
            raise ValueError(
                f"train.compile=true does not help {name} with stage=3, whose hooks break each block's graph: "
                "use stage 1 or 2, or strategy.name=fsdp"
            )
        if getattr(optim.lookup(config.optim.name)[1], "needs_matrices", False):
            raise ValueError(
                f"optim.name={config.optim.name} needs whole matrices, and {name} has none, only flat buffers: "
                "use strategy.name=fsdp or ddp"
            )
        for diagnostic in config.diagnostics.names:
            if diagnostics.build([diagnostic])[diagnostic].reads_parameters:
                raise ValueError(
                    f"diagnostics.names: {diagnostic} cannot be measured with {name}, which keeps no gradient per "
                    "parameter: leave it out, or use strategy.name=fsdp or ddp"
                )
        if "skip" in (config.recovery.nonfinite, config.recovery.spike):
            raise ValueError(
                f"recovery: skip cannot undo a step of {name}; use rollback or stop, or strategy.name=fsdp or ddp"
            )

    @classmethod
    def replicates(cls, config: Any) -> bool:
        return bool(config.stage < 3)

    def prepare(self, network: nn.Module) -> None:
        precisions.cast_weights(network, self.train_config.precision)
        super().prepare(network)

    @property
    def root_device(self) -> torch.device:
        # DeepSpeed wants an index, which Lightning's devices of a CPU lack.
        return torch.device("cpu", self.local_rank) if self._on_cpu else super().root_device

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    @property
    def precision_plugin(self) -> Any:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Any) -> None:
        # Of whatever plugin only the name of the precision counts here.
        self._precision_plugin = None if plugin is None else ZeroPrecision(plugin.precision)

    def setup_environment(self) -> None:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it, also of a process that nobody launched
        if not self._on_cpu:
            super().setup_environment()
            return
        assert self.parallel_devices is not None
        self.parallel_devices = [torch.device("cpu", index) for index in range(len(self.parallel_devices))]
        self.setup_distributed()

    def _init_deepspeed_distributed(self) -> None:
        import deepspeed

        # The process group is there already. On the CPU DeepSpeed would compile an all-reduce over named shared memory,
        # which needs a compiler on every host and does not tell two runs of a machine apart; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._process_group_backend = self._get_process_group_backend()
        deepspeed.init_distributed(self._process_group_backend, auto_mpi_discovery=False, verbose=False)

    def _format_config(self) -> None:
        assert isinstance(self.config, dict)
        self._format_batch_size_and_grad_accum_config()
        precision = self.precision_plugin.precision
        if precision == "bf16-true":  # bfloat16 weights to compute with, float32 masters
            self.config["bf16"] = {"enabled": True}
        elif precision == "bf16-mixed":  # float32 weights and sums, as under the other strategies
            self.config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }

    def setup(self, trainer: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="deepspeed")
            super().setup(trainer)
        if self.optimizers:
            self._state = ZeroState(self.deepspeed_engine)
            # Found by `trainer.checkpoint.state`, which then asks it instead of the module.
            self.optimizers[0].named_state = self._state  # type: ignore[attr-defined]
            self.lightning_module.scale_gradients = self._scale_gradients  # type: ignore[union-attr]

    def masters(self) -> list[Tensor]:
        assert self._state is not None
        return self._state.masters()

    def named(self, values: list[Tensor]) -> dict[str, Tensor]:
        assert self._state is not None and self.lightning_module is not None
        return self._state.named(self.lightning_module, values)

    def weights_changed(self) -> None:
        assert self._state is not None
        self._state.refresh()

    def _scale_gradients(self, optimizer: Optimizer, factor: Tensor) -> None:
        # The gradients lie in buffers that differ from stage to stage; all of them are divided by the loss scale before
        # clipping. `ZeroPrecision` puts it back.
        self.deepspeed_engine.optimizer.loss_scale = 1.0 / factor.clamp_min(torch.finfo(factor.dtype).tiny)


class ZeroPrecision(DeepSpeedPrecision):
    """DeepSpeed's backward and step, with Keel's weights of uneven micro-batches and hooks once per optimiser step."""

    def convert_module(self, module: Any) -> Any:
        return module  # done by `prepare`

    def convert_input(self, data: Any) -> Any:
        return data  # the network casts what it is given

    def tensor_init_context(self) -> AbstractContextManager:
        return nullcontext()

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided the loss by the number of micro-batches; by default the engine would do it again.
        model.trainer.model.backward(model.weighted(tensor), *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        engine = model.trainer.model
        closure()
        if not engine.is_gradient_accumulation_boundary():
            return engine.step(**kwargs)
        self._after_closure(model, optimizer)
        try:
            return engine.step(**kwargs)
        finally:
            engine.optimizer.loss_scale = 1.0


def _settings(config: DeepSpeedConfig) -> dict[str, Any]:
    """DeepSpeed's own configuration, without what the loop and the precision decide."""
    elements = (config.bucket_mib << 20) // 4
    zero: dict[str, Any] = {
        "stage": config.stage,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements,
        "overlap_comm": True,
        "contiguous_gradients": True,
    }
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's optimiser also on the host: nothing is compiled
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own log only
        "steps_per_print": 1 << 40,
    }


def _installed() -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError("strategy.name=deepspeed: DeepSpeed is not installed; pip install 'keel[deepspeed]'")

"""In which numbers a run computes. One Lightning plugin each, the same for every strategy of PyTorch's own.

| `train.precision` | weights, optimiser | matrix products, convolutions, attention | gathered weights (fsdp) | reduced gradients |
|---|---|---|---|---|
| `32-true`    | float32  | float32  | float32 | float32 |
| `bf16-mixed` | float32  | bfloat16 (autocast) | bfloat16, spectral ones and those outside of blocks float32 | float32 |
| `bf16-true`  | bfloat16 | bfloat16 | bfloat16 | bfloat16 (summed in float32 under fsdp) |
| `16-mixed`   | float32  | float16 (autocast), loss scaled | float16, the same exceptions | float32 |

FFTs, norms, the softmax of the loss and rotary angles are computed in float32 by the modules that own them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from trainer.strategies.clipping import clip_by_global_norm, local_part

_COMPUTE = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class GradScaler(torch.amp.GradScaler):
    """Loss scaling for gradients that may lie in parts on many ranks (arXiv:1710.03740).

    A step is left out on all ranks when any part on any rank is not finite: one all-reduce of a number per step. As in
    torch, the decision is read by the host once a step.
    """

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    part = local_part(parameter.grad)
                    parts.setdefault((part.device, part.dtype), []).append(part)
        found = found_inf.clone()
        for (device, _), tensors in parts.items():
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, found.to(device), inv_scale.to(device))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return {found.device: found}


class _Clips(Precision):
    """Clipping that knows of sharded gradients."""

    def clip_grad_by_norm(self, optimizer: torch.optim.Optimizer, clip_val: int | float) -> None:
        clip_by_global_norm(self.main_params(optimizer), float(clip_val))


class Full(_Clips):
    """Weights, products and gradients of one dtype: `32-true`, `bf16-true`."""

    def __init__(self, precision: Literal["32-true", "bf16-true"]) -> None:
        self.precision = precision


class Mixed(_Clips, MixedPrecision):
    """`bf16-mixed` and `16-mixed`: float32 weights, products by autocast; the scaler's state is part of a checkpoint."""

    def __init__(self, precision: str, device_type: str) -> None:
        scaler = GradScaler(device=device_type) if precision == "16-mixed" else None
        super().__init__(cast(Literal["16-mixed", "bf16-mixed"], precision), device_type, scaler)


def plugin(precision: str, device_type: str) -> Precision:
    """The Lightning plugin of a precision named in `trainer.schema.PRECISIONS`, on `cpu` or `cuda`."""
    if precision in _COMPUTE:
        return Mixed(precision, device_type)
    return Full(cast(Literal["32-true", "bf16-true"], precision))


def policy(precision: str, *, low: bool = True) -> MixedPrecisionPolicy:
    """What FSDP gathers and reduces; `low`: whether the unit's weights may be gathered in the compute dtype."""
    if precision == "bf16-true":
        return MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    if precision in _COMPUTE and low:
        # Autocast would cast these weights anyway; gathering them cast halves what is sent.
        return MixedPrecisionPolicy(_COMPUTE[precision], torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy(cast_forward_inputs=False)


def cast_weights(network: nn.Module, precision: str) -> None:
    """Under `bf16-true`: weights to bfloat16 in place, and inputs cast where they enter the network.

    Losses stay outside: the task works in float32 on what the network returns.
    """
    if precision != "bf16-true":
        return
    network.to(torch.bfloat16)
    network.register_forward_pre_hook(_cast_inputs)


def _cast_inputs(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


@contextmanager
def compute(precision: str, device_type: str) -> Iterator[None]:
    """Autocast of a forward pass outside of a Lightning trainer (dry runs, benchmarks)."""
    if precision in _COMPUTE:
        with torch.autocast(device_type, dtype=_COMPUTE[precision], cache_enabled=False):
            yield
    else:
        yield

"""Floating-point operations of a training step, and what devices can do at best.

**Convention.** Model FLOPs: forward and backward of the network and its loss as written, a multiplication and an
addition counting one each; matrix products, convolutions, attention and FFTs count, element-wise work does not.
Recomputation (activation checkpointing, fused attention) is no model FLOP. Attention counts the full square also where
it is causal. Products of complex numbers count four times those of real ones. A complex FFT of n points counts
5 n log2 n, a real one half of that; backward passes count as autograd runs them (that of a real FFT is a complex one).
For a transformer of N matrix parameters on sequences of L tokens, this gives 6 N + 12 depth width L per token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from trainer.planning.devices import recognise

aten = torch.ops.aten


# -------------------------------------------------------------------------------------------------------- the counting
def fft_flops(shape: Sequence[int], dim: Sequence[int], real: bool) -> int:
    """FLOPs of FFTs along the axes `dim` of an array of `shape` (the real side's shape for real transforms)."""
    points = math.prod(shape[axis] for axis in dim)
    complex_flops = 5.0 * math.prod(shape) * math.log2(points) if points > 1 else 0.0
    return round(complex_flops / 2 if real else complex_flops)


def _raw(formula: Callable[..., int]) -> Callable[..., int]:
    formula._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode then passes tensors, not shapes
    return formula


@_raw
def _c2c(x: Tensor, dim: Sequence[int], *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return fft_flops(x.shape, dim, real=False)


@_raw
def _r2c(x: Tensor, dim: Sequence[int], *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return fft_flops(x.shape, dim, real=True)


@_raw
def _c2r(x: Tensor, dim: Sequence[int], *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return fft_flops(out_val.shape, dim, real=True)


def _matrix_product(packet: Any) -> Callable[..., int]:
    formula = flop_registry[packet]

    @_raw
    def count(*args: Any, out_val: Tensor, **kwargs: Any) -> int:
        return formula(*args, out_val=out_val, **kwargs) * (4 if out_val.is_complex() else 1)

    return count


FORMULAS: dict[Any, Callable[..., int]] = {
    aten._fft_c2c: _c2c,
    aten._fft_r2c: _r2c,
    aten._fft_c2r: _c2r,
    **{packet: _matrix_product(packet) for packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)},
}


def count_operations(function: Callable[[], Any]) -> int:
    """FLOPs of everything that `function()` runs, autograd included, by the convention above."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def meta_copy(task: Any) -> Any:
    """A copy of a task without data: parameters and buffers on the meta device, injected callables shared."""
    memo: dict[int, Any] = {}
    for parameter in task.parameters():
        meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
        memo[id(parameter)] = meta
    for buffer in task.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    for shared in ("prepare", "optimizers_factory", "_trainer"):
        value = getattr(task, shared, None)
        if value is not None:
            memo[id(value)] = value
    return copy.deepcopy(task, memo)


def count_flops(task: Any, micro_batch: int) -> int:
    """Forward and backward FLOPs per sample of `task` at `micro_batch` samples a step.

    Call it before the network is sharded or compiled. Runs on the meta device: no memory, no arithmetic. All ranks may
    call it, none has to. Raises RuntimeError when the network cannot run without values.
    """
    clone = meta_copy(task)
    batch = clone.example_batch(micro_batch, device="meta")

    def step() -> None:
        total, _, _ = clone.loss_terms(batch)
        total.backward()

    try:
        return count_operations(step) // micro_batch
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"FLOPs of {type(task.network).__name__} cannot be counted on the meta device: {error}"
        ) from error


# --------------------------------------------------------------------------------------------------------------- peaks
def device_peak(name: str, precision: str) -> float | None:
    """Peak dense FLOP/s of one device by its name as torch reports it, at a Lightning precision; None if unknown.

    `16-*` and `bf16-*` count the 16-bit matrix units; `32-true` TF32 where `torch.get_float32_matmul_precision` allows
    it, else the vector units; other precisions have no entry, nor have CPUs.
    """
    found = peak_and_source(name, precision)
    return None if found is None else found[0]


def peak_and_source(name: str, precision: str) -> tuple[float, str] | None:
    """`device_peak`, and where the figure comes from."""
    device = recognise(name)
    if device is None or not precision.startswith(("16", "bf16", "32")):
        return None
    if not precision.startswith("32"):
        return device.half, f"{device.source}: 16-bit matrix units"
    units = "vector units" if torch.get_float32_matmul_precision() == "highest" else "TF32"
    return device.peak("single"), f"{device.source}: float32 on {units}"

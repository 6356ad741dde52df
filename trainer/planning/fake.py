"""A machine that is not there: a process group of any size that sends nothing, and tensors that hold nothing.

This process is rank 0. Code that runs inside sees the world size, meshes and collectives of the real machine; tensors have
shapes, dtypes and storages of the right size, but no memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

# They compute on small tensors of ranks, whose values are needed.
_WITH_VALUES: list[tuple[Any, str]] = [
    *((DeviceMesh, name) for name in ("__init__", "__getitem__", "_flatten", "get_coordinate", "_unflatten")),
    (DTensor, "__create_chunk_list__"),
]


@contextlib.contextmanager
def fake_world(world: int, local: int) -> Iterator[None]:
    """This process as rank 0 of `world`, `local` of them on each machine.

    Raises:
        RuntimeError: this process belongs to a real process group already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process of its own: this one belongs to a process group already")
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Every tensor made inside is fake. What ranks tell each other as objects stays real (and is this rank's own)."""
    with contextlib.ExitStack() as stack:
        for owner, name in _WITH_VALUES:
            if hasattr(owner, name):
                stack.enter_context(_replaced(owner, name, with_values(getattr(owner, name))))
        stack.enter_context(_replaced(dist, "broadcast_object_list", lambda objects, *a, **k: None))
        stack.enter_context(_replaced(dist, "all_gather_object", _same_everywhere))
        stack.enter_context(_replaced(dist, "barrier", lambda *a, **k: None))
        stack.enter_context(_replaced(nn.Module, "_apply", _apply))
        # Whether a scaled step is left out is read from the device; here every step is taken.
        stack.enter_context(_replaced(torch.amp.GradScaler, "_maybe_opt_step", _step))
        stack.enter_context(_replaced(torch.amp.GradScaler, "update", _update))
        # Some code hands over real constants (seeds, tables of ranks).
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps for the backward pass what the fused kernel of accelerators keeps; on a CPU torch keeps every intermediate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


@contextlib.contextmanager
def accelerator_kernels() -> Iterator[None]:
    """Operations that accelerators run as one kernel, and CPUs in parts, are seen as one."""

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        plain = weight is None or hasattr(weight, "placements") or len(shape) != 1
        return original(x, shape, weight, eps) if plain else _FusedRMSNorm.apply(x, weight)

    original = F.rms_norm
    with _replaced(F, "rms_norm", rms_norm):
        yield


def _step(scaler: Any, optimizer: torch.optim.Optimizer, state: Any, *args: Any, **kwargs: Any) -> Any:
    return optimizer.step(*args, **kwargs)


def _update(scaler: Any, new_scale: Any = None) -> None:
    scaler._per_optimizer_states.clear()


def _apply(module: nn.Module, function: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters: torch swaps fake ones in place, which it then refuses."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            value = function(parameter.detach())
            if value.dtype != parameter.dtype or value.device != parameter.device:
                module._parameters[name] = nn.Parameter(value, parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def _same_everywhere(objects: list[Any], mine: Any, *args: Any, **kwargs: Any) -> None:
    objects[:] = [mine] * len(objects)


def with_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, made to compute on real tensors also inside `fake_tensors`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return call


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

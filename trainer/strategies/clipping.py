"""The global norm of gradients, whole or in parts, and clipping by it without waiting for the device."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a distributed tensor; a plain tensor as it is. ZeRO 3 puts it beside an empty placeholder."""
    tensor = getattr(tensor, "ds_tensor", tensor)
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients together, a float32 scalar on the device, the same on all ranks.

    Every rank sums the squares of what it holds, each tensor over the number of ranks that hold the same; one
    all-reduce over all ranks makes the norm, whatever meshes the tensors lie on. Plain tensors are the same on all
    ranks already; if there are no others, nothing is sent.
    """
    gradients = list(gradients)
    if not gradients:
        return torch.zeros(())
    world = dist.get_world_size() if dist.is_initialized() else 1
    parts = [local_part(gradient).detach() for gradient in gradients]
    norms = torch.stack([norm.reshape(()) for norm in torch._foreach_norm(parts, 2, dtype=torch.float32)])
    if world == 1 or not any(isinstance(gradient, DTensor) for gradient in gradients):
        return torch.linalg.vector_norm(norms)
    shares = torch.tensor([1.0 / _holders(gradient, world) for gradient in gradients], dtype=torch.float64)
    total = (norms.double().square() * shares.to(norms.device, non_blocking=True)).sum()
    dist.all_reduce(total)
    return total.sqrt().float()


def clip_by_global_norm(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scales all gradients in place by min(1, limit / norm), as `torch.nn.utils.clip_grad_norm_`; returns the norm.

    All ranks call it with the same parameters.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = global_norm(gradients)
    if gradients:
        factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
        parts = [local_part(gradient) for gradient in gradients]
        torch._foreach_mul_(parts, factor.to(parts[0].device))
    return norm


def _holders(tensor: Tensor, world: int) -> int:
    """How many of the `world` ranks hold the same values as any one of them."""
    if not isinstance(tensor, DTensor):
        return world
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(f"a gradient with placements {tensor.placements} is not reduced yet")
    mesh = tensor.device_mesh
    cuts = [mesh.size(axis) for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    return world // math.prod(cuts)

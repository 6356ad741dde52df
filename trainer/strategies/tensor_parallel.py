"""Tensor parallelism: a network's own plan (`modules.tensor_plan`) carried out with DTensors."""

from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from modules.tensor_plan import Split, TensorPlan

# split -> (axis along which a weight is cut, a bias is cut; placement of the input, of the output if it leaves)
_CUTS: dict[Split, tuple[int | None, int | None, Placement, Placement | None]] = {
    "column": (0, 0, Replicate(), Shard(-1)),
    "row": (1, None, Shard(-1), Replicate()),
    "gather": (0, 0, Replicate(), Replicate()),
    "heads": (None, None, Shard(2), Shard(2)),
    "replicate": (None, None, Replicate(), Replicate()),
    "share": (None, None, Replicate(), None),
}


def check(network: nn.Module, degree: int) -> None:
    """Raises ValueError if `network` cannot be cut into `degree` parts."""
    if degree == 1:
        return
    kind = type(network).__name__
    if not hasattr(network, "tensor_plan"):
        raise ValueError(f"strategy.tensor={degree}: {kind} declares no tensor-parallel plan; use strategy.tensor=1")
    plan: TensorPlan = network.tensor_plan()  # type: ignore[operator]
    for name, size in plan.divisible.items():
        if size % degree:
            raise ValueError(f"strategy.tensor={degree}: does not divide {name}={size} of the {kind}")
    _matched(network, plan)


def apply(network: nn.Module, mesh: DeviceMesh) -> None:
    """Cuts `network` over the one-dimensional `mesh` in place: every parameter becomes a DTensor, names stay.

    Each rank keeps its part of what it holds: all must hold the same values (or the meta device). Parameters that are
    whole everywhere become DTensors, too, so that optimisers and norms see one mesh.
    """
    plan: TensorPlan = network.tensor_plan()  # type: ignore[operator]
    for module, split in _matched(network, plan):
        weight, bias, given, made = _CUTS[split]
        _cut_parameters(module, {"weight": weight, "bias": bias}, mesh)
        module.register_forward_pre_hook(partial(_enter, given, mesh))
        if made is not None:
            module.register_forward_hook(partial(_leave, made))


def _matched(network: nn.Module, plan: TensorPlan) -> list[tuple[nn.Module, Split]]:
    found: list[tuple[nn.Module, Split]] = []
    for path, module in network.named_modules():
        splits = [split for pattern, split in plan.splits.items() if _matches(path, pattern)]
        if splits:
            found.append((module, splits[0]))
        elif any(True for _ in module.parameters(recurse=False)):
            raise ValueError(
                f"the tensor-parallel plan of {type(network).__name__} does not cover {path or 'its own parameters'}"
            )
    return found


def _matches(path: str, pattern: str) -> bool:
    a, b = path.split("."), pattern.split(".")
    return len(a) == len(b) and all(fnmatchcase(x, y) for x, y in zip(a, b, strict=True))


def _cut_parameters(module: nn.Module, cuts: dict[str, int | None], mesh: DeviceMesh) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        axis = cuts.get(name)
        placement: Placement = Replicate() if axis is None else Shard(axis)
        # Without a source rank nothing is sent: each rank cuts its own copy.
        cut = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def _enter(placement: Placement, mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    first, *rest = inputs
    if not isinstance(first, DTensor):
        first = DTensor.from_local(first, mesh, [_of(placement, first.ndim)], run_check=False)
    return (first, *rest)


def _leave(placement: Placement, module: nn.Module, inputs: tuple[Any, ...], output: DTensor) -> Any:
    return output.redistribute(placements=[_of(placement, output.ndim)]).to_local()


def _of(placement: Placement, axes: int) -> Placement:
    return Shard(axes - 1) if placement == Shard(-1) else placement

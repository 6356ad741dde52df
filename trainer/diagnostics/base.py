"""The protocol of a diagnostic, and what several of them share: observing outputs, norms of sharded tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from modules.roles import roles


@dataclass(frozen=True)
class Context:
    """What a diagnostic may look at during one optimiser step: `batch` is the step's first micro-batch."""

    task: Any
    network: Any
    batch: Mapping[str, Tensor]


class Diagnostic:
    """One measurement over one optimiser step. All ranks call every method, in the order

    `start` -> (forward, backward of all micro-batches) -> `before_step` -> (clip, optimiser step) -> `collect` -> `stop`.

    `collect` returns scalars on the device, never read by the host here. They are averaged over ranks, those whose name
    begins with `max_` reduced by maximum. The names must be the same on all ranks.
    """

    reads_parameters: ClassVar[bool] = False  # or their gradients, as whole tensors or DTensors

    def check(self, task: Any) -> None:
        """Raises ValueError, before training starts, if this task or its network cannot be measured."""

    def start(self, context: Context) -> None:
        """Attaches hooks, before the first micro-batch of the step."""

    def before_step(self) -> None:
        """All gradients of the step are there, reduced over ranks, not yet clipped."""

    def collect(self) -> dict[str, Tensor]:
        """The measurements of the step, after the parameters have moved."""
        raise AssertionError(f"{type(self).__name__} defines no collect()")

    def stop(self) -> None:
        """Detaches everything and drops references. Safe to call at any time, also twice."""


class Observers:
    """Functions that see the output of modules until `remove`. They run without autograd.

    A module compiled in place (`module.compile()`) ignores hooks added later, so its compiled call is wrapped instead:
    no recompilation, the graph stays as it is.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def add(self, module: nn.Module, see: Callable[[Tensor], None]) -> None:
        """`see(output)` after each forward of `module`; of a tuple, the first element."""

        def look(output: Any) -> None:
            with torch.no_grad():
                first = output[0] if isinstance(output, tuple | list) else output
                see(first.to_local() if isinstance(first, DTensor) else first)

        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is None:
            self._undo.append(module.register_forward_hook(lambda _module, _inputs, output: look(output)).remove)
            return

        def call(*args: Any, **kwargs: Any) -> Any:
            output = compiled(*args, **kwargs)
            look(output)
            return output

        module.__dict__["_compiled_call_impl"] = call

        def restore() -> None:
            module.__dict__["_compiled_call_impl"] = compiled

        self._undo.append(restore)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()


def shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor (itself when it is not sharded), real (complex numbers as pairs)."""
    parts = [tensor.detach() for tensor in tensors]
    parts = [part.to_local() if isinstance(part, DTensor) else part for part in parts]
    return [torch.view_as_real(part) if part.is_complex() else part for part in parts]


def squared_norms(parts: Sequence[Tensor], whole: Sequence[Tensor]) -> Tensor:
    """Squared L2 norm of each whole tensor, float64 [n].

    `parts` are local parts laid out like `whole` (see `shards`), whose placements say what to sum over. Collective where
    a tensor is sharded: one all-reduce per (mesh, sharded axis), so a single one for a model under FSDP2.
    """
    norms = torch._foreach_norm(list(parts), 2, dtype=torch.float32)
    squares = torch.stack([norm.reshape(()) for norm in norms]).double().square()
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for position, tensor in enumerate(whole):
        if not isinstance(tensor, DTensor):
            continue
        if any(placement.is_partial() for placement in tensor.placements):
            raise ValueError(f"the norm of a tensor with placements {tensor.placements} needs a redistribution first")
        axes = tuple(axis for axis, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate))
        if axes:
            groups.setdefault((tensor.device_mesh, axes), []).append(position)
    for (mesh, axes), positions in groups.items():
        where = torch.tensor(positions, device=squares.device)
        summed = squares[where]
        for axis in axes:
            dist.all_reduce(summed, group=mesh.get_group(axis))
        squares[where] = summed
    return squares


class ParameterGroups:
    """The parameters of a network by block and by role: labels `block_00`, ..., `outside`, `role_hidden`, ...

    Shared parameters count once. Each label sums over its parameters with one small matrix product.
    """

    def __init__(self, network: Any) -> None:
        named = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self.parameters: list[nn.Parameter] = list(named.values())
        role_of = roles(network)
        blocks = network.blocks()
        width = max(2, len(str(len(blocks) - 1)))
        block_of: dict[int, str] = {}
        for number, block in enumerate(blocks):
            for parameter in block.parameters():
                block_of.setdefault(id(parameter), f"block_{number:0{width}d}")
        members: dict[str, list[int]] = {}
        for position, (name, parameter) in enumerate(named.items()):
            members.setdefault(block_of.get(id(parameter), "outside"), []).append(position)
            members.setdefault(f"role_{role_of[name]}", []).append(position)
        self.labels = sorted(members)
        matrix = torch.zeros(len(self.labels), len(named), dtype=torch.float64)
        for row, label in enumerate(self.labels):
            matrix[row, members[label]] = 1.0
        device = next(iter(shards(self.parameters))).device
        self._matrix = matrix.to(device)

    def sums(self, values: Tensor) -> dict[str, Tensor]:
        """Sum of `values` [parameters] for each label."""
        return dict(zip(self.labels, (self._matrix @ values).unbind(), strict=True))

"""Initial weights of a network that is never whole on one device, equal bit for bit to those of the whole one.

`record` builds the network on the meta device, where tensors have no memory, and writes down which initialisation ran
on which parameter, in order. After sharding, `replay` runs the same operations on the CPU generator, one parameter at
a time, and each rank keeps its part. The random numbers are those that the whole network would have drawn, since the
order and the shapes are the same. Each rank draws all of them: nothing is sent, and the time is that of initialising
the whole network on one CPU. Peak host memory beyond the shards: the whole parameters that are being initialised, one
at a time as long as a module initialises its parameters one after the other.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode

log = logging.getLogger("keel.run")

_ATTRIBUTE = "_keel_initialisation"


@dataclass(frozen=True)
class _Write:
    """One in-place operation on the whole of a parameter."""

    parameter: str
    operation: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


class _NotReplayable(RuntimeError):
    pass


class _Recorder(TorchDispatchMode):
    """Collects in-place operations on tensors; what cannot be told apart from the operations alone is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[tuple[Tensor, Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_place = func._schema.is_mutable
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if in_place:
            if len(tensors) != 1 or not tensors[0].is_contiguous():
                raise _NotReplayable(f"{func} writes to a parameter from other tensors")
            self.writes.append((tensors[0], func, args[1:], kwargs))
        elif torch.Tag.nondeterministic_seeded in func.tags:
            raise _NotReplayable(f"{func} draws random numbers outside of a parameter")
        return func(*args, **kwargs)


def record(build: Callable[[], nn.Module]) -> nn.Module:
    """`build()` on the meta device, to be sharded and then initialised by `replay`.

    The random state of the CPU at the call is what `replay` starts from. A network whose initialisation is more than
    in-place operations on its parameters, or that has buffers, is built whole, with a line in the log.
    """
    state = torch.get_rng_state()
    recorder = _Recorder()
    try:
        with torch.device("meta"), recorder:
            network = build()
        network.__dict__[_ATTRIBUTE] = (state, _named(network, recorder))
    except _NotReplayable as reason:
        log.info("the network is built whole on every rank before it is sharded: %s", reason)
        torch.set_rng_state(state)
        return build()
    return network


def is_recorded(network: nn.Module) -> bool:
    """Whether `network` came from `record` and still waits for `replay`."""
    return _ATTRIBUTE in network.__dict__


def replay(network: nn.Module, device: torch.device) -> None:
    """Gives a recorded network, sharded or not, its memory on `device` and its initial values. No communication.

    The random state of the process stays as it is.
    """
    state: Tensor
    writes: list[_Write]
    state, writes = network.__dict__.pop(_ATTRIBUTE)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    network.to_empty(device=device)
    parameters = dict(network.named_parameters())  # after `to_empty`, which may replace them
    last = {write.parameter: position for position, write in enumerate(writes)}
    whole: dict[str, Tensor] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        for position, write in enumerate(writes):
            if write.parameter not in whole:
                whole[write.parameter] = torch.empty(shapes[write.parameter])
            write.operation(whole[write.parameter], *write.arguments, **write.keywords)
            if last[write.parameter] == position:
                _put(whole.pop(write.parameter), parameters[write.parameter])


def _named(network: nn.Module, recorder: _Recorder) -> list[_Write]:
    if any(True for _ in network.buffers()):
        raise _NotReplayable(f"{type(network).__name__} has buffers")
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    storages = {parameter.untyped_storage()._cdata: name for name, parameter in network.named_parameters()}
    writes = []
    for tensor, operation, arguments, keywords in recorder.writes:
        name = names.get(id(tensor), storages.get(tensor.untyped_storage()._cdata))
        if name is None:
            raise _NotReplayable(f"{operation} writes to a tensor that is no parameter")
        if tensor.shape != network.get_parameter(name).shape or tensor.dtype != torch.float32:
            raise _NotReplayable(f"{operation} writes to a part of {name}")
        writes.append(_Write(name, operation, arguments, keywords))
    untouched = set(names.values()) - {write.parameter for write in writes}
    if untouched:
        raise _NotReplayable(f"{min(untouched)} is not initialised in place")
    return writes


def _put(whole: Tensor, parameter: Tensor) -> None:
    """This rank's part of `whole` into its parameter, cast to the parameter's dtype."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    part = whole[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
    parameter.to_local().copy_(part)

"""The state of a DeepSpeed ZeRO engine under parameter names, as if it had never been flattened (arXiv:1910.02054).

ZeRO keeps float32 master weights and optimiser states in flat buffers, of which each rank owns a stretch. Here every
stretch is given back to the tensors that it belongs to. So a checkpoint of ZeRO is one like any other: it is resumed at
another world size and by other strategies, optimiser included, and nothing in it is pickled.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.checkpoint.pieces import Pieces
from trainer.checkpoint.state import MODEL, OPTIMIZER
from trainer.strategies.base import WRAPPERS, plain_names


@dataclass(frozen=True)
class _Place:
    """Where a parameter's master lies on this rank: `size` elements from `start` of buffer `flat`."""

    group: int  # index of the optimiser's parameter group
    flat: torch.Tensor
    start: int
    size: int
    offset: int  # of the first one in the flattened parameter


class ZeroState:
    """Reads and fills the state of one engine of any ZeRO stage. All ranks call every method.

    Args:
        engine: a `deepspeed.DeepSpeedEngine` with a ZeRO optimiser around a torch one.
    """

    def __init__(self, engine: Any) -> None:
        self.zero, self.inner = engine.optimizer, engine.optimizer.optimizer
        self.stage: int = engine.zero_optimization_stage()

    def collect(self, module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """(tensors, scalars) as `trainer.checkpoint.state.collect`; the tensors are views of the live buffers."""
        self.initialize()
        places = self._places()
        known = {*self.inner.defaults, "initial_lr"}
        tensors: dict[str, torch.Tensor] = {}
        scalars: dict[str, Any] = {}
        for name, value in module.state_dict(keep_vars=True).items():
            for wrapper in WRAPPERS:
                name = name.replace(wrapper, "")
            if not isinstance(value, torch.Tensor):
                scalars[MODEL + name] = value
                continue
            place = places.get(id(value))
            if place is None:
                tensors[MODEL + name] = self._untrained(value)
                continue
            tensors[MODEL + name] = _view(place, value, place.flat.detach())
            for key, state in self.inner.state[place.flat].items():
                if state.shape == place.flat.shape:
                    tensors[f"{OPTIMIZER}0.state.{name}.{key}"] = _view(place, value, state)
                else:  # one number for the whole buffer, such as Adam's step: it is that of each parameter in it
                    tensors[f"{OPTIMIZER}0.state.{name}.{key}"] = state
            for key, setting in self.inner.param_groups[place.group].items():
                if key in known:
                    scalars[f"{OPTIMIZER}0.param_groups.{name}.{key}"] = (
                        list(setting) if isinstance(setting, tuple) else setting
                    )
        return tensors, scalars

    def restore(self, module: nn.Module, scalars: dict[str, Any]) -> None:
        """After the tensors of `collect` were filled in place: the settings of the groups, and the working weights."""
        places = self._places()
        for name, parameter in plain_names(module).items():
            if (place := places.get(id(parameter))) is None:
                continue
            group = self.inner.param_groups[place.group]
            prefix = f"{OPTIMIZER}0.param_groups.{name}."
            for key, setting in scalars.items():
                if key.startswith(prefix):
                    group[key.removeprefix(prefix)] = tuple(setting) if isinstance(setting, list) else setting
        self.refresh()

    def masters(self) -> list[torch.Tensor]:
        """The flat master buffers of this rank."""
        return [flat for _, flat in self._flats()]

    def named(self, module: nn.Module, values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Buffers laid out like `masters()`, as views by parameter name."""
        by_master = {id(master): value for master, value in zip(self.masters(), values, strict=True)}
        places = self._places()
        return {
            name: _view(place, parameter, by_master[id(place.flat)])
            for name, parameter in plain_names(module).items()
            if (place := places.get(id(parameter))) is not None
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master weights into those that the model computes with; collective."""
        zero = self.zero
        if self.stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:  # small ones, kept whole
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def initialize(self) -> None:
        """Makes the optimiser's states, which torch makes in the first step: a step at rate zero without gradient."""
        groups = self.inner.param_groups
        try:
            for index, flat in self._flats():
                if self.inner.state.get(flat):
                    continue
                gradient, flat.grad = flat.grad, torch.zeros_like(flat)
                self.inner.param_groups = [{**groups[index], "params": [flat], "lr": 0.0}]
                self.inner.step()
                flat.grad = gradient
        finally:
            self.inner.param_groups = groups

    def _flats(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(parameter group, master buffer) of this rank."""
        if self.stage < 3:
            yield from enumerate(self.zero.single_partition_of_fp32_groups)
        else:
            for index, flat in enumerate(self.zero.fp32_partitioned_groups_flat):
                yield self.zero.sub_group_to_group_id[index], flat

    def _places(self) -> dict[int, _Place]:
        """id of each trained parameter -> its place on this rank (of size 0 where others hold it)."""
        zero, places = self.zero, {}
        if self.stage < 3:
            for group, parameters in enumerate(zero.bit16_groups):
                flat = zero.single_partition_of_fp32_groups[group]
                for parameter in parameters:
                    mapping = parameter._hp_mapping
                    if mapping is None:
                        places[id(parameter)] = _Place(group, flat, 0, 0, 0)
                        continue
                    master, own = mapping.hp_fragment_address, mapping.lp_fragment_address
                    places[id(parameter)] = _Place(group, flat, master.start, master.numel, own.start)
            return places
        for index, parameters in enumerate(zero.fp16_groups):
            flat, group = zero.fp32_partitioned_groups_flat[index], zero.sub_group_to_group_id[index]
            for parameter in parameters:
                _, start, size = zero.grad_position[zero.get_param_id(parameter)]
                offset = zero._get_param_partition_rank(parameter) * size
                held = max(0, min(size, math.prod(parameter.ds_shape) - offset))  # without the padding of the last rank
                places[id(parameter)] = _Place(group, flat, start, held, offset if held else 0)
        return places

    def _untrained(self, value: torch.Tensor) -> torch.Tensor:
        """A buffer, or a frozen parameter: as it is, or this rank's stretch of it."""
        partition = getattr(value, "ds_tensor", None)
        if partition is None:
            return value.detach()
        shape = value.ds_shape  # type: ignore[attr-defined]
        offset = self.zero._get_param_partition_rank(value) * partition.numel()
        held = max(0, min(partition.numel(), math.prod(shape) - offset))
        return Pieces.cut(shape, offset if held else 0, partition.detach().narrow(0, 0, held))


def _view(place: _Place, parameter: torch.Tensor, flat: torch.Tensor) -> Pieces:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # stage 3 leaves placeholders without a shape
    return Pieces.cut(shape, place.offset, flat.narrow(0, place.start, place.size))

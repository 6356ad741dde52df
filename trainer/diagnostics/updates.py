"""How far one optimiser step moves the weights, relative to their size."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diagnostics.base import Context, Diagnostic, ParameterGroups, shards, squared_norms


class Updates(Diagnostic):
    """||w_after - w_before|| / ||w_before||: `relative` (all), `block_00`, ..., `outside`, `role_<role>`.

    Holds a copy of this rank's shard of the weights from the last backward to the end of the step.
    """

    reads_parameters = True

    def __init__(self) -> None:
        self._groups: ParameterGroups | None = None
        self._before: list[Tensor] = []

    def start(self, context: Context) -> None:
        self._groups = ParameterGroups(context.network)

    def before_step(self) -> None:
        assert self._groups is not None
        self._before = [part.clone() for part in shards(self._groups.parameters)]

    def collect(self) -> dict[str, Tensor]:
        assert self._groups is not None and self._before
        parameters = self._groups.parameters
        moved = torch._foreach_sub(shards(parameters), self._before)
        both = squared_norms([*moved, *self._before], [*parameters, *parameters])  # one collective for both
        moved_squares, squares = both.split(len(parameters))
        moved_of, size_of = self._groups.sums(moved_squares), self._groups.sums(squares)
        tiny = torch.finfo(torch.float64).tiny  # a group of zeros (fresh biases) that moved shows as a huge ratio
        found = {label: (moved_of[label] / size_of[label].clamp_min(tiny)).sqrt() for label in moved_of}
        found["relative"] = (moved_squares.sum() / squares.sum().clamp_min(tiny)).sqrt()
        return found

    def stop(self) -> None:
        self._groups, self._before = None, []

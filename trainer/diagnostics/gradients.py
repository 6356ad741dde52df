"""L2 norm of the gradient: whole, per block, per role, before clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.diagnostics.base import Context, Diagnostic, ParameterGroups, shards, squared_norms


class Gradients(Diagnostic):
    """`norm`, `block_00`, ..., `outside`, `role_<role>`: the norm that the optimiser step starts from.

    Under data parallelism it is the norm of the averaged gradient, whatever the sharding.
    """

    reads_parameters = True

    def __init__(self) -> None:
        self._groups: ParameterGroups | None = None
        self._found: dict[str, Tensor] = {}

    def start(self, context: Context) -> None:
        self._groups = ParameterGroups(context.network)

    def before_step(self) -> None:
        assert self._groups is not None
        parameters = self._groups.parameters
        present = [position for position, parameter in enumerate(parameters) if parameter.grad is not None]
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        if not gradients:
            raise RuntimeError("diagnostics 'gradients': no parameter has a gradient at the optimiser step")
        measured = squared_norms(shards(gradients), gradients)
        squares = torch.zeros(len(parameters), dtype=measured.dtype, device=measured.device)
        squares[torch.tensor(present, device=measured.device)] = measured
        self._found = {label: value.sqrt() for label, value in self._groups.sums(squares).items()}
        self._found["norm"] = squares.sum().sqrt()

    def collect(self) -> dict[str, Tensor]:
        return self._found

    def stop(self) -> None:
        self._groups, self._found = None, {}

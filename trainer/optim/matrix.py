"""The seam for optimisers whose step needs a whole matrix: they work on sharded parameters as on whole ones.

A method is a subclass with three functions: what happens to a shard before (element by element, such as momentum), the
direction from the whole matrix, and how a shard of the direction is applied. All its states are element-wise and lie in
the layout of the parameters, so checkpoints reshard them like any other. Parameters that are no hidden matrices
(embedding, readout, vector, spectral, by role) are trained by AdamW in the same optimiser.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from trainer.optim.exchange import Exchange


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of whole-matrix methods. `step` is collective: all ranks call it with gradients for the same parameters.

    Args:
        groups: parameter groups with `role`; those of role `hidden` hold matrices (other shapes of that role raise
            ValueError), the others go to AdamW.
        settings: defaults of all groups; AdamW reads `betas` and `eps`.
    """

    exchange_dtype: torch.dtype = torch.float32  # in which whole matrices travel
    state_names: tuple[str, ...] = ()  # element-wise states of a matrix, zeros at first

    def __init__(self, groups: Sequence[dict[str, Any]], settings: dict[str, Any]) -> None:
        marked = []
        for group in groups:
            matrix = group["role"] == "hidden"
            for parameter in group["params"]:
                if matrix and parameter.ndim != 2:
                    raise ValueError(
                        f"a hidden parameter has the shape {list(parameter.shape)}: {type(self).__name__} takes matrices"
                    )
            marked.append({**{k: v for k, v in group.items() if k != "role"}, "matrix": matrix})
        # `capturable`: step counts lie on the device, as in torch's own optimisers.
        super().__init__(marked, {**settings, "matrix": False, "capturable": False})
        self._exchange: Exchange | None = None
        self._members: list[int] = []

    @abstractmethod
    def before(self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        """From this rank's shard of the gradient to that of what `direction` gets; updates the shards of `state`."""

    @abstractmethod
    def direction(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        """From the whole matrix [m, n], of `exchange_dtype`, to the whole direction; leaves `matrix` as it is."""

    @abstractmethod
    def apply(self, shard: Tensor, direction: Tensor, shape: torch.Size, group: dict[str, Any]) -> None:
        """Moves this rank's shard of a parameter of `shape` in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (parameter, group)
            for group in self.param_groups
            if group["matrix"]
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        members = [id(parameter) for parameter, _ in work]
        if self._exchange is None or members != self._members:
            self._exchange = Exchange([parameter for parameter, _ in work], self.exchange_dtype)
            self._members = members

        def part(index: int) -> Tensor:
            parameter, group = work[index]
            state = self.state[parameter]
            for name in self.state_names:
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            local = {name: _local(state[name]) for name in self.state_names}
            return self.before(_local(parameter.grad), local, group)

        def done(index: int, direction: Tensor) -> None:
            parameter, group = work[index]
            self.apply(_local(parameter), direction, parameter.shape, group)

        def direction(index: int, whole: Tensor) -> Tensor:
            return self.direction(whole, work[index][1])

        self._exchange.run(part, direction, done, meanwhile=self._others)
        return loss

    def _others(self) -> None:
        """AdamW (arXiv:1711.05101) on all other parameters, as `torch.optim.AdamW` does it."""
        for group in self.param_groups:
            if group["matrix"]:
                continue
            present = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in present:
                state = self.state[parameter]
                if not state:
                    device = parameter.device if group["capturable"] else "cpu"
                    state["step"] = torch.tensor(0.0, device=device)  # whose value a dry run knows
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            if not present:
                continue
            states = [self.state[parameter] for parameter in present]
            adamw(
                [_local(parameter) for parameter in present],
                [_local(parameter.grad) for parameter in present],
                [_local(state["exp_avg"]) for state in states],
                [_local(state["exp_avg_sq"]) for state in states],
                [],
                [state["step"] for state in states],
                foreach=True,
                capturable=group["capturable"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's shard; shares the memory."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""Judges every step on the device, and undoes the update of a bad one there, without the host."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.callbacks.metrics import MetricsLog
from trainer.config import ConfigError

NONFINITE, SPIKE = "recovery/nonfinite", "recovery/spike"

# Makes the median absolute deviation of normal numbers their standard deviation.
_SIGMA = 1.4826
# Below this share of the median a deviation is no news, however calm the window was.
_CALM = 0.01


class Guard(pl.Callback):
    """Columns `recovery/nonfinite` and `recovery/spike` (1 or 0) in every row of `log`; comes before it in the list.

    A step is not finite when the loss or a gradient of any rank is not. It is a spike when its loss, the mean over ranks
    and micro-batches, exceeds the median of the last `window` steps by more than `threshold` times their median absolute
    deviation, scaled to a standard deviation and at least 1 % of the median. The first `window` steps are not judged.

    Per step: the norms of the gradients, a sort of `window` numbers, and one all-reduce of two numbers, all on the
    device; the ranks get the same answer, and no host waits for it. Where a step is to be skipped, parameters and
    optimiser state are what they were before it, from a copy of this rank's share of both, made before each step.

    Args:
        log: gets the columns.
        skip_nonfinite, skip_spike: undo the update of such a step.
        threshold: robust standard deviations.
        window: steps.
    """

    def __init__(
        self, log: MetricsLog, *, skip_nonfinite: bool, skip_spike: bool, threshold: float, window: int
    ) -> None:
        self.skip_nonfinite, self.skip_spike = skip_nonfinite, skip_spike
        self.threshold, self.window = threshold, window
        self._log = log
        self._loss: Tensor | None = None  # of the micro-batches of this step so far
        self._past: Tensor | None = None  # float64 [window]
        self._seen = 0  # finished steps that are in `_past`
        self._bad: Tensor | None = None
        self._before: list[tuple[Tensor, Tensor]] = []
        self._handles: list[Any] = []

    # ------------------------------------------------------------------------------------------------------------ state
    def state_dict(self) -> dict[str, Any]:
        past = torch.zeros(self.window, dtype=torch.float64) if self._past is None else self._past.cpu()
        return {"past": past, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["past"].numel() == self.window:  # another window begins anew
            self._past, self._seen = state["past"].clone(), state["seen"]

    # ------------------------------------------------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._loss = None
        if not (self.skip_nonfinite or self.skip_spike):
            return
        for optimizer in trainer.optimizers:
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise ConfigError(
                    "recovery: skip needs an optimiser that undoes its own step, which this strategy has not; use rollback"
                )
            for group in optimizer.param_groups:
                if group.get("capturable") is False and any(p.is_cuda for p in group["params"]):
                    group["capturable"] = True  # step counts on the device, where they can be undone
            _bring_counts(optimizer)
            self._handles.append(optimizer.register_step_post_hook(self._restore))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        loss = loss.detach().double()
        scale = getattr(getattr(trainer.precision_plugin, "scaler", None), "_scale", None)
        loss = loss if scale is None else loss / scale.to(loss.device)
        self._loss = loss if self._loss is None else self._loss + loss

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self._loss is not None
        device, world = self._loss.device, dist.get_world_size()
        # With a loss scaler gradients overflow in the course of things, and it leaves out those steps itself.
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        broken = torch.zeros((), dtype=torch.float64, device=device) if scaled else _not_finite(optimizer, device)
        both = torch.stack([self._loss / world, broken])
        if world > 1:
            dist.all_reduce(both)
        loss, broken = both.unbind()
        self._loss = None
        nonfinite = (broken > 0) | ~loss.isfinite()
        spike = self._is_spike(loss, nonfinite)
        self._log.push({NONFINITE: nonfinite.double(), SPIKE: spike.double()})
        if not (self.skip_nonfinite or self.skip_spike):
            return
        skip = torch.zeros((), dtype=torch.bool, device=device)
        skip = skip | nonfinite if self.skip_nonfinite else skip
        self._bad = skip | spike if self.skip_spike else skip
        self._before = [(part, part.clone()) for part in _parts(optimizer)]

    # -------------------------------------------------------------------------------------------------------- internals
    def _is_spike(self, loss: Tensor, nonfinite: Tensor) -> Tensor:
        if self._past is None or self._past.device != loss.device:
            past = torch.zeros(self.window, dtype=torch.float64)
            self._past = (past if self._past is None else self._past).to(loss.device)
        median = self._past.median()
        deviation = (self._past - median).abs().median()
        limit = median + self.threshold * torch.maximum(_SIGMA * deviation, _CALM * median.abs())
        judged = self._seen >= self.window
        spike = (loss > limit) & ~nonfinite if judged else torch.zeros_like(nonfinite)
        # A spike is taken in, too: the median bears it, and follows where the loss has really changed.
        self._past[self._seen % self.window] = torch.where(nonfinite, median, loss)
        self._seen += 1
        return spike

    @torch.no_grad()
    def _restore(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._bad is None:
            return
        before = {id(part): copy for part, copy in self._before}
        for part in _parts(optimizer):
            # What was made in this step, such as momentum in the first, was zero before.
            copy = before.get(id(part))
            if part.device != self._bad.device:
                continue  # of an optimiser that cannot be capturable: undone only by waiting for the device
            part.copy_(torch.where(self._bad, torch.zeros_like(part) if copy is None else copy, part))
        self._before, self._bad = [], None

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._before, self._bad = [], [], None


def _bring_counts(optimizer: torch.optim.Optimizer) -> None:
    """Step counts of capturable groups to the device of their parameters: a loaded state has them on the host."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("capturable") else ():
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device)


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _parts(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This rank's shares of all that a step changes: the same objects on every call."""
    parts = [_local(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for state in optimizer.state.values():
        parts += [_local(value) for value in state.values() if isinstance(value, Tensor)]
    return parts


def _not_finite(optimizer: torch.optim.Optimizer, device: torch.device) -> Tensor:
    """Number of gradient tensors of this rank that hold a value that is no number, float64 on `device`."""
    gradients = [
        _local(parameter.grad)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    # ZeRO keeps its share of what was reduced apart, and hands it to the parameters that it steps only in its step.
    for share in getattr(optimizer, "averaged_gradients", {}).values():
        gradients += [gradient for gradient in share or () if gradient is not None]
    return not_finite(gradients, device)


@torch.no_grad()
def not_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Number of tensors that hold a value that is no number, float64 on `device`; reads each once and waits for nothing."""
    tensors = [tensor for tensor in tensors if tensor.numel()]  # a rank may hold none of a small one
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    if all(tensor.is_cpu for tensor in tensors):  # where the norm below takes ten times as long
        real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
        found = [low * 0 + high * 0 for low, high in (tensor.aminmax() for tensor in real)]
    else:
        # The largest magnitude, unlike the 2-norm, does not overflow where all values are finite.
        found = list(torch._foreach_norm(tensors, float("inf")))
    return (~torch.stack([value.to(device) for value in found]).isfinite()).sum().double()

"""Learning-rate schedules as a factor of the peak rate, a pure function of the step."""

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR


def factor(step: int, *, name: str, max_steps: int, warmup_steps: int, min_lr_ratio: float, decay_steps: int) -> float:
    """Rate at optimiser step `step` (0-based) over the peak rate.

    Linear warm-up reaches 1 at `warmup_steps`; then `constant`, `cosine` or `linear` down to `min_lr_ratio` at
    `max_steps`, or `wsd` (warm-up, stable, linear decay over the last `decay_steps`; arXiv:2404.06395).
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if name == "constant":
        return 1.0
    start = max_steps - decay_steps if name == "wsd" else warmup_steps
    progress = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if name == "cosine" else 1 - progress
    return min_lr_ratio + (1 - min_lr_ratio) * shape


class Schedule(LambdaLR):
    """`LambdaLR` whose rates after loading follow the present config, which may end later than the saved one."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        rates = [base * rule(self.last_epoch) for base, rule in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        self._last_lr = rates


def build(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    max_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    decay_steps: int,
) -> Schedule:
    """The schedule as a torch scheduler; it scales every parameter group alike."""

    def lr_lambda(step: int) -> float:
        return factor(
            step,
            name=name,
            max_steps=max_steps,
            warmup_steps=warmup_steps,
            min_lr_ratio=min_lr_ratio,
            decay_steps=decay_steps,
        )

    return Schedule(optimizer, lr_lambda)

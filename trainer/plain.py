"""A run's own network, rules, optimiser and schedule in the plainest loop: one process, no files, no Lightning.

For what trains many tiny runs and looks at them from inside (coordinate checks, grids of rates).
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.tasks.base import Batch, Task
from trainer.build import build, optimizer_and_scheduler, rules
from trainer.schema import RunConfig


class PlainRun:
    """One run of a config, from its initial weights on; its data are whatever `step` is given.

    Raises:
        ConfigError, DataError, StoreError: as `trainer.build.build`.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.task, data = build(config)
        data.teardown()
        self.optimizer, self.scheduler = optimizer_and_scheduler(config, self.task.network, rules(config, self.task))
        self._parameters = list(self.task.network.parameters())

    def step(self, batch: Batch) -> float:
        """One optimiser step on a batch; the loss before it."""
        loss = self.task.training_step(batch, 0)["loss"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.task.on_before_optimizer_step(self.optimizer)
        if self.config.train.grad_clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.config.train.grad_clip)
        self.optimizer.step()
        self.scheduler.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        """The training loss over a batch, as it is."""
        total, count, _ = self.task.loss_terms(batch)
        return float(total) / float(count)


def hold(config: RunConfig, split: str, limit: int) -> dict[str, Tensor]:
    """At most `limit` evenly spaced training windows of a split (0: all), as one batch in memory.

    Raises:
        ConfigError, DataError, StoreError: as `trainer.build.build`.
    """
    task: Task
    task, data = build(config)
    try:
        loader = data.evaluation_loader(split, task.training_window(), batch=256, limit=limit)
        batches = [dict(batch) for batch in loader]
    finally:
        data.teardown()
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

"""What a run does about numbers that are none and losses that jump. A run that cannot be helped is over: a result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from torch import nn

from trainer.callbacks.guard import NONFINITE, SPIKE, Guard, not_finite
from trainer.callbacks.metrics import MetricsLog
from trainer.callbacks.stopping import stop
from trainer.records import Row
from trainer.schema import RecoveryConfig
from trainer.strategies.clipping import local_part


@dataclass(frozen=True)
class Rollback:
    """Asked for: go back to a commit before `step` and leave out the samples up to the global `position`."""

    step: int
    position: int
    why: str


class Recovery(pl.Callback):
    """Applies the policies of `config` to the reduced rows, which are the same on all ranks: all do the same, in the same
    step, and no healthy step waits for the device. What is decided on the host follows within `log.every` steps.

    - `stop`: the run ends as diverged; `step` is the first bad step.
    - `skip`: the update was left out by the guard already; here it is counted and told.
    - `rollback`: training stops and `rollback` says what to do; the run starts again from an earlier commit and leaves
      out the samples since.
    - `lower_rate`: all rates are multiplied by `rate_factor` from here on (once in `window` steps).

    After `max_events` events the run ends as diverged. Each event is a row `{"event": "skipped" | "rollback" |
    "lowered_rate" | "diverged", "why": ...}`. What was trained between a bad step and its discovery is never saved: before a
    save `finite` looks at the parameters, too.

    Args:
        log: whose rows are looked at.
        config: the policies.
        rollbacks: how many the run has had.
    """

    def __init__(self, log: MetricsLog, config: RecoveryConfig, rollbacks: int = 0) -> None:
        self.step: int | None = None
        self.rollback: Rollback | None = None
        self.config = config
        self.counts = {"skipped": 0, "lowered_rate": 0}
        self.rollbacks = rollbacks
        self._lowered_at: int | None = None
        self._log = log
        self._trainer: pl.Trainer | None = None
        log.subscribe(self._look)

    def guard(self) -> Guard | None:
        """The callback that judges the steps on the device; None where the loss in the rows is enough."""
        config = self.config
        if config.nonfinite == "stop" and config.spike == "ignore":
            return None
        return Guard(
            self._log,
            skip_nonfinite=config.nonfinite == "skip",
            skip_spike=config.spike == "skip",
            threshold=config.threshold,
            window=config.window,
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "lowered_at": self._lowered_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts |= state["counts"]
        self._lowered_at = state["lowered_at"]

    def record(self) -> dict[str, Any]:
        """Fields for the record: how often which remedy was used."""
        return {"recovery": {**self.counts, "rollbacks": self.rollbacks + (self.rollback is not None)}}

    @property
    def healthy(self) -> bool:
        return self.step is None and self.rollback is None

    def finite(self, step: int, module: nn.Module) -> bool:
        """Whether the run is healthy and all parameters of all ranks are finite after `step`. Collective."""
        if self.healthy:
            local = [local_part(p).detach() for p in module.parameters()]
            bad = not_finite(local, local[0].device)
            if dist.get_world_size() > 1:
                dist.all_reduce(bad)
            if bool(bad):
                why = "parameters are not finite"
                # What is broken by now cannot be skipped any more.
                self._act("rollback" if self.config.nonfinite == "rollback" else "stop", step, why)
        return self.healthy

    # -------------------------------------------------------------------------------------------------------- internals
    def _look(self, rows: list[Row]) -> None:
        for row in rows:
            if not self.healthy or "loss" not in row:
                continue
            if row.get(NONFINITE) or not math.isfinite(row["loss"]):
                why = f"loss {row['loss']}" if not math.isfinite(row["loss"]) else "a gradient is not finite"
                self._act(self.config.nonfinite, row["step"], why)
            elif row.get(SPIKE):
                self._act(self.config.spike, row["step"], f"the loss jumped to {row['loss']:.6g}")

    def _act(self, policy: str, step: int, why: str) -> None:
        if policy == "ignore" or (policy == "lower_rate" and self._lowered_recently(step)):
            return
        if policy == "stop":
            self._end(step, why)
        elif sum(self.counts.values()) + self.rollbacks >= self.config.max_events:
            self._end(step, f"{why}, after recovery.max_events={self.config.max_events} events")
        elif policy == "skip":
            self.counts["skipped"] += 1
            self._log.event(step, "skipped", why=why)
        elif policy == "lower_rate":
            self._lower_rate(step, why)
        else:
            self._go_back(step, why)

    def _lowered_recently(self, step: int) -> bool:
        return self._lowered_at is not None and step - self._lowered_at < self.config.window

    def _lower_rate(self, step: int, why: str) -> None:
        assert self._trainer is not None
        self.counts["lowered_rate"] += 1
        self._lowered_at = step
        factor = self.config.rate_factor
        for scheduler in (config.scheduler for config in self._trainer.lr_scheduler_configs):
            scheduler.base_lrs = [base * factor for base in scheduler.base_lrs]
        for optimizer in self._trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * factor
        self._log.event(step, "lowered_rate", why=why, factor=factor)

    def _go_back(self, step: int, why: str) -> None:
        assert self._trainer is not None
        self.rollback = Rollback(step, self._trainer.datamodule.position, why)  # type: ignore[attr-defined]
        self._log.event(step, "rollback", why=why)
        stop(self._trainer)

    def _end(self, step: int, why: str) -> None:
        self.step = step
        self._log.event(step, "diverged", why=why)
        if self._trainer is not None:
            stop(self._trainer)

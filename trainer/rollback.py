"""Going back to an earlier commit and leaving out the samples that led astray.

The attempt that goes on says so in `attempts/AAAA.json`: `resumed_from`, `skip_to` (global position of the first sample
that it reads) and `rollback` (why). So a run that is killed before its next commit leaves out the same samples.
"""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl

from datamodules.store import Store
from trainer.callbacks.recovery import Rollback
from trainer.checkpoint import committed_steps
from trainer.checkpoint.retention import Ledger
from trainer.records import read_attempts

log = logging.getLogger("keel.run")


def go_back(checkpoints: Store, wanted: Rollback, commits: int) -> int | None:
    """The step to continue from: the `commits`-th commit before the bad step, or the oldest; None: from the start.

    Later commits are removed, so that no resume takes them up. One process calls it.
    """
    steps, ledger = committed_steps(checkpoints), Ledger(checkpoints)
    good = [step for step in steps if step < wanted.step]
    target = good[-min(commits, len(good))] if good else None
    for step in reversed(steps):
        if target is None or step > target:
            ledger.remove(step)
    log.warning("step %d: %s; back to step %d", wanted.step, wanted.why, target or 0)
    return target


def skips(store: Store) -> tuple[dict[int, int], int]:
    """({step: global position at which a run that continues from it goes on}, rollbacks so far). One process calls it."""
    attempts = read_attempts(store)
    found = {int(row["resumed_from"] or 0): int(row["skip_to"]) for row in attempts if row.get("skip_to") is not None}
    return found, sum("rollback" in row for row in attempts)


class SkipWindow(pl.Callback):
    """Moves the data stream on to where `positions` says for the step that was really loaded (0: a fresh start).

    In the attempt that makes a `rollback` it is the position of that, whatever step could be loaded.
    """

    def __init__(self, positions: dict[int, int], rollback: Rollback | None = None) -> None:
        self.positions, self.rollback = positions, rollback

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._move(trainer, 0)  # a checkpoint is loaded after this, and undoes it

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._move(trainer, checkpoint["global_step"])

    def _move(self, trainer: pl.Trainer, step: int) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        target = self.positions.get(step, 0) if self.rollback is None else self.rollback.position
        data.advance(max(target - data.position, 0))

"""When a run is saved."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn

from datamodules.store import StoreError
from trainer.checkpoint import Checkpointer, CheckpointError, step_name
from trainer.schema import CheckpointConfig

log = logging.getLogger("keel.checkpoint")

# So long may a save in flight go on when training has ended in an error: what it holds is good.
_LAST_SECONDS = 60.0


class Checkpoint(pl.Callback):
    """Commits as the config says, and at the end of training.

    A save in the background is looked after at every step: it is committed as soon as its upload is done, and what it
    raised is raised within a step. At the end, also after a signal, training waits for it.

    Args:
        checkpointer: of the run.
        config: the `checkpoint` section.
        before_save: called on all ranks first, to hand over the metric rows up to this step, so that no resume leaves a
            hole in the curves, and to learn whether the run is still healthy. What it raises ends training.
        healthy: asked on all ranks with step and module; False once the run has diverged: its state is not worth keeping,
            and must not push out a good one.
        stalled: wraps the time that training stands still.
        event: called with step, name and fields for each save that failed and was survived.
        val_every: steps between validations, where the best is kept (0: none).
        clock: monotonic seconds; rank 0's decides.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        config: CheckpointConfig,
        *,
        before_save: Callable[[], None] = lambda: None,
        healthy: Callable[[int, pl.LightningModule], bool] = lambda step, module: True,
        stalled: Callable[[], AbstractContextManager[None]] = nullcontext,
        event: Callable[..., None] = lambda step, name, **fields: None,
        val_every: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.checkpointer, self.config = checkpointer, config
        self._before_save, self._healthy, self._stalled, self._event = before_save, healthy, stalled, event
        self._val_every = val_every if config.best else 0
        self._clock = clock
        self._last = 0  # step of the last save that was begun
        self._seen = 0
        self._saved_at = 0.0
        self._failures = 0  # in a row
        self._in_flight: int | None = None
        self._group: Any = None
        self._vote: Any = None  # what rank 0's clock said a step ago, on its way
        self._flag = torch.zeros(1, dtype=torch.int32)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.config.every_minutes and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = self._seen = trainer.global_step
        self._saved_at = self._clock()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._look(trainer)
        if trainer.global_step == self._seen:  # a micro-batch within a step
            return
        self._seen = trainer.global_step
        time_is_up = self._time_is_up()
        if self._due(self._seen) or time_is_up:
            self._save(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if not self._val_every or trainer.state.fn != TrainerFn.FITTING or step != self._last:
            return
        value = trainer.callback_metrics.get(self.config.best)
        if value is None:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise CheckpointError(f"checkpoint.best={self.config.best}: validation gives {known or 'no metric'}")
        with self._stalled():
            self.checkpointer.note(step, {self.config.best: float(value)})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finish_vote()
        self._save(trainer, final=True)
        with self._stalled():
            if not self._look(trainer, wait=True):
                self._last = -1
                self._save(trainer, final=True)
                self._look(trainer, wait=True, last=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Lets a save in flight end; its own fate is told, and does not hide what ended training."""
        try:
            if not self.checkpointer.wait(_LAST_SECONDS):
                log.warning("%s was not committed: its upload took too long", step_name(self._in_flight or 0))
        except Exception as error:
            if error is not exception:
                log.warning("%s", error)

    def _due(self, step: int) -> bool:
        steps = (self.config.every, self.config.keep_every, self._val_every)
        return any(every and step % every == 0 for every in steps)

    def _time_is_up(self) -> bool:
        """Whether `every_minutes` have passed on rank 0's clock, known to all a step later: nobody waits for it."""
        if not self.config.every_minutes:
            return False
        mine = self._clock() - self._saved_at >= 60 * self.config.every_minutes
        if self._group is None:
            return mine
        due = False
        if self._vote is not None:
            self._vote.wait()
            due = bool(self._flag)
        self._flag = torch.tensor([mine and not due], dtype=torch.int32)
        self._vote = dist.broadcast(self._flag, src=0, group=self._group, async_op=True)
        return due

    def _finish_vote(self) -> None:
        if self._vote is not None:
            self._vote.wait()
            self._vote = None

    def _look(self, trainer: pl.Trainer, *, wait: bool = False, last: bool = False) -> bool:
        """Takes note of a save that has ended; False when it failed, and that is survived (not that of a `last` one)."""
        try:
            ended = self.checkpointer.wait() if wait else self.checkpointer.poll()
        except (CheckpointError, StoreError) as error:
            self._survive(trainer, error, last=last)
            return False
        if ended and self._in_flight is not None:
            self._failures, self._in_flight = 0, None
        return True

    def _save(self, trainer: pl.Trainer, *, final: bool = False) -> None:
        step = trainer.global_step
        if step == self._last:
            return
        with self._stalled():
            # First the fate of the save before: all ranks learn of it here at the latest, and do the same about it.
            self._look(trainer, wait=True)
            self._before_save()
            done = not self._healthy(step, trainer.lightning_module)
            # At the end what failed is tried once more: there is no next interval.
            for last in (False, True) if final else (False,):
                done = done or self._try(trainer, step, last=last)
        self._last = step if done else -1
        self._saved_at = self._clock()

    def _try(self, trainer: pl.Trainer, step: int, *, last: bool) -> bool:
        try:
            trainer.save_checkpoint(self.checkpointer.store.join(step_name(step)), weights_only=False)
        except (CheckpointError, StoreError) as error:  # on all ranks alike
            self._survive(trainer, error, last=last)
            return False
        if self.checkpointer.background:
            self._in_flight = step
        else:
            self._failures = 0
        return True

    def _survive(self, trainer: pl.Trainer, error: Exception, *, last: bool) -> None:
        """Counts a failed save; raises it when there were too many in a row, or no other try is left."""
        self._failures += 1
        if last or self._failures > self.config.tolerate:
            raise error
        log.warning("%s; training goes on (failure %d, tolerated %d)", error, self._failures, self.config.tolerate)
        self._event(trainer.global_step, "save_failed", why=" ".join(str(error).split()), saved_step=self._in_flight)
        self._in_flight = None

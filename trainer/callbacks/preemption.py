"""Signals end a run at a step boundary, saved."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Preemption(pl.Callback):
    """SIGTERM, SIGUSR1 or SIGINT on any rank stops all ranks after the same step; the checkpoint callback then saves.

    A handler only sets a flag. After each step the ranks begin a maximum of their flags over gloo and read the one that
    they began a step earlier, so no step waits for it and no device is asked. A second SIGINT interrupts at once.

    `signal` is the signal that all ranks agreed on, None while there is none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received = 0
        self._flag = torch.zeros(1, dtype=torch.int64)
        self._pending: Any = None
        self._group: Any = None
        self._step = 0
        self._before: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        if dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self._step or self.signal is not None:
            return
        self._step = trainer.global_step
        if self._group is None:
            agreed = self._received
        else:
            agreed = 0
            if self._pending is not None:
                self._pending.wait()
                agreed = int(self._flag)
            if not agreed:
                self._flag = torch.tensor([self._received])
                self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if agreed:
            self.signal = agreed
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._pending is not None:
            self._pending.wait()
            self._pending = None

    def ask(self) -> None:
        """As SIGTERM to this rank; from any thread."""
        self._received = self._received or signal.SIGTERM

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signum

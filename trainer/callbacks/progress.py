"""What the person at the terminal sees: a bar, or a line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import lightning
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from trainer.callbacks.metrics import MetricsLog
from trainer.records import Row

_SHOWN = 3  # validation metrics in a line


class Progress(lightning.Callback):
    """Steps, loss, rate and remaining time, on rank 0. Shows what `log` has reduced: no reads of the device of its own.

    Args:
        log: its rows hold the numbers.
        samples_per_step: global batch, for the rate; times `tokens_per_sample` for tokens.
        seconds: least time between two lines where `stream` is no terminal.
        stream: where to write; default standard output.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        log: MetricsLog,
        *,
        samples_per_step: int,
        tokens_per_sample: int = 1,
        name: str = "train",
        seconds: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rank0 = log.writer.rank0
        self._per_step = samples_per_step * tokens_per_sample
        self._unit = "tokens" if tokens_per_sample > 1 else "samples"
        self._name, self._seconds, self._clock = name, seconds, clock
        self._console = Console(file=stream if stream is not None else sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Bar | None = None
        self._total: int | None = None
        self._last_line = ""
        self._shown: dict[str, float] = {}
        self._rate_from: tuple[int, float] = (0, 0.0)  # (step, time) after the last reduction
        self._rate = 0.0
        self._printed = 0.0
        if self._rank0:
            log.subscribe(self._listen)

    # ------------------------------------------------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self._rank0:
            return
        self._total = trainer.max_steps if trainer.max_steps > 0 else None
        self._rate_from = (trainer.global_step, self._clock())
        self._printed = self._clock()
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[numbers]}"),
                console=self._console,
            )
            self._bar.start()
            self._bar.add_task(self._name, total=self._total, completed=trainer.global_step, numbers="")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, numbers=self._numbers())

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._finish(trainer.global_step)

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._finish(trainer.global_step)

    # -------------------------------------------------------------------------------------------------------- internals
    def _listen(self, rows: list[Row]) -> None:
        last = rows[-1]
        validation = {name: value for name, value in last.items() if name.startswith("val/")}
        # a task may measure dozens of things; a line has room for the first few
        self._shown |= dict([item for item in validation.items() if item[0].count("/") == 1][:_SHOWN])
        if "loss" in last:
            self._shown["loss"] = last["loss"]
            now = self._clock()
            step, since = self._rate_from
            if now > since and last["step"] > step:
                self._rate = (last["step"] - step) / (now - since)
            self._rate_from = (last["step"], now)
        elif validation:
            self._rate_from = (last["step"], self._clock())  # the time spent validating is no training rate
        if self._bar is None and (validation or self._clock() - self._printed >= self._seconds):
            self._line(last["step"])

    def _numbers(self) -> str:
        parts = [
            f"{name.removeprefix('val/') + ' (val)' if '/' in name else name} {value:.4g}"
            for name, value in self._shown.items()
        ]
        if self._rate > 0:
            parts.append(f"{self._rate * self._per_step:,.4g} {self._unit}/s")
        return "  ".join(parts)

    def _line(self, step: int) -> None:
        self._printed = self._clock()
        total = "" if self._total is None else f"/{self._total}"
        left = ""
        if self._total is not None and self._rate > 0 and step < self._total:
            seconds = round((self._total - step) / self._rate)
            left = f"  ETA {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        line = f"{self._name}  step {step}{total}  {self._numbers()}{left}"
        if line != self._last_line:
            self._console.print(line, markup=False)
        self._last_line = line

    def _finish(self, step: int) -> None:
        if not self._rank0:
            return
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, numbers=self._numbers())
            self._bar.stop()
            self._bar = None
        elif self._shown:
            self._line(step)
            self._shown = {}

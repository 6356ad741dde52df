"""How fast a run goes, and where the time goes that is not training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import lightning

from trainer.callbacks.metrics import MetricsLog


@dataclass
class _Count:
    """Totals since training started, in seconds and steps."""

    time: float = 0.0
    step: int = 0
    wait: float = 0.0
    validation: float = 0.0
    checkpoint: float = 0.0

    def since(self, other: _Count) -> _Count:
        return _Count(*(getattr(self, name) - getattr(other, name) for name in self.__dataclass_fields__))

    @property
    def training(self) -> float:
        return max(self.time - self.validation - self.checkpoint, 1e-9)


class Throughput(lightning.Callback):
    """Columns `throughput/...` on every k-th step of `metrics`, over the steps since the last such row.

    `steps_per_s`, `samples_per_s`, `tokens_per_s` (tasks on tokens), `flop_per_s` (model FLOPs of the whole run, see
    `trainer.flops`), `tflop_per_s_per_device`, `mfu` (where the device's peak is known) count training time: wall time
    less validation and checkpoint stalls. `data_wait` is the share of training time in which this rank waited for a
    batch. `validation_s` and `checkpoint_s` are seconds. Counters of a data module with `metrics` appear as
    `stream/<name>`, totals so far. All are host times of rank 0. The first step (compilation, first batch) counts in `summary()` only.

    Must be the last callback in the list: it takes the time from its `on_train_batch_end` to its `on_train_batch_start`
    as the wait for data. Checkpointing wraps what blocks the step in `stalled()`.

    Args:
        metrics: asks for the numbers on its k-th steps.
        global_batch: samples per optimiser step, over all ranks.
        tokens_per_sample: 1 for fields: then there is no `tokens_per_s`.
        flops_per_sample: forward and backward of one sample; None: no FLOP columns.
        peak: FLOP/s of one device at the run's precision, and where the figure comes from (`trainer.flops.peak_and_source`);
            None: no `mfu`.
        first_start: when the run's first attempt started, in seconds since the epoch; None: when this one trains.
        clock: monotonic seconds; `wall`: seconds since the epoch.
    """

    def __init__(
        self,
        metrics: MetricsLog,
        *,
        global_batch: int,
        tokens_per_sample: int = 1,
        flops_per_sample: int | None = None,
        peak: tuple[float, str] | None = None,
        first_start: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.global_batch, self.tokens_per_sample = global_batch, tokens_per_sample
        self.flops_per_sample, self.peak, self._clock = flops_per_sample, peak, clock
        self._first_start, self._wall = first_start, wall
        self._before = 0.0  # seconds from the run's first start until this attempt trains
        self._world = 1
        self._data: Any = None
        self._begin = self._clock()
        self._first_step = 0
        self._total, self._warm, self._mark = _Count(), _Count(), _Count()
        self._waiting_since: float | None = None
        self._validating_since: float | None = None
        metrics.add_source(self._columns)

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        """Around what holds up training for a checkpoint; its seconds are no training time."""
        start = self._clock()
        try:
            yield
        finally:
            self._total.checkpoint += self._clock() - start

    def summary(self) -> dict[str, Any]:
        """For the record: wall seconds, their parts, the rates over all steps after the first, and the goodput.

        `goodput` is the share of the wall time since the run's first start, over all attempts and what lay between them,
        that went into steps which count, at this attempt's pace without waits for data: what was lost to start-up,
        saving, validating, waiting, restarts and steps done twice is the rest. `peak_source` says what `mfu` refers to.
        """
        total = self._now(self._total.step)
        found: dict[str, Any] = {
            "seconds": total.time,
            "training_seconds": total.training,
            "validation_seconds": total.validation,
            "checkpoint_seconds": total.checkpoint,
            "data_wait_seconds": total.wait,
            "first_step_seconds": self._warm.time,
            "steps": float(total.step),
        }
        steady = total.since(self._warm)
        if steady.step <= 0:
            return found
        useful = (steady.training - steady.wait) / steady.step * (total.step + self._first_step)
        elapsed = total.time + self._before
        found |= self._rates(steady) | {"goodput": min(useful / elapsed, 1.0), "elapsed_seconds": elapsed}
        if self.peak is not None:
            found |= {"peak_flop_per_s": self.peak[0], "peak_source": self.peak[1]}
        return found

    # ------------------------------------------------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._world = trainer.world_size
        self._data = getattr(trainer, "datamodule", None)
        self._begin = self._waiting_since = self._clock()
        self._first_step = trainer.global_step
        self._before = 0.0 if self._first_start is None else max(self._wall() - self._first_start, 0.0)
        self._total, self._warm, self._mark = _Count(), _Count(), _Count()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._waiting_since is not None:
            self._total.wait += self._clock() - self._waiting_since
            self._waiting_since = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._total.step = trainer.global_step - self._first_step
        if self._total.step == 1 and self._warm.step == 0:
            self._warm = self._now(1)
            if self._mark.step == 0:
                self._mark = self._warm
        self._waiting_since = self._clock()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._validating_since = now = self._clock()
        if self._waiting_since is not None:  # validation runs between two batches: it is no wait for data
            self._total.wait += now - self._waiting_since
            self._waiting_since = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        now = self._clock()
        if self._validating_since is not None:
            self._total.validation += now - self._validating_since
        self._validating_since, self._waiting_since = None, now

    # -------------------------------------------------------------------------------------------------------- internals
    def _now(self, step: int) -> _Count:
        total = self._total
        return _Count(self._clock() - self._begin, step, total.wait, total.validation, total.checkpoint)

    def _columns(self, step: int) -> Mapping[str, float]:
        count = self._now(step - self._first_step)
        part, self._mark = count.since(self._mark), count
        if self._warm.step == 0:  # asked during the first step: nothing steady to tell yet
            return {}
        found = self._rates(part) | {"validation_s": part.validation, "checkpoint_s": part.checkpoint}
        columns = {f"throughput/{name}": value for name, value in found.items()}
        return columns | {f"stream/{name}": value for name, value in _counters(self._data).items()}

    def _rates(self, part: _Count) -> dict[str, float]:
        steps = part.step / part.training
        samples = steps * self.global_batch
        found = {"steps_per_s": steps, "samples_per_s": samples, "data_wait": part.wait / part.training}
        if self.tokens_per_sample > 1:
            found["tokens_per_s"] = samples * self.tokens_per_sample
        if self.flops_per_sample is not None:
            found["flop_per_s"] = samples * self.flops_per_sample
            found["tflop_per_s_per_device"] = found["flop_per_s"] / self._world / 1e12
            if self.peak is not None:
                found["mfu"] = found["flop_per_s"] / self._world / self.peak[0]
        return found


def _counters(data: Any) -> dict[str, float]:
    """The counters of a data module: `metrics`, a mapping or an object with `snapshot()`, or a method that returns one."""
    found = getattr(data, "metrics", None)
    found = found() if callable(found) else found
    found = found.snapshot() if found is not None and hasattr(found, "snapshot") else found
    return {name: float(value) for name, value in found.items()} if found else {}

"""The log of a run: values stay on the device during a step and leave it every k steps, all at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from datamodules.store import StoreError
from trainer.records import MetricsWriter, Row, TraceWriter

log = logging.getLogger("keel.run")

# Seconds before the rows that are left at the end of training are sent once more: there is no later for them.
_LAST_PAUSES = (1.0, 4.0)

Listener = Callable[[list[Row]], None]
Source = Callable[[int], Mapping[str, float]]


@dataclass
class _Step:
    """One finished optimiser step: `values` wait on the device, `host` is known already."""

    step: int
    values: dict[str, Tensor]
    host: dict[str, Any] = field(default_factory=dict)


def _is_peak(name: str) -> bool:
    last = name.rsplit("/", 1)[-1]
    return last.startswith("max_") or last.endswith("_max")


class MetricsLog(lightning.Callback):
    """One row per optimiser step: `step` (1-based: `trainer.global_step` after it), `time`, `lr`, `loss` and extras.

    `loss` and the other scalars that `training_step` returns are averaged over the micro-batches of the step and over
    the ranks; those named `max_...` or `..._max` (last part of the name) are reduced by maximum. Per step this costs a few additions
    on the device. Every `every` steps, before validation rows, at the end and in `flush`, the rows that wait are reduced
    with one all-reduce (a second one if there are maxima) and one transfer. Sums run in float64, in which float32 values
    of similar size add exactly: the rows do not depend on how steps fall into transfers.

    Args:
        writer: where rows go; only rank 0's writes.
        every: optimiser steps between transfers.
        trace: also records `batch["index"]`, the ids of the samples of each step, on each rank.
        clock: seconds since the epoch, for `time`.
    """

    def __init__(
        self,
        writer: MetricsWriter,
        every: int,
        trace: TraceWriter | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if every < 1:
            raise ValueError(f"log.every={every}: must be at least 1")
        self.writer, self.every, self.trace, self._clock = writer, every, trace, clock
        self._listeners: list[Listener] = []
        self._sources: list[Source] = []
        self._reset(0)

    def _reset(self, step: int) -> None:
        self._last = step
        self._waiting: list[_Step] = []
        self._open: dict[str, Tensor] = {}
        self._pushed: dict[str, Tensor] = {}
        self._micro = 0
        self._lr: Any = None
        self._index: list[Tensor] = []
        self._traced: list[tuple[int, list[Tensor]]] = []

    # ------------------------------------------------------------------------------------------------- for other parts
    def push(self, values: Mapping[str, Tensor]) -> None:
        """Adds device scalars to the row of the step being finished. All ranks, same names, in the same step."""
        self._pushed.update(values)

    def subscribe(self, listener: Listener) -> None:
        """`listener(rows)` after every reduction, with global values: the same rows on each rank that subscribes."""
        self._listeners.append(listener)

    def add_source(self, source: Source) -> None:
        """`source(step)` is asked for host numbers of this rank on every k-th step; rank 0's go into that step's row."""
        self._sources.append(source)

    def event(self, step: int, name: str, **fields: Any) -> None:
        """Writes a row `{"step", "event": name, ...}` at once. Rank 0's is kept; not collective."""
        self._calmly(lambda: self.writer.append({"step": step, "time": self._clock(), "event": name, **fields}))

    def flush(self, wait: bool = True) -> None:
        """Everything up to the last finished step to the store. Collective: all ranks call it, in the same step.

        `wait`: returns only when it is there, and raises what an upload raised.
        """
        self._reduce()
        if wait:
            self.settle()
            return
        self._calmly(lambda: self.writer.flush(wait=False))
        if self.trace is not None:
            self._calmly(lambda: self.trace.flush(wait=False))  # type: ignore[union-attr]

    def settle(self) -> None:
        """Waits until all that was handed out is in the store. Not collective; from any thread. Raises what an upload raised."""
        self.writer.flush(wait=True)
        if self.trace is not None:
            self.trace.flush(wait=True)

    # ------------------------------------------------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._reset(trainer.global_step)

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # read here: at the end of the batch the scheduler has moved on

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._accumulate(outputs)
        if self.trace is not None:
            self._index.append(batch["index"])
        if trainer.global_step == self._last:
            return  # a micro-batch that does not complete a step
        self._last = trainer.global_step
        self._close()
        if self._last % self.every == 0:
            for source in self._sources:
                self._waiting[-1].host.update(source(self._last))
            self._reduce()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._reduce()
        found = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if not found or not (self.writer.rank0 or self._listeners):
            return
        values = torch.stack([value.double() for value in found.values()]).tolist()
        self._hand_out([{"step": self._last, "time": self._clock(), **dict(zip(found, values, strict=True))}])
        self._calmly(lambda: self.writer.flush(wait=False))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        for pause in _LAST_PAUSES:
            try:
                return self.flush(wait=True)
            except StoreError as error:
                log.warning("%s; the last rows of metrics are sent again in %g s", error, pause)
                time.sleep(pause)
        return self.flush(wait=True)

    # -------------------------------------------------------------------------------------------------------- internals
    def _accumulate(self, outputs: Any) -> None:
        for name, value in outputs.items():
            value = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            if value.numel() != 1:
                raise ValueError(
                    f"training_step returned {name} of shape {tuple(value.shape)}; only scalars are logged"
                )
            value = value.reshape(())
            before = self._open.get(name)
            if before is None:
                self._open[name] = value.clone()  # a replayed CUDA graph would overwrite the original
            elif _is_peak(name):
                self._open[name] = torch.maximum(before, value)
            else:
                self._open[name] = before + value
        self._micro += 1

    def _close(self) -> None:
        values = {
            # Lightning has divided the loss by the number of micro-batches already
            name: value if name == "loss" or _is_peak(name) or self._micro == 1 else value / self._micro
            for name, value in self._open.items()
        }
        values.update(self._pushed)
        host: dict[str, Any] = {"time": self._clock()}
        if isinstance(self._lr, Tensor):
            values["lr"] = self._lr.detach().clone()
        elif self._lr is not None:
            host["lr"] = self._lr
        self._waiting.append(_Step(self._last, values, host))
        if self.trace is not None:
            self._traced.append((self._last, self._index))
        self._open, self._pushed, self._micro, self._index = {}, {}, 0, []

    def _reduce(self) -> None:
        steps, self._waiting = self._waiting, []
        if not steps:
            return
        keys = [(row, name) for row, step in enumerate(steps) for name in step.values]
        keys.sort(key=lambda key: _is_peak(key[1]))  # stable: means first, then maxima
        peaks = sum(_is_peak(name) for _, name in keys)
        device = steps[0].values["loss"].device
        values = [steps[row].values[name].reshape(()).to(device) for row, name in keys]
        flat = torch.stack([value if value.is_floating_point() else value.double() for value in values]).double()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            means, largest = flat.split([len(keys) - peaks, peaks])
            dist.all_reduce(means)
            means /= dist.get_world_size()
            if peaks:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if self.writer.rank0 or self._listeners:
            for (row, name), number in zip(keys, flat.tolist(), strict=True):
                steps[row].host[name] = number
            self._hand_out([{"step": step.step, **step.host} for step in steps])
        if self.trace is not None:
            self._write_trace(self.trace)

    def _write_trace(self, trace: TraceWriter) -> None:
        traced, self._traced = self._traced, []
        ids = torch.cat([index.reshape(-1) for _, parts in traced for index in parts]).tolist()
        start = 0
        for step, parts in traced:
            end = start + sum(index.numel() for index in parts)
            self._calmly(partial(trace.append, step, ids[start:end]))
            start = end

    @staticmethod
    def _calmly(call: Callable[[], None]) -> None:
        """`call()`, once more where it raises what an earlier upload raised: a store that is away for a while ends no run.

        The rows of that upload are kept in memory and go with the next one.
        """
        try:
            call()
        except StoreError as error:
            log.warning("%s; the rows of metrics are kept and sent again", error)
            call()

    def _hand_out(self, rows: list[Row]) -> None:
        self._calmly(lambda: self.writer.extend(rows))
        for listener in self._listeners:
            listener(rows)

"""What a task is: a network, a loss over its batches, and what is measured on held-out data.

The module knows the problem; how it is sharded and optimised is put in from outside through two callables, so that no
task and no network mentions parallelism.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import lightning
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

Batch = Mapping[str, Tensor]
Sums = dict[str, tuple[Tensor, Tensor | int]]

# Lightning warns once per metric that is logged without sync_dist; ours are already the same on all ranks.
warnings.filterwarnings("ignore", message=r".*self\.log\('val/.*sync_dist=True.*")


class Task(lightning.LightningModule, ABC):
    """Base of all tasks: the abstract methods say what a problem is, the rest how Lightning drives it.

    **Normalisation.** `loss_terms` returns a sum and the number of valid elements in it. An int says that every
    micro-batch of every rank has that many, so the mean is taken at once. A tensor says that counts differ (a mask): then
    the gradient that reaches the optimiser is that of (sum over ranks and accumulated micro-batches) / (count over the
    same), however unevenly the valid elements are spread. It needs one all-reduce of a number per micro-batch, and
    all ranks must take the same way.
    """

    config_class: ClassVar[type[Any]]
    reads: ClassVar[tuple[str, ...]] = ()  # entries that every batch must have; () leaves them unchecked
    may_read: ClassVar[tuple[str, ...]] = ()  # entries that a batch may have

    def __init__(self, network: nn.Module, config: Any) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.prepare: Callable[[nn.Module], nn.Module | None] | None = None
        self.optimizers_factory: Callable[[nn.Module], tuple[Optimizer, LRScheduler | None]] | None = None
        # Multiplies all gradients by a number on the device; replaced where they do not lie in `.grad`.
        self.scale_gradients: Callable[[Optimizer, Tensor], None] = _scale_gradients
        self._prepared = False
        self._first_count: Tensor | None = None  # valid elements, over ranks: first micro-batch of the window,
        self._window_count: Tensor | None = None  # all of the window so far,
        self._backward_weight: Tensor | None = None  # and the present one relative to the first
        self._validation: dict[str, Tensor] = {}

    # What a task says.

    @abstractmethod
    def bind(self, spec: Mapping[str, Any]) -> None:
        """Check the network and this task against a data set's spec and keep what is needed of it (statistics).

        Call it before `fit`. Raises ValueError that names what does not fit.
        """

    @abstractmethod
    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """(sum of the losses of the valid elements, their number, further scalars of this step, detached)."""

    @abstractmethod
    def evaluation_step(self, batch: Batch) -> Sums:
        """(sum, count) of each metric over a batch of held-out data; call under `torch.no_grad()`.

        Every batch of a stream gives the same names.
        """

    def training_window(self) -> dict[str, Any]:
        """What the training stream has to deliver, as overrides of the data's config."""
        return {}

    def evaluation_window(self) -> dict[str, Any]:
        """What the evaluation stream has to deliver beyond the training stream, as overrides of the data's config."""
        return {}

    def evaluation_example(self, batch: Batch) -> dict[str, Tensor]:
        """Arrays on the CPU that show the network's answer to the first sample of a batch."""
        return {}

    @abstractmethod
    def example_batch(self, batch_size: int, device: torch.device | str = "meta") -> dict[str, Tensor]:
        """A batch of the shapes and dtypes of training, content arbitrary: for counting FLOPs and memory."""

    def metric_names(self) -> list[str]:
        """The names that `evaluation_step` gives, without data; for a task on the meta device."""
        with torch.no_grad():
            return list(self.evaluation_step(self._evaluation_batch()))

    def _evaluation_batch(self) -> dict[str, Tensor]:
        """A batch of the shapes of evaluation, on the meta device."""
        return self.example_batch(1)

    def tokens_per_sample(self) -> int:
        """Number of predicted tokens of one sample; 1 where the sample is the unit."""
        return 1

    # How Lightning drives it.

    def configure_model(self) -> None:
        """Apply `prepare` to the network, once: Lightning calls this hook at the start of each entry point."""
        if self._prepared:
            return
        self._prepared = True
        if self.prepare is not None:
            prepared = self.prepare(self.network)
            if prepared is not None:
                self.network = prepared

    def configure_optimizers(self) -> Any:
        if self.optimizers_factory is None:
            raise RuntimeError(f"{type(self).__name__}.optimizers_factory is not set; assign it before fit")
        optimizer, scheduler = self.optimizers_factory(self.network)
        if scheduler is None:
            return {"optimizer": optimizer}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """`{"loss": mean over the valid elements, **extras}`, on the device; nothing here waits for the device.

        With uneven counts it is the sum here times ranks over the count of all ranks: the average over ranks is the mean.
        """
        total, count, extras = self.loss_terms(batch)
        if isinstance(count, int):
            return {"loss": total / count, **extras}
        count = count.detach().to(total.dtype, copy=True)
        world = _world_size()
        if world > 1:
            dist.all_reduce(count)
        valid = count.clamp_min(1)  # an empty micro-batch has the gradient zero, not nan
        if self._first_count is None or self._window_count is None:
            self._first_count, self._window_count = valid, count
        else:
            self._window_count = self._window_count + count
        self._backward_weight = count / self._first_count
        return {"loss": total * world / valid, **extras}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().backward(self.weighted(loss), *args, **kwargs)

    def weighted(self, loss: Tensor) -> Tensor:
        """What a micro-batch sends backward, once: with uneven counts it weighs as much as it has valid elements.

        The step divides by their sum.
        """
        if self._backward_weight is not None:
            loss = loss * self._backward_weight
            self._backward_weight = None
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Finish the mean over an accumulation window with uneven counts; runs before clipping."""
        if self._first_count is None or self._window_count is None:
            return
        accumulated = self._trainer.accumulate_grad_batches if self._trainer is not None else 1
        factor = accumulated * self._first_count / self._window_count.clamp_min(1)
        self._first_count = self._window_count = None
        self.scale_gradients(optimizer, factor)

    def on_validation_epoch_start(self) -> None:
        self._validation = {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        for name, (total, count) in self.evaluation_step(batch).items():
            pair = torch.stack([total.detach().double(), torch.as_tensor(count, device=total.device).double()])
            self._validation[name] = self._validation[name] + pair if name in self._validation else pair

    def on_validation_epoch_end(self) -> None:
        """Log `val/<metric>` over all ranks. All ranks must call; one collective."""
        if not self._validation:
            return
        sums = torch.stack(list(self._validation.values()))
        if _world_size() > 1:
            dist.all_reduce(sums)
        for name, (total, count) in zip(self._validation, sums, strict=True):
            self.log(f"val/{name}", (total / count).float(), sync_dist=False)
        self._validation = {}


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _scale_gradients(optimizer: Optimizer, factor: Tensor) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                _local(parameter.grad).mul_(factor)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of a distributed tensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

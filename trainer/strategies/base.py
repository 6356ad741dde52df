"""What Keel's strategies share: saving and loading through `trainer.checkpoint` instead of Lightning's own files."""

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import nn

from datamodules.store import Store
from trainer.checkpoint import Checkpointer, CorruptCheckpoint, step_name
from trainer.distributed import world_size
from trainer.schema import TrainConfig
from trainer.strategies import blocks
from trainer.strategies.mesh import Layout

# What compilation and activation checkpointing add to names; a checkpoint has the plain ones.
WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")

log = logging.getLogger("keel.checkpoint")


class Checkpointed(ParallelStrategy):
    """Mixin placed before a Lightning strategy.

    `trainer.save_checkpoint(url)` commits the current step through the checkpointer; `trainer.fit(ckpt_path=url)` loads
    the step that the last part of `url` names, into any world size and strategy.
    """

    checkpointer: Checkpointer
    on_loaded: Callable[[int], None] = staticmethod(lambda step: None)  # told which step was really loaded
    loaded: int | None = None  # that step
    parent: Store | None = None  # the checkpoints of another run, which a fresh one branches off from
    train_config: TrainConfig = TrainConfig()  # set by `strategies.build`
    defers_initialisation: ClassVar[bool] = False  # whether `prepare` takes networks of `deferred.record`

    @classmethod
    def check(cls, config: Any, network: nn.Module) -> None:
        """Raises ValueError if this strategy, so configured, cannot run `network` (which may be on the meta device)."""

    @classmethod
    def check_run(cls, config: Any) -> None:
        """Raises ValueError if this strategy cannot work with the other sections of a `RunConfig`."""
        if config.recovery.parity_every and not cls.replicates(config.strategy):
            raise ValueError(
                f"recovery.parity_every={config.recovery.parity_every} has no effect: with strategy.name="
                f"{config.strategy.name}, so configured, no two processes hold the same parameters; leave it out"
            )

    @classmethod
    def replicates(cls, config: Any) -> bool:
        """Whether with this strategy, so configured, several processes hold the same parameters."""
        return True

    @property
    def layout(self) -> Layout:
        """Which ranks read different samples."""
        return Layout(world_size())

    @property
    def device_type(self) -> str:
        """`cpu` or `cuda`."""
        return self.root_device.type

    def prepare(self, network: nn.Module) -> None:
        """Makes `network` distributed in place; called once, on the unsharded network."""
        train = self.train_config
        blocks.apply(network, compiled=train.compile, activation_checkpointing=train.activation_checkpointing)

    def masters(self) -> list[torch.Tensor]:
        """What the optimiser moves on this rank: the trained parameters, or buffers that hold parts of several."""
        return [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]

    def named(self, values: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors like `masters()`, in that order, by the names that the module's parameters have in a checkpoint."""
        assert self.lightning_module is not None
        by_master = {id(master): value for master, value in zip(self.masters(), values, strict=True)}
        return {
            name: by_master[id(parameter)]
            for name, parameter in plain_names(self.lightning_module).items()
            if id(parameter) in by_master
        }

    def weights_changed(self) -> None:
        """To be called on all ranks after `masters()` were changed in place outside of a step."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}  # saved sharded, in save_checkpoint

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Done in place by `load_checkpoint`."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Done in place by `load_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Commits `checkpoint["global_step"]`; a step that is committed already is left as it is. All ranks call it."""
        assert self.lightning_module is not None
        checkpoint["loops"] = {"fit_loop": _without_loader_state(checkpoint["loops"]["fit_loop"])}
        del checkpoint["state_dict"]
        checkpoint.pop("optimizer_states", None)
        trainer = self.lightning_module.trainer
        datamodule = getattr(trainer, "datamodule", None)
        stream = checkpoint.get(type(datamodule).__qualname__) if datamodule is not None else None
        self.checkpointer.save(
            checkpoint["global_step"],
            self.lightning_module,
            self.optimizers,
            checkpoint,
            device=self.root_device,
            stream=stream,
        )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        step = int(str(checkpoint_path).rstrip("/").rpartition("-")[2])
        while True:
            try:
                extra = self.checkpointer.load(
                    step, self.lightning_module, self.optimizers, device=self.root_device, source=self.parent
                )
                break
            except CorruptCheckpoint as error:  # on all ranks alike
                if self.parent is not None:
                    raise
                previous = self.checkpointer.latest(before=step)
                if previous is None:
                    raise
                log.warning("%s; falling back to %s", error, step_name(previous))
                step = previous
        self.loaded = step
        self.on_loaded(step)
        if self.parent is not None:
            running = self.lightning_module.trainer.lr_scheduler_configs
            for saved, config in zip(extra["lr_schedulers"], running, strict=True):
                saved["base_lrs"] = list(config.scheduler.base_lrs)
        _fit_counters(extra["loops"]["fit_loop"], step, self.lightning_module.trainer.accumulate_grad_batches)
        return {**extra, "state_dict": {}, "optimizer_states": []}


def plain_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by name, also shared ones under each of theirs, without what wrappers add to names."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        found[name] = parameter
    return found


def _without_loader_state(fit_loop: dict[str, Any]) -> dict[str, Any]:
    # The stream's state is saved once, by the data module; the loader has usually fetched further than was trained.
    state = dict(fit_loop.get("state_dict", {}))
    state.pop("combined_loader", None)
    return {**fit_loop, "state_dict": state}


def _fit_counters(fit_loop: dict[str, Any], step: int, accumulate: int) -> None:
    """Sets the loop counters to `step` optimiser steps of `accumulate` micro-batches, all of them complete.

    The save happens in `on_train_batch_end`, before Lightning counts that batch as completed, and another world size
    cuts a step into another number of micro-batches.
    """
    batches = step * accumulate
    progress = fit_loop["epoch_loop.batch_progress"]
    for scope in ("total", "current"):
        for count in ("ready", "started", "processed", "completed"):
            progress[scope][count] = batches
    progress["is_last_batch"] = False
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step

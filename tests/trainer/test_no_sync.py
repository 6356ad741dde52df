"""No callback of a run waits for the device in a healthy step."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from datamodules.store import Store
from tests.helpers.runs import fno_config
from trainer import build
from trainer import config as configs
from trainer.assembly import Parts, assemble
from trainer.callbacks.ema import EMA
from trainer.callbacks.selfcheck import SelfCheck
from trainer.checkpoint import Checkpointer
from trainer.records import MetricsWriter, start_attempt


@pytest.fixture
def group() -> Iterator[None]:
    began = not dist.is_initialized()
    if began:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if began:
        dist.destroy_process_group()


def test_a_healthy_step_never_reads_the_device(tmp_path: Path, group: None) -> None:
    """All callbacks of a run in their order. On the meta device every read of a value raises."""
    overrides = [
        "train.ema_decay=0.9",
        "train.val_every=1000",
        "log.every=100",
        "log.progress=true",
        "diagnostics.every=5",
        "recovery.nonfinite=skip",
        "recovery.spike=skip",
        "recovery.window=8",
        "strategy.name=ddp",
        "recovery.parity_every=1000",
        "checkpoint.every=1000",
        "checkpoint.every_minutes=1000",
        "checkpoint.background=true",
        "checkpoint.self_check=true",
        "checkpoint.best=val/loss",
    ]
    config = configs.load(fno_config(str(tmp_path), str(tmp_path / "none")), overrides)
    with torch.device("meta"):
        task = build._task(config)
    optimizer = torch.optim.AdamW(task.network.parameters(), lr=0.1)
    device = torch.device("cpu")
    strategy = SimpleNamespace(
        root_device=device,
        parent=None,
        loaded=None,
        masters=lambda: list(task.network.parameters()),
        named=lambda values: {},
    )
    store, batch = Store(str(tmp_path)), task.example_batch(4)
    share = SimpleNamespace(accumulation=1, world_size=1, micro=4)
    data = SimpleNamespace(position=0, global_batch=4, share=share, advance=lambda count: None)
    progress = SimpleNamespace(current=SimpleNamespace(ready=0, started=0, processed=0, completed=0))
    trainer: Any = SimpleNamespace(
        global_step=0,
        world_size=1,
        max_steps=10,
        accumulate_grad_batches=1,
        optimizers=[optimizer],
        lr_scheduler_configs=[],
        precision_plugin=None,
        datamodule=data,
        strategy=strategy,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
    )
    attempt = start_attempt(store, {})
    watch = assemble(
        Parts(
            config=config,
            accelerator="cpu",
            store=store,
            checkpointer=Checkpointer(store.sub("checkpoints"), background=True),
            strategy=strategy,
            task=task,
            data=data,
            attempt=attempt,
            flops=None,
            writer=MetricsWriter(store, attempt),
            trace=None,
        )
    )
    kinds = {type(callback).__name__ for callback in watch.callbacks}
    assert kinds == {
        *(
            "Watchdog",
            "StreamPosition",
            "SkipWindow",
            "DiagnosticsLog",
            "Guard",
            "EMA",
            "Parity",
            "MetricsLog",
            "Recovery",
        ),
        *(
            "Preemption",
            "SelfCheck",
            "Checkpoint",
            "MissedValidation",
            "Progress",
            "Ready",
            "Loggers",
            "Throughput",
            "Heartbeat",
        ),
    }, "a new callback is shown here, too"
    (check,) = (callback for callback in watch.callbacks if isinstance(callback, SelfCheck))
    check._batch = batch  # kept from the first batch of all, which is read once
    for callback in watch.callbacks:
        if isinstance(callback, EMA):
            callback.setup(trainer, task, "fit")
        callback.on_train_start(trainer, task)
    for step in range(10):  # diagnostics, too, only leave scalars on the device
        for callback in watch.callbacks:
            callback.on_train_batch_start(trainer, task, batch, step)
        output = task.training_step(batch, step)
        for callback in watch.callbacks:
            callback.on_before_backward(trainer, task, output["loss"])
        output["loss"].backward()
        for callback in watch.callbacks:
            callback.on_before_optimizer_step(trainer, task, optimizer)
        optimizer.step()
        trainer.global_step += 1
        for callback in watch.callbacks:
            callback.on_train_batch_end(trainer, task, output, batch, step)
    assert len(watch.metrics._waiting) == 10 and "diag/activations/rms" in watch.metrics._waiting[4].values
    assert watch.metrics._waiting[9].values["recovery/spike"].is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        watch.metrics.flush()

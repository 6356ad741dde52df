"""One run: from a resolved config to checkpoints, metrics and a record, fresh or resumed."""

import contextlib
import dataclasses
import os
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment

from datamodules.store import Store, join_url
from trainer import config as configs
from trainer import parametrization, strategies
from trainer.build import accelerator_name, build, optimizer_and_scheduler
from trainer.callbacks.checkpoint import Checkpoint
from trainer.callbacks.diagnostics import DiagnosticsLog
from trainer.callbacks.divergence import Divergence
from trainer.callbacks.metrics import MetricsLog
from trainer.callbacks.progress import Progress
from trainer.callbacks.stream import StreamPosition
from trainer.callbacks.throughput import Throughput
from trainer.checkpoint import Checkpointer, latest, step_name
from trainer.config import ConfigError
from trainer.environment import environment
from trainer.flops import count_flops, device_peak
from trainer.quiet import quiet
from trainer.records import MetricsWriter, TraceWriter, rewrite_attempt, start_attempt, write_record
from trainer.schema import RunConfig
from trainer.strategies.base import init_process_group

# Steps over which the record's training loss is averaged.
_LOSS_WINDOW = 20


def fit_url(url: str, *, resume: bool) -> dict[str, Any]:
    """Trains the run whose resolved config lies at `url/config.yaml`. Every process of the run calls it."""
    return fit(configs.load(join_url(url, "config.yaml")), resume=resume)


def fit(config: RunConfig, *, resume: bool = False) -> dict[str, Any]:
    """Trains in this process, one of `WORLD_SIZE`; returns the record of the run (the same on all ranks).

    Args:
        config: the resolved config; its `resources` yield to the world that the launcher made.
        resume: continue from the last whole checkpoint (from the start when there is none).

    Raises:
        ConfigError, StoreError, DataError, CheckpointError: bad input, each with one clear line.
    """
    started = time.time()
    quiet()
    config = _in_this_world(config)
    accelerator = accelerator_name(config.resources.accelerator)
    if config.resources.threads:
        torch.set_num_threads(config.resources.threads)
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    init_process_group(accelerator)
    store = Store(config.url)
    task, data = build(config)
    parameters = sum(p.numel() for p in task.network.parameters())
    flops = count_flops(task, 1)

    checkpoints = store.sub("checkpoints")
    checkpointer = _checkpointer(config, checkpoints)
    strategy = strategies.lookup(config.strategy.name)[1](config.strategy, checkpointer)
    rules = parametrization.lookup(config.parametrization.name)[1](config.parametrization).rules(task.network)
    task.prepare = strategy.prepare
    task.optimizers_factory = lambda network: optimizer_and_scheduler(config, network, rules)

    resume_step = checkpointer.latest() if resume else None
    info = {"resumed_from": resume_step or 0, "time": started, **environment()}
    attempt = _agree(lambda: start_attempt(store, info))
    rank = dist.get_rank()
    torch.manual_seed(config.seed + rank)  # the same parameters everywhere, but each rank's own dropout
    if rank == 0:
        # A checkpoint found corrupt while it is read is fallen back from; readers of the metrics must know.
        strategy.on_loaded = lambda step: rewrite_attempt(store, attempt, {**info, "resumed_from": step})
    metrics_writer = MetricsWriter(store, attempt, rank0=rank == 0, flush_seconds=config.log.flush_seconds)
    trace = TraceWriter(store, attempt, rank, config.log.flush_seconds) if config.log.trace else None
    metrics = MetricsLog(metrics_writer, every=config.log.every, trace=trace)
    divergence = Divergence(metrics)
    losses: deque[float] = deque(maxlen=_LOSS_WINDOW)
    metrics.subscribe(lambda rows: losses.extend(row["loss"] for row in rows if "loss" in row))
    throughput = Throughput(
        metrics,
        global_batch=config.train.global_batch,
        tokens_per_sample=task.tokens_per_sample(),
        flops_per_sample=flops,
        peak=device_peak(_device_name(accelerator), config.train.precision),
    )
    saver = Checkpoint(
        checkpoints,
        config.checkpoint.every,
        before_save=metrics.flush,
        healthy=lambda: divergence.healthy,
        stalled=throughput.stalled,
    )
    # The order is a contract, see trainer.callbacks: position and rows of a step come before its checkpoint.
    callbacks: list[pl.Callback] = [StreamPosition(config.train.global_batch)]
    if config.diagnostics.every:
        callbacks.append(DiagnosticsLog(config.diagnostics.names, config.diagnostics.every, metrics))
    callbacks += [metrics, divergence, saver]
    if config.log.progress and rank == 0:
        callbacks.append(
            Progress(
                metrics,
                samples_per_step=config.train.global_batch,
                tokens_per_sample=task.tokens_per_sample(),
                name=config.name,
            )
        )
    callbacks.append(throughput)

    trainer = _trainer(config, accelerator, strategy, callbacks)
    status, error = "ok", None
    try:
        path = None if resume_step is None else checkpoints.join(step_name(resume_step))
        trainer.fit(task, datamodule=data, ckpt_path=path)
        status = "ok" if divergence.healthy else "diverged"
    except BaseException as caught:
        status, error = "failed", f"{type(caught).__name__}: {' '.join(str(caught).split())}"
        raise
    finally:
        record = {
            "run_id": configs.config_hash(config),
            "name": config.name,
            "url": config.url,
            "status": status,
            "error": error,
            "steps": trainer.global_step,
            "samples": trainer.global_step * config.train.global_batch,
            "tokens": _tokens(trainer.global_step * config.train.global_batch, task.tokens_per_sample()),
            "diverged_step": divergence.step,
            "parameters": parameters,
            "flops": flops * trainer.global_step * config.train.global_batch,
            "flops_convention": "counted forward+backward: matmul, conv, dense attention, FFT 5 n log2 n",
            "attempts": attempt,
            "retries": attempt - 1,
            "wall_seconds": time.time() - started,
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
            "loss": sum(losses) / len(losses) if losses else None,
            "throughput": throughput.summary(),
            "dataset": data.spec()["fingerprint"],
            "checkpoint": _newest(checkpoints) if rank == 0 else None,
            "environment": environment(),
            "config": configs.to_dict(config),
        }
        with contextlib.ExitStack() as stack:  # each is done even if another fails
            if trace is not None:
                stack.callback(trace.close)
            if rank == 0:
                stack.callback(write_record, store, record)
                stack.callback(metrics_writer.close)
    return record


def _trainer(config: RunConfig, accelerator: str, strategy: Any, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A Lightning trainer that only drives the loop: what it logs and saves is Keel's."""
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=config.resources.nodes,
        strategy=strategy,
        plugins=[TorchElasticEnvironment()],
        precision=config.train.precision,  # type: ignore[arg-type]
        max_steps=config.train.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=config.accumulation,
        gradient_clip_val=config.train.grad_clip or None,
        val_check_interval=config.train.val_every * config.accumulation or None,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if config.train.val_every else 0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
    # Lightning broadcasts a flag and reads it back on the host before every batch; signals are agreed on elsewhere.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _in_this_world(config: RunConfig) -> RunConfig:
    """The config with the resources that the launcher really gave; refuses a batch that does not divide over them."""
    world = int(os.environ.setdefault("WORLD_SIZE", "1"))
    local = int(os.environ.setdefault("LOCAL_WORLD_SIZE", str(world)))
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("GROUP_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0")
    resources = dataclasses.replace(config.resources, nodes=world // local, processes_per_node=local)
    try:
        return dataclasses.replace(config, resources=resources)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _checkpointer(config: RunConfig, store: Store) -> Checkpointer:
    return Checkpointer(
        store,
        {"config": configs.to_dict(config), "config_hash": configs.config_hash(config), "code": environment()},
        part_bytes=config.checkpoint.part_mib << 20,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )


def _agree(call: Any) -> Any:
    """The value of `call` on rank 0, on all ranks."""
    box = [call() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _newest(checkpoints: Store) -> str | None:
    step = latest(checkpoints)
    return None if step is None else checkpoints.join(step_name(step))


def _tokens(samples: int, per_sample: int) -> int | None:
    return samples * per_sample if per_sample > 1 else None


def _device_name(accelerator: str) -> str:
    return torch.cuda.get_device_name() if accelerator == "cuda" else "cpu"

"""One run: from a resolved config to checkpoints, metrics and a record, fresh or resumed."""

import contextlib
import dataclasses
import logging
import os
import signal
import time
from collections import deque
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from datamodules.store import Store, join_url
from modules.tasks.base import Task
from trainer import config as configs
from trainer import parametrization, strategies
from trainer.build import accelerator_name, build, optimizer_and_scheduler
from trainer.callbacks.checkpoint import Checkpoint
from trainer.callbacks.diagnostics import DiagnosticsLog
from trainer.callbacks.divergence import Divergence
from trainer.callbacks.metrics import MetricsLog
from trainer.callbacks.preemption import Preemption
from trainer.callbacks.progress import Progress
from trainer.callbacks.stream import StreamPosition
from trainer.callbacks.throughput import Throughput
from trainer.callbacks.validation import MissedValidation
from trainer.checkpoint import Checkpointer, CheckpointError, latest, step_name
from trainer.config import ConfigError
from trainer.distributed import (
    LaunchedEnvironment,
    init_process_group,
    local_world_size,
    on_rank_zero,
    post_error,
    posted_error,
)
from trainer.environment import environment
from trainer.errors import is_user_error
from trainer.flops import count_flops, device_peak
from trainer.quiet import quiet
from trainer.records import (
    MetricsWriter,
    TraceWriter,
    next_attempt,
    read_metrics,
    read_record,
    rewrite_attempt,
    start_attempt,
    write_record,
)
from trainer.schema import RunConfig

# Steps over which the record's training loss is averaged.
_LOSS_WINDOW = 20

log = logging.getLogger("keel.run")


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
    quiet()
    config = _in_this_world(config)
    accelerator = accelerator_name(config.resources.accelerator)
    if config.resources.threads:
        torch.set_num_threads(config.resources.threads)
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be deterministic without
        torch.use_deterministic_algorithms(True)
    init_process_group(accelerator, config.strategy.timeout_seconds)
    store = Store(config.url)
    record = {
        "run_id": configs.config_hash(config),
        "name": config.name,
        "url": config.url,
        "status": "failed",
        "error": None,
        "environment": environment(),
        "config": configs.to_dict(config),
    }
    try:
        checkpointer = _checkpointer(config, store.sub("checkpoints"))
        resume_step = checkpointer.latest() if resume else None
        if resume_step is not None and resume_step >= config.train.max_steps:
            log.warning("the run has done its %d steps; raise train.max_steps to go on", resume_step)
            return on_rank_zero(lambda: read_record(store))
        return _fit(config, accelerator, store, checkpointer, resume_step, record)
    except BaseException as error:
        # When one rank fails the others see a broken connection: the cause is what the first one left.
        line = " ".join(str(error).split())
        if is_user_error(error):
            post_error(line)
        record["error"] = posted_error() or f"{type(error).__name__}: {line}"
        if dist.get_rank() == 0:
            with contextlib.suppress(Exception):
                write_record(store, record)
        raise


def _fit(
    config: RunConfig,
    accelerator: str,
    store: Store,
    checkpointer: Checkpointer,
    resume_step: int | None,
    record: dict[str, Any],
) -> dict[str, Any]:
    started = time.time()
    checkpoints, rank = checkpointer.store, dist.get_rank()
    task, data = build(config)
    record["run_id"] = configs.config_hash(config, data.spec()["fingerprint"])
    parameters = sum(p.numel() for p in task.network.parameters())
    flops = _flops(task)
    strategy = strategies.lookup(config.strategy.name)[1](config.strategy, checkpointer)
    rules = parametrization.lookup(config.parametrization.name)[1](config.parametrization).rules(task.network)
    task.prepare = strategy.prepare
    task.optimizers_factory = lambda network: optimizer_and_scheduler(config, network, rules)
    torch.manual_seed(config.seed + rank)  # the same parameters everywhere, but each rank's own dropout

    info = {"resumed_from": resume_step or 0, "time": started, **environment()}
    attempt = on_rank_zero(lambda: start_attempt(store, info))
    checkpointer.fence = lambda: _refuse_if_replaced(store, attempt)
    if rank == 0:
        # A checkpoint found corrupt while it is read is fallen back from; readers of the metrics must know.
        strategy.on_loaded = lambda step: rewrite_attempt(store, attempt, {**info, "resumed_from": step})
    writer = MetricsWriter(store, attempt, rank0=rank == 0, flush_seconds=config.log.flush_seconds)
    trace = TraceWriter(store, attempt, rank, config.log.flush_seconds) if config.log.trace else None
    metrics = MetricsLog(writer, every=config.log.every, trace=trace)
    divergence, preemption = Divergence(metrics), Preemption()
    losses: deque[float] = deque(maxlen=_LOSS_WINDOW)
    metrics.subscribe(lambda rows: losses.extend(row["loss"] for row in rows if "loss" in row))
    throughput = Throughput(
        metrics,
        global_batch=config.train.global_batch,
        tokens_per_sample=task.tokens_per_sample(),
        flops_per_sample=flops,
        peak=device_peak(torch.cuda.get_device_name() if accelerator == "cuda" else "cpu", config.train.precision),
    )
    saver = Checkpoint(
        checkpoints,
        config.checkpoint.every,
        before_save=metrics.flush,
        healthy=divergence.finite,
        stalled=throughput.stalled,
    )
    # The order is a contract, see trainer.callbacks: position and rows of a step come before its checkpoint.
    callbacks: list[pl.Callback] = [StreamPosition()]
    if config.diagnostics.every:
        callbacks.append(DiagnosticsLog(config.diagnostics.names, config.diagnostics.every, metrics))
    callbacks += [metrics, divergence, preemption, saver]
    if on_rank_zero(lambda: _validation_is_missing(store, config, resume_step)):
        callbacks.append(MissedValidation())
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
    try:
        path = None if resume_step is None else checkpoints.join(step_name(resume_step))
        trainer.fit(task, datamodule=data, ckpt_path=path)
    finally:
        with contextlib.ExitStack() as stack:  # each is closed even if another fails
            stack.callback(writer.close)
            if trace is not None:
                stack.callback(trace.close)
    steps = trainer.global_step
    samples = steps * config.train.global_batch
    status = "ok"
    if not divergence.healthy:
        status = "diverged"
    elif preemption.signal is not None and steps < config.train.max_steps:
        status = "interrupted" if preemption.signal == signal.SIGINT else "preempted"
    record |= {
        "status": status,
        "steps": steps,
        "samples": samples,
        "tokens": samples * task.tokens_per_sample() if task.tokens_per_sample() > 1 else None,
        "diverged_step": divergence.step,
        "parameters": parameters,
        "flops": None if flops is None else flops * samples,
        "flops_convention": "counted forward+backward: matmul, conv, dense attention, FFT 5 n log2 n",
        "attempts": attempt,
        "retries": attempt - 1,
        "attempt_seconds": time.time() - started,
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "loss": sum(losses) / len(losses) if losses else None,
        "throughput": throughput.summary(),
        "dataset": data.spec()["fingerprint"],
        "checkpoint": on_rank_zero(lambda: _newest(checkpoints)),
    }
    on_rank_zero(lambda: write_record(store, record))
    return record


def _trainer(config: RunConfig, accelerator: str, strategy: Any, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A Lightning trainer that only drives the loop: what it logs and saves is Keel's."""
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=local_world_size(),
        num_nodes=config.resources.nodes,
        strategy=strategy,
        plugins=[LaunchedEnvironment()],
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
    # Lightning talks to the other ranks inside its signal handler, and before every batch reads a broadcast flag back on
    # the host. `Preemption` handles signals, without either.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    return trainer


def _in_this_world(config: RunConfig) -> RunConfig:
    """The config with the resources that the launcher really gave; refuses a batch that does not divide over them."""
    world, local = int(os.environ.get("WORLD_SIZE", "1")), local_world_size()
    resources = dataclasses.replace(config.resources, nodes=world // local, processes_per_node=local)
    try:
        return dataclasses.replace(config, resources=resources)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _checkpointer(config: RunConfig, store: Store) -> Checkpointer:
    return Checkpointer(
        store,
        {"config": configs.to_dict(config), "code": environment()},
        part_bytes=config.checkpoint.part_mib << 20,
        keep_last=config.checkpoint.keep_last,
        keep_every=config.checkpoint.keep_every,
    )


def _refuse_if_replaced(store: Store, attempt: int) -> None:
    newest = next_attempt(store) - 1
    if newest > attempt:
        raise CheckpointError(
            f"attempt {newest} of the run at {store.url} has started; this one, attempt {attempt}, stops: "
            "only one may write"
        )


def _validation_is_missing(store: Store, config: RunConfig, resume_step: int | None) -> bool:
    """Whether the run was killed between a save and the validation of the same step."""
    if not resume_step or not config.train.val_every or resume_step % config.train.val_every:
        return False
    return not any(
        row["step"] == resume_step and any(name.startswith("val/") for name in row) for row in read_metrics(store)
    )


def _flops(task: Task) -> int | None:
    try:
        return count_flops(task, 1)
    except RuntimeError as error:
        log.warning("%s; the run goes on without FLOP figures", error)
        return None


def _newest(checkpoints: Store) -> str | None:
    step = latest(checkpoints)
    return None if step is None else checkpoints.join(step_name(step))

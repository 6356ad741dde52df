"""One run: from a resolved config to checkpoints, metrics and a record, fresh or resumed."""

import contextlib
import dataclasses
import functools
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from datamodules.store import Store, join_url
from trainer import config as configs
from trainer import restarts, signals, status, strategies
from trainer.assembly import Parts, assemble, mean
from trainer.build import accelerator_name, build, optimizer_and_scheduler, rules
from trainer.callbacks.recovery import Rollback
from trainer.checkpoint import Checkpointer, CheckpointError, latest, step_name, weights
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
from trainer.errors import exit_code, is_user_error
from trainer.outcome import FLOPS_CONVENTION, ended, faults, flops_of, last_validation
from trainer.quiet import quiet
from trainer.records import (
    MetricsWriter,
    TraceWriter,
    newest_attempt,
    read_attempts,
    read_metrics,
    rewrite_attempt,
    start_attempt,
    write_record,
)
from trainer.rollback import go_back
from trainer.schema import RunConfig
from trainer.strategies import precision

log = logging.getLogger("keel.run")

_HURRIED_S = 10.0  # so long the other tools may take after a signal, when all else is done


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
    checkpointer = _checkpointer(config, store.sub("checkpoints"))
    try:
        resume_step = checkpointer.latest() if resume else None
        if resume_step is not None and resume_step >= config.train.max_steps:
            found: dict[str, Any] = on_rank_zero(functools.partial(ended, config, store, resume_step, record))
            _say_how_it_ended(store, found)
            return found
        rollback: Rollback | None = None
        while True:
            outcome = _fit(config, accelerator, store, checkpointer, resume_step, record, rollback)
            if not isinstance(outcome, Rollback):
                return outcome
            rollback = outcome
            commits, checkpoints = config.recovery.rollback_commits, checkpointer.store
            resume_step = on_rank_zero(functools.partial(go_back, checkpoints, rollback, commits))
            checkpointer.committed = None  # it may be gone
            gc.collect()  # two models at once may be one too many
    except BaseException as error:
        # When one rank fails the others see a broken connection: the cause is what the first one left.
        line = " ".join(str(error).split())
        if is_user_error(error):
            post_error(exit_code(error), line)
        told = posted_error()
        record["error"] = told[1] if told else f"{type(error).__name__}: {line}"
        if dist.get_rank() == 0:
            with contextlib.suppress(Exception):
                _write_record(store, record, checkpointer.fence)
                status.ended(store, record)
        raise
    finally:
        signals.release()


def _fit(
    config: RunConfig,
    accelerator: str,
    store: Store,
    checkpointer: Checkpointer,
    resume_step: int | None,
    record: dict[str, Any],
    rollback: Rollback | None,
) -> dict[str, Any] | Rollback:
    """One attempt: to its end, which `record` tells, or to a rollback that it asks for."""
    started = time.time()
    checkpoints, rank = checkpointer.store, dist.get_rank()
    task, data = build(config, deferred=True)
    record["run_id"] = configs.config_hash(config, data.spec()["fingerprint"])
    parameters = sum(p.numel() for p in task.network.parameters())
    flops = flops_of(task)
    strategy = strategies.build(config, checkpointer)
    layout = strategy.layout
    data.configure(
        layout.data_parallel, layout.data_rank(rank)
    )  # ranks that compute a sample together read it together
    by_name = rules(config, task)
    fresh, begins = config.weights.url and resume_step is None, resume_step or 0
    task.prepare = strategy.prepare
    path = None if resume_step is None else checkpoints.join(step_name(resume_step))
    if fresh and config.weights.state:
        train = config.train
        begins = on_rank_zero(
            lambda: weights.branch_point(config.weights, global_batch=train.global_batch, max_steps=train.max_steps)
        )
        strategy.parent = Store(config.weights.url).sub("checkpoints")
        path = strategy.parent.join(step_name(begins))
    elif fresh:
        task.prepare = weights.starting(config.weights, store, strategy.prepare)
    task.optimizers_factory = lambda network: optimizer_and_scheduler(config, network, by_name)
    torch.manual_seed(
        config.seed + layout.data_rank(rank)
    )  # the same parameters everywhere, but each rank's own dropout

    info = {"resumed_from": begins, "time": started, **environment()}
    if rollback is not None:
        info |= {"rollback": rollback.why, "skip_to": rollback.position}
    elif restarts.count():
        info |= {"restart": restarts.count(), "cause": restarts.cause()}
    attempt = on_rank_zero(lambda: start_attempt(store, info))
    checkpointer.fence = lambda: _refuse_if_replaced(store, attempt)
    checkpointer.writer = attempt
    if rank == 0:
        # A checkpoint found corrupt while it is read is fallen back from; readers of the metrics must know.
        strategy.on_loaded = lambda step: rewrite_attempt(store, attempt, {**info, "resumed_from": step})
    writer = MetricsWriter(store, attempt, rank0=rank == 0, flush_seconds=config.log.flush_seconds)
    traced = config.log.trace and rank % layout.tensor == 0
    trace = TraceWriter(store, attempt, rank, config.log.flush_seconds) if traced else None
    watch = assemble(
        Parts(
            config=config,
            accelerator=accelerator,
            store=store,
            checkpointer=checkpointer,
            strategy=strategy,
            task=task,
            data=data,
            attempt=attempt,
            flops=flops,
            writer=writer,
            trace=trace,
            rollback=rollback,
            tell=lambda line: _write_record(store, record | {"error": line}, checkpointer.fence),
        )
    )
    recovery, preemption, losses = watch.recovery, watch.preemption, watch.losses
    trainer = _trainer(config, accelerator, strategy, watch.callbacks)
    try:
        trainer.fit(task, datamodule=data, ckpt_path=path)
    finally:
        with contextlib.ExitStack() as stack:  # each is closed even if another fails
            stack.callback(watch.heartbeat.stop)
            stack.callback(writer.close)
            if trace is not None:
                stack.callback(trace.close)
    if recovery.rollback is not None:
        return recovery.rollback
    steps = trainer.global_step
    samples = steps * config.train.global_batch
    ending = "ok"
    if not recovery.healthy:
        ending = "diverged"
    elif preemption.signal is not None and steps < config.train.max_steps:
        ending = "interrupted" if preemption.signal == signal.SIGINT else "preempted"
        if on_rank_zero(lambda: status.requested(store)):
            ending = "cancelled"
    elif watch.pruning is not None and watch.pruning.why:
        ending = "pruned"
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if config.train.val_every and not metrics and ending in ("ok", "diverged", "pruned"):  # those of an earlier attempt
        metrics = on_rank_zero(lambda: last_validation(read_metrics(store)))
        metrics.pop("step", None)
    record |= {
        "status": ending,
        "steps": steps,
        "samples": samples,
        "tokens": samples * task.tokens_per_sample() if task.tokens_per_sample() > 1 else None,
        "diverged_step": recovery.step,
        **({"pruned": watch.pruning.why} if watch.pruning is not None and watch.pruning.why else {}),
        "parameters": parameters,
        "flops": None if flops is None else flops * samples,
        "flops_convention": FLOPS_CONVENTION,
        "attempts": attempt,
        "retries": attempt - 1,
        "faults": on_rank_zero(lambda: faults(read_attempts(store))),
        "attempt_seconds": time.time() - started,
        "metrics": metrics,
        "loss": mean(losses),
        "throughput": watch.throughput.summary(),
        **watch.record(),
        "dataset": data.spec()["fingerprint"],
        "checkpoint": on_rank_zero(lambda: _newest(checkpointer)),
    }
    on_rank_zero(lambda: _write_record(store, record, checkpointer.fence))
    _say_how_it_ended(store, record)
    if watch.loggers is not None:  # still open after a signal
        watch.loggers.close(_HURRIED_S)
    return record


def _write_record(store: Store, record: dict[str, Any], fence: Callable[[], None]) -> None:
    """Not where a newer attempt has started, which says how the run fares: there `fence` raises."""
    fence()
    write_record(store, record)


def _say_how_it_ended(store: Store, record: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        with contextlib.suppress(Exception):  # the record says it, too
            status.ended(store, record)


def _trainer(config: RunConfig, accelerator: str, strategy: Any, callbacks: list[pl.Callback]) -> pl.Trainer:
    """A Lightning trainer that only drives the loop: what it logs and saves is Keel's."""
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=local_world_size(),
        num_nodes=config.resources.nodes,
        strategy=strategy,
        plugins=[LaunchedEnvironment(), precision.plugin(config.train.precision, accelerator)],
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
        retention=config.checkpoint.retention(),
        background=config.checkpoint.background,
    )


def _refuse_if_replaced(store: Store, attempt: int) -> None:
    newest = newest_attempt(store)
    if newest > attempt:
        raise CheckpointError(
            f"attempt {newest} of the run at {store.url} has started; this one, attempt {attempt}, stops: "
            "only one may write"
        )


def _newest(checkpointer: Checkpointer) -> str | None:
    step = checkpointer.committed[0] if checkpointer.committed else latest(checkpointer.store)
    return None if step is None else checkpointer.store.join(step_name(step))

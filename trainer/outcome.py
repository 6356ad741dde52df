"""The record of a run that ended between its last commit and its record: made from what the store holds."""

from __future__ import annotations

import logging
import math
from typing import Any

from datamodules.store import NotFound, Store
from modules.tasks.base import Task
from trainer import config as configs
from trainer.build import build
from trainer.callbacks.guard import NONFINITE
from trainer.checkpoint import step_name
from trainer.flops import count_flops
from trainer.records import read_attempts, read_metrics, read_record, write_record
from trainer.schema import RunConfig

log = logging.getLogger("keel.run")

# Steps over which the record's training loss is averaged.
LOSS_WINDOW = 20
FLOPS_CONVENTION = "counted forward+backward: matmul, conv, dense attention, FFT 5 n log2 n"


def ended(config: RunConfig, store: Store, step: int, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a run whose last commit, of `step`, is its last step. One process calls it.

    The one in the store, when it is of that end. A process that was killed after the commit has left none, that of an
    earlier attempt, or its launcher's that it failed: then it is written anew, from the commit and the rows of metrics,
    and says so (`rebuilt`). What only the process knew (throughput, what callbacks add) is not in it.

    Args:
        config: of the run, in the world that asks.
        store: of the run.
        step: of the last commit, at least `train.max_steps`.
        record: the fields that every record of the run has.
    """
    try:
        known = read_record(store)
        if known["status"] in ("ok", "diverged") and (known.get("steps") or 0) >= step:
            log.warning("the run has done its %d steps; raise train.max_steps to go on", step)
            return known
    except NotFound:
        pass
    task, data = build(config, deferred=True)
    fingerprint, tokens = data.spec()["fingerprint"], task.tokens_per_sample()
    flops, samples = flops_of(task), step * config.train.global_batch
    rows = [row for row in read_metrics(store) if row["step"] <= step]
    last = last_validation(rows) or {"step": step}
    if config.train.val_every and last["step"] < step // config.train.val_every * config.train.val_every:
        log.warning("the last validation was lost with the process; that of step %d counts", last["step"])
    attempts = read_attempts(store)
    found = {
        **record,
        "run_id": configs.config_hash(config, fingerprint),
        "status": "ok",
        "error": None,
        "rebuilt": True,
        "steps": step,
        "samples": samples,
        "tokens": samples * tokens if tokens > 1 else None,
        "diverged_step": None,
        "parameters": sum(p.numel() for p in task.network.parameters()),
        "flops": None if flops is None else flops * samples,
        "flops_convention": FLOPS_CONVENTION,
        "attempts": len(attempts),
        "retries": len(attempts) - 1,
        "faults": faults(attempts),
        "metrics": {name: value for name, value in last.items() if name.startswith("val/")},
        "loss": mean_loss(rows, skipped=config.recovery.nonfinite == "skip"),
        "throughput": {},
        "dataset": fingerprint,
        "checkpoint": store.join("checkpoints", step_name(step)),
    }
    write_record(store, found)
    log.warning("the run had done its %d steps when it was killed; its record is made from what is in the store", step)
    return found


def flops_of(task: Task) -> int | None:
    """Forward and backward of one sample; None, with a warning, where they cannot be counted."""
    try:
        return count_flops(task, 1)
    except RuntimeError as error:
        log.warning("%s; the run goes on without FLOP figures", error)
        return None


def last_validation(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The `val/` metrics of the last validation, and its `step`; empty where there was none."""
    found = [row for row in rows if any(name.startswith("val/") for name in row)]
    return (
        {name: value for name, value in found[-1].items() if name.startswith("val/") or name == "step"} if found else {}
    )


def mean_loss(rows: list[dict[str, Any]], *, skipped: bool) -> float | None:
    """Mean training loss of the last `LOSS_WINDOW` steps; `skipped`: without steps whose update was left out."""
    losses = [row["loss"] for row in rows if "loss" in row and not (skipped and row.get(NONFINITE))]
    last = losses[-LOSS_WINDOW:]
    return math.fsum(last) / len(last) if last else None


def faults(attempts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What made attempts necessary, so far as the run or its launcher know."""
    names = ("attempt", "resumed_from", "cause", "rollback")
    return [
        {name: row[name] for name in names if name in row} for row in attempts if "rollback" in row or "restart" in row
    ]

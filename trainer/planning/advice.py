"""What would make a run fit: settings that need less memory, each tried by tracing it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from trainer import config as configs
from trainer.planning.devices import Device
from trainer.planning.estimate import Plan, plan
from trainer.schema import RunConfig

log = logging.getLogger("keel.dryrun")


def what_fits(
    config: RunConfig, device: Device, enough: int = 2, host_memory: float = 0.0
) -> list[tuple[list[str], Plan]]:
    """(overrides, plan) of up to `enough` changes with which `config` fits on `device`, the mildest first.

    Batch, model and steps stay; a change of the precision, which changes the numbers (see `changes_numbers`), comes last.
    Empty if none of the known ways is enough.
    """
    found: list[tuple[list[str], Plan]] = []
    for overrides in _candidates(config):
        try:
            made = plan(changed(config, overrides), device, host_memory)
        except (ValueError, RuntimeError) as error:  # not possible with this model, world or batch
            log.debug("%s: %s", overrides, error)
            continue
        if made.fits:
            found.append((overrides, made))
            if len(found) == enough:
                break
    return found


def changed(config: RunConfig, overrides: list[str]) -> RunConfig:
    """`config` with overrides; naming another strategy drops the settings of the present one."""
    raw = configs.to_dict(config)
    if any(override.startswith("strategy.name=") for override in overrides):
        raw["strategy"] = {}
    return configs.load(raw, overrides)


def _candidates(config: RunConfig) -> Iterator[list[str]]:
    strategy, world = config.strategy, config.resources.world_size
    shard: list[str] = []
    if strategy.name == "fsdp" and (strategy.sharding != "full_shard" or strategy.replicate > 1):
        shard = ["strategy.sharding=full_shard", "strategy.replicate=1"]
    elif strategy.name == "ddp" and world > 1:
        shard = ["strategy.name=fsdp"]
    recompute = ["train.activation_checkpointing=block"]
    if config.train.activation_checkpointing == "none":
        yield ["train.activation_checkpointing=selective"]
    if config.train.activation_checkpointing != "block":
        yield recompute
    if shard:
        yield shard
    micro = config.train.global_batch // config.data_parallel // config.accumulation
    smaller = [f"train.micro_batch={size}" for size in (micro // 2, micro // 4, 1) if size and size < micro]
    smaller = list(dict.fromkeys(smaller))
    for size in smaller:
        yield [size]
    if shard:
        yield [*shard, *recompute]
    for size in smaller:
        yield [*shard, *recompute, size]
    if strategy.name in ("ddp", "fsdp"):
        base = ["strategy.name=fsdp"] if strategy.name == "ddp" else shard
        present = getattr(strategy, "tensor", 1)
        for tensor in (2, 4, 8):
            if tensor > present and world % tensor == 0:
                yield [*base, *recompute, "train.micro_batch=1", f"strategy.tensor={tensor}"]
    if strategy.name != "deepspeed" or not strategy.offload_parameters:
        zero = ["strategy.name=deepspeed", "strategy.stage=3"]
        zero += ["strategy.offload_optimizer=true", "strategy.offload_parameters=true"]
        yield [*zero, *recompute, *smaller[-1:], "diagnostics.every=0", "diagnostics.names=[]"]
    if config.train.precision == "32-true":
        yield [*shard, *recompute, *smaller[-1:], "train.precision=bf16-mixed"]


def changes_numbers(overrides: list[str]) -> bool:
    """Whether a run with these overrides computes other numbers, beyond the order of sums."""
    return any(override.startswith("train.precision=") for override in overrides)

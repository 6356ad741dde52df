"""Sizes of activations, and of their changes, over the first steps of a run: what a parametrisation promises to hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from trainer.plain import PlainRun
from trainer.schema import RunConfig, ScheduleConfig

OUTPUT = "output"  # of the whole network
Trace = dict[str, list[tuple[float, float]]]


def trace(config: RunConfig, batch: Mapping[str, Tensor], steps: int) -> Trace:
    """Module path -> (mean |x_t|, mean |x_t - x_0|) for t = 0 .. steps, training on one batch at the peak rate.

    Looked at are the outputs of blocks, of modules with parameters of their own, and of the network; of a module that is
    called several times in a forward pass, the first.

    Raises:
        ConfigError, DataError, StoreError: as `trainer.build.build`.
    """
    train = dataclasses.replace(config.train, max_steps=max(1, steps), compile=False, precision="32-true")
    run = PlainRun(dataclasses.replace(config, schedule=ScheduleConfig(name="constant"), train=train))
    network = run.task.network
    blocks = {id(block) for block in network.blocks()}  # type: ignore[operator]
    first: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    found: Trace = {}
    for path, module in network.named_modules():
        own = any(True for _ in module.parameters(recurse=False))
        if own or id(module) in blocks or module is network:
            module.register_forward_hook(_keeper(seen, path or OUTPUT))
    for step in range(steps + 1):
        seen.clear()
        if step < steps:
            run.step(batch)
        else:
            run.evaluate(batch)
        for path, x in seen.items():
            change = (x - first.setdefault(path, x)).abs().mean()
            found.setdefault(path, []).append((float(x.abs().mean()), float(change)))
    return found


def _keeper(seen: dict[str, Tensor], path: str) -> Any:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if path not in seen:
            seen[path] = output.detach().float().clone()

    return keep

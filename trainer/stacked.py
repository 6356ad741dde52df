"""Many small runs at once: networks that differ in numbers only, trained as one stack by `torch.func.vmap`.

For runs so small that most of their time goes into calling kernels. Each run of a stack computes what `trainer.run.fit`
computes for its config, up to the order of sums, but leaves no more than its record: no checkpoint, no curves.

The optimiser is torch's own over stacked parameters, at the rate 1: AdamW and SGD work on each element alone and their
steps are proportional to the rate, so each run's step is that one times its own rate.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from modules.tasks.base import Batch
from trainer import config as configs
from trainer import optim, parametrization
from trainer.build import accelerator_name, build, flops_per_sample, network_of, rules
from trainer.config import ConfigError
from trainer.environment import environment
from trainer.optim.schedule import factor
from trainer.outcome import LOSS_WINDOW
from trainer.schema import RunConfig

# What may differ within a stack: it does not show in what the network computes from its parameters.
VARIED = ("optim.lr", "model.init_std")
_IGNORED = ("name", "url", "log", "checkpoint", "recovery")
OPTIMIZERS = ("adamw", "sgd")


def refuse(config: RunConfig) -> None:
    """Raises ConfigError, with the key, where a run cannot be part of a stack."""
    train = config.train
    for key, value, needed in (
        ("resources.nodes x processes_per_node", config.resources.world_size, 1),
        ("train.precision", train.precision, "32-true"),
        ("train.micro_batch", train.micro_batch, 0),
        ("train.ema_decay", train.ema_decay, 0.0),
        ("train.compile", train.compile, False),
        ("train.activation_checkpointing", train.activation_checkpointing, "none"),
        ("weights.url", config.weights.url, ""),
        ("diagnostics.every", config.diagnostics.every, 0),
        ("recovery.nonfinite", config.recovery.nonfinite, "stop"),
        ("recovery.spike", config.recovery.spike, "ignore"),
    ):
        if value != needed:
            raise ConfigError(f"{key}={value}: a stack of networks needs {needed or 'none'}; set packed.stacked=false")
    if config.optim.name not in OPTIMIZERS:
        raise ConfigError(
            f"optim.name={config.optim.name} does not work on each element alone, as a stack of networks needs "
            f"({', '.join(OPTIMIZERS)} do); set packed.stacked=false"
        )


def kind(config: RunConfig) -> str:
    """Equal for runs that can be of one stack."""
    raw = configs.to_dict(config)
    for key in (*VARIED, *_IGNORED):
        head, _, name = key.partition(".")
        (raw[head] if name else raw).pop(name or head, None)
    return json.dumps(raw, sort_keys=True, default=str)


class _Loss(nn.Module):
    """A task as a function of a batch, for `functional_call`."""

    def __init__(self, task: Any) -> None:
        super().__init__()
        self.task = task

    def forward(self, batch: Batch, evaluated: bool = False) -> Any:
        if evaluated:
            sums = self.task.evaluation_step(batch)
            return {name: torch.stack([t.double(), torch.as_tensor(c).double()]) for name, (t, c) in sums.items()}
        total, count, _ = self.task.loss_terms(batch)
        return total / count


def train(stack: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """Trains the runs of a stack; returns their records, shorter ones than `trainer.run.fit` writes.

    Args:
        stack: configs of one `kind`.

    Raises:
        ConfigError: they are of several kinds, or cannot be stacked.
        DataError, StoreError: a data set that cannot be read.
    """
    first = stack[0]
    refuse(first)
    if len({kind(config) for config in stack}) > 1:
        raise ConfigError(f"a stack takes runs that differ in {', '.join(VARIED)} only")
    started = time.monotonic()
    device = torch.device(accelerator_name(first.resources.accelerator))
    if first.resources.threads:
        torch.set_num_threads(first.resources.threads)
    task, data = build(first)
    data.configure(1, 0)
    by_name = rules(first, task)
    if first.parametrization.name != "standard" and any(rules(config, task) != by_name for config in stack):
        raise ConfigError(
            "parametrization: its rules are not the same at all rates, as a stack of networks needs (decay=independent "
            "does that); set packed.stacked=false"
        )
    parameters, _ = stack_module_state([network_of(config) for config in stack])
    parameters = {name: value.detach().to(device).requires_grad_() for name, value in parameters.items()}
    module = _Loss(task.to(device)).train()
    groups = parametrization.groups(
        parameters, by_name, lr=1.0, weight_decay=first.optim.weight_decay, eps=getattr(first.optim, "eps", None)
    )
    optimizer = optim.lookup(first.optim.name)[1](dataclasses.replace(first.optim, lr=1.0), groups)
    rates = torch.tensor([config.optim.lr for config in stack], device=device)
    run = _Run(first, module, parameters, optimizer, rates)
    measured = first.train.val_every and first.train.max_steps // first.train.val_every * first.train.val_every
    metrics: dict[str, Tensor] = {}
    batches = iter(data.train_dataloader())
    for step in range(1, first.train.max_steps + 1):
        run.step({name: value.to(device) for name, value in next(batches).items()})
        data.advance(first.train.global_batch)
        if step == measured:
            metrics = run.evaluate(data.val_dataloader(), device)
        if not bool(run.alive.any()):
            break
    spec = data.spec()
    _known.setdefault(kind(first), first)
    return _records(stack, run, metrics, spec["fingerprint"], time.monotonic() - started, task)


class _Run:
    """The state of a stack: parameters [K, ...], which runs are alive [K], the last losses of each."""

    def __init__(
        self, config: RunConfig, module: _Loss, parameters: dict[str, Tensor], optimizer: Any, rates: Tensor
    ) -> None:
        self.config, self.module, self.parameters, self.optimizer, self.rates = (
            config,
            module,
            parameters,
            optimizer,
            rates,
        )
        self.alive = torch.ones_like(rates, dtype=torch.bool)
        self.diverged = torch.zeros_like(rates, dtype=torch.int64)  # the first bad step
        self.losses: deque[Tensor] = deque(maxlen=LOSS_WINDOW)
        self.steps = 0
        self._gradients = vmap(grad_and_value(self._loss), in_dims=(0, None))
        self._measures = vmap(self._measure, in_dims=(0, None))

    def step(self, batch: Batch) -> None:
        """One optimiser step of all runs that are alive."""
        config, schedule = self.config, dataclasses.asdict(self.config.schedule)
        gradients, losses = self._gradients({name: p.detach() for name, p in self.parameters.items()}, batch)
        if config.train.grad_clip:
            squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
            norm = torch.stack(squares).sum(0).sqrt()
            scale = (config.train.grad_clip / (norm + 1e-6)).clamp(max=1.0)
            gradients = {name: _rows(scale, g) * g for name, g in gradients.items()}
        before = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name]
        self.optimizer.step()
        rate = self.rates * factor(self.steps, max_steps=config.train.max_steps, **schedule)
        self.steps += 1
        bad = self.alive & ~losses.isfinite()
        self.diverged[bad] = self.steps
        self.alive &= ~bad
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                moved = before[name] + _rows(rate, parameter) * (parameter - before[name])
                parameter.copy_(torch.where(_rows(self.alive, parameter), moved, before[name]))
        self.losses.append(losses.detach())

    def evaluate(self, batches: Any, device: torch.device) -> dict[str, Tensor]:
        """Means of the validation metrics of each run, [K]."""
        sums: dict[str, Tensor] = {}
        self.module.eval()
        with torch.no_grad():
            for batch in batches:
                batch = {name: value.to(device) for name, value in batch.items()}
                for name, pair in self._measures(self.parameters, batch).items():
                    sums[name] = sums[name] + pair if name in sums else pair
        self.module.train()
        return {f"val/{name}": pair[:, 0] / pair[:, 1] for name, pair in sums.items()}

    def finite(self) -> Tensor:
        """Which runs have finite parameters, [K]."""
        return torch.stack([p.detach().flatten(1).isfinite().all(1) for p in self.parameters.values()]).all(0)

    def _loss(self, parameters: dict[str, Tensor], batch: Batch) -> Tensor:
        return self._call(parameters, (batch,))

    def _measure(self, parameters: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        return self._call(parameters, (batch, True))

    def _call(self, parameters: dict[str, Tensor], arguments: tuple[Any, ...]) -> Any:
        with sdpa_kernel(SDPBackend.MATH):  # the fused ones would be called once for each network
            return functional_call(
                self.module, {f"task.network.{name}": p for name, p in parameters.items()}, arguments
            )


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """[K] as [K, 1, 1, ...], to go with a stacked tensor."""
    return values.view(-1, *[1] * (like.dim() - 1))


# Thousands of stacks are of few kinds, and of one process.
_known: dict[str, RunConfig] = {}
_environment = functools.cache(environment)


@functools.cache
def _flops(of: str) -> int:
    return flops_per_sample(_known[of])


def _records(
    stack: Sequence[RunConfig], run: _Run, metrics: dict[str, Tensor], fingerprint: str, seconds: float, task: Any
) -> list[dict[str, Any]]:
    losses = torch.stack(list(run.losses)).double().mean(0).tolist()
    sound = (run.alive & run.finite()).tolist()
    values = {name: value.tolist() for name, value in metrics.items()}
    where, flops, each = _environment(), _flops(kind(stack[0])), seconds / len(stack)
    parameters = sum(p[0].numel() for p in run.parameters.values())
    found = []
    for k, config in enumerate(stack):
        steps = int(run.diverged[k]) or run.steps
        samples = steps * config.train.global_batch
        tokens = samples * task.tokens_per_sample() if task.tokens_per_sample() > 1 else None
        found.append(
            {
                "run_id": configs.config_hash(config, fingerprint),
                "name": config.name,
                "url": None,
                "status": "ok" if sound[k] and math.isfinite(losses[k]) else "diverged",
                "error": None,
                "environment": where,
                "config": configs.to_dict(config),
                "steps": steps,
                "samples": samples,
                "tokens": tokens,
                "diverged_step": (int(run.diverged[k]) or (None if sound[k] else steps)),
                "parameters": parameters,
                "flops": flops * samples,
                "loss": losses[k],
                "metrics": {name: value[k] for name, value in values.items()},
                "throughput": {"elapsed_seconds": each, "flop_per_s": flops * samples / each},
                "dataset": fingerprint,
            }
        )
    return found

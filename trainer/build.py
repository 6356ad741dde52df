"""Builds the parts of a run from its config: task, data module, optimiser. Everything here is deterministic in the config."""

import dataclasses
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from datamodules import registry as data_registry
from modules import registry as model_registry
from modules.tasks.base import Task
from trainer import diagnostics, optim, parametrization, strategies
from trainer.config import ConfigError, structure
from trainer.distributed import local_world_size
from trainer.optim import schedule
from trainer.parametrization.rule import Case, Rule
from trainer.parametrization.scheme import Scheme
from trainer.schema import RunConfig
from trainer.strategies import deferred as initialisation


def build(config: RunConfig, *, deferred: bool = False) -> tuple[Task, Any]:
    """(task, data module) of a config, unsharded, with the data set's shapes checked; deterministic in the seed.

    `deferred`: where the strategy can, the network is on the meta device until the strategy has sharded it.

    Raises:
        ConfigError: a network that does not fit the data.
        DataError, StoreError: a data set that cannot be read.
    """
    pl.seed_everything(config.seed, verbose=False)
    _, data_class = data_registry.lookup("data", config.data.name)
    record = deferred and strategies.lookup(config.strategy.name)[1].defers_initialisation
    try:
        task = _task(config, initialisation.record if record else lambda make: make())
        data = data_class(
            config.data,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            seed=config.seed,
            overrides=task.training_window(),
        )
        task.bind(data.spec())
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ConfigError(str(error)) from error
    return task, data


def check(config: RunConfig) -> None:
    """Refuses pairs of sections that cannot work together, without data and without memory (on the meta device).

    Raises:
        ConfigError: the network does not fit the task, the task sets a field of the data otherwise, or a diagnostic
            cannot measure the network.
    """
    try:
        with torch.device("meta"):
            task = _task(config)
        defaults = {f.name: f.default for f in dataclasses.fields(config.data)}
        for name, value in task.training_window().items():
            if name in defaults and getattr(config.data, name) not in (value, defaults[name]):
                raise ValueError(f"data.{name}={getattr(config.data, name)}: the task reads {value}; leave it out")
        _check_entries(config, task)
        strategy = strategies.lookup(config.strategy.name)[1]
        strategy.check(config.strategy, task.network)
        strategy.check_run(config)
        for diagnostic in diagnostics.build(config.diagnostics.names).values():
            diagnostic.check(task)
        if config.checkpoint.best:
            names = [f"val/{name}" for name in task.metric_names()]
            if config.checkpoint.best not in names:
                raise ValueError(f"checkpoint.best={config.checkpoint.best}: validation gives {', '.join(names)}")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_entries(config: RunConfig, task: Task) -> None:
    """Refuses data whose batches have entries that the task does not read, or lack one that it needs."""
    made: dict[str, str] = config.data.entries() if hasattr(config.data, "entries") else {}
    if not made or not task.reads:
        return
    known = (*task.reads, *task.may_read)
    for entry, setting in made.items():
        if entry not in known:
            raise ValueError(
                f"data.{setting or f'name={config.data.name}'}: makes the batch entry {entry!r}, which task "
                f"{config.task.name} does not read (it reads {', '.join(known)}); "
                f"{'leave it out' if setting else 'choose other data'}"
            )
    missing = [entry for entry in task.reads if entry not in made]
    if missing:
        raise ValueError(
            f"task {config.task.name}: needs the batch entry {missing[0]!r}, but data.name={config.data.name} makes "
            f"{', '.join(made)} as it is set"
        )


def measure(config: RunConfig) -> tuple[int, int]:
    """(parameters, tokens per sample; 1 where samples are no token sequences) of a config, without data or memory."""
    with torch.device("meta"):
        task = _task(config)
    return sum(p.numel() for p in task.network.parameters()), max(1, task.tokens_per_sample())


def network_of(config: RunConfig) -> nn.Module:
    """The network that `build` gives for a config, without a task or data: the same parameters bit for bit."""
    torch.manual_seed(config.seed)
    return _network(config, *_scheme(config))


def flops_per_sample(config: RunConfig) -> int:
    """Forward and backward FLOPs of one sample by the convention of `trainer.flops`, without data or memory.

    Raises:
        ConfigError: the network cannot run without values.
    """
    from trainer.flops import count_flops

    with torch.device("meta"):
        task = _task(config)
    try:
        return count_flops(task, 1)
    except RuntimeError as error:
        raise ConfigError(str(error)) from error


def _task(config: RunConfig, made: Callable[[Callable[[], nn.Module]], nn.Module] = lambda make: make()) -> Task:
    _, task_class = model_registry.lookup("task", config.task.name)
    scheme, base = _scheme(config)  # before: what is recorded is the network alone
    return task_class(made(lambda: _network(config, scheme, base)), config.task)


def _network(config: RunConfig, scheme: Scheme, base: nn.Module | None) -> nn.Module:
    """The network with the initial values and the factors that its parametrisation gives it."""
    network: nn.Module = model_registry.lookup("model", config.model.name)[1](config.model)
    scheme.apply(network, base, _case(config))
    return network


def rules(config: RunConfig, task: Task) -> dict[str, Rule]:
    """Parameter name -> rule of the config's parametrisation, for a task whose network is not sharded yet.

    Raises:
        ConfigError: an optimiser or a network that the parametrisation has no rules for.
    """
    scheme, base = _scheme(config)
    batch = config.train.global_batch * max(1, task.tokens_per_sample())
    case = dataclasses.replace(_case(config), data=float(config.train.max_steps * batch), batch=float(batch))
    try:
        return scheme.rules(task.network, base, case)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _scheme(config: RunConfig) -> tuple[Scheme, nn.Module | None]:
    """The parametrisation, and its base model on the meta device if it needs one."""
    scheme = parametrization.lookup(config.parametrization.name)[1](config.parametrization)
    if not scheme.base:
        return scheme, None
    fields = {**dataclasses.asdict(config.model), **scheme.base}
    sizes = structure(type(config.model), fields, "parametrization.base")
    with torch.device("meta"):
        return scheme, model_registry.lookup("model", config.model.name)[1](sizes)


def _case(config: RunConfig) -> Case:
    """What the parametrisation is told of a run, but for the data that it sees."""
    return Case(family=optim.lookup(config.optim.name)[1].family, lr=config.optim.lr)


def accelerator_name(name: str) -> str:
    """`cpu` or `cuda`; `auto` takes CUDA where each process of this machine finds a device of its own.

    Raises:
        ConfigError: `cuda` with fewer devices than processes.
    """
    processes, devices = local_world_size(), torch.cuda.device_count()
    if name == "cuda" and devices < processes:
        raise ConfigError(
            f"resources.accelerator=cuda: {processes} processes on this machine, but {devices} CUDA devices; "
            "use fewer processes, cpu or auto"
        )
    return ("cuda" if 0 < processes <= devices else "cpu") if name == "auto" else name


def optimizer_and_scheduler(config: RunConfig, network: nn.Module, by_name: dict[str, Rule]) -> tuple[Any, Any]:
    """The optimiser over a network, sharded or not, by rules made before sharding; and its schedule."""
    parameters = dict(network.named_parameters())
    groups = parametrization.groups(
        parameters,
        by_name,
        lr=config.optim.lr,
        weight_decay=config.optim.weight_decay,
        eps=getattr(config.optim, "eps", None),
    )
    optimizer = optim.lookup(config.optim.name)[1](config.optim, groups)
    return optimizer, schedule.build(optimizer, max_steps=config.train.max_steps, **dataclasses.asdict(config.schedule))

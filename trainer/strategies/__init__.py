"""Strategies: how one model lies on many processes; one file each, the same code on CPU/gloo and CUDA/nccl.

A strategy is a `lightning` strategy that saves and loads through `trainer.checkpoint`, plus `prepare(network)`, which
the task calls once to make a network distributed.
"""

from typing import Any

from modules import registry

STRATEGIES = {
    "ddp": "trainer.strategies.ddp:DDP",
    "fsdp": "trainer.strategies.fsdp:FSDP",
    "deepspeed": "trainer.strategies.deepspeed:DeepSpeed",
}


def lookup(name: str) -> tuple[type, Any]:
    """Config dataclass and class of a strategy (`cls(config, checkpointer) -> lightning Strategy`)."""
    return registry.resolve(STRATEGIES, "strategy", name)


def build(config: Any, checkpointer: Any) -> Any:
    """The strategy of a `RunConfig`; its `prepare(network)` does what `config.train` asks for, too."""
    strategy = lookup(config.strategy.name)[1](config.strategy, checkpointer)
    strategy.train_config = config.train
    return strategy

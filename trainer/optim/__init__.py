"""Optimisers: one line per method, one file for each that `torch.optim` lacks."""

from typing import Any

from modules import registry

OPTIMIZERS = {
    "adamw": "trainer.optim.torch_optim:AdamW",
    "sgd": "trainer.optim.torch_optim:SGD",
    "muon": "trainer.optim.muon:Muon",
}


def lookup(name: str) -> tuple[type, Any]:
    """Config dataclass and builder (`builder(config, param_groups) -> Optimizer`) of an optimiser.

    Each group has its parameters' `role` beside what torch knows; an optimiser reads it or leaves it out. The builder's
    `family` says how steps follow gradients: `adam` (by about the rate), `sgd` (in proportion), `matrix` (as a whole).
    """
    return registry.resolve(OPTIMIZERS, "optim", name)

"""Parametrisations: rules from a tensor's role and shape to its rate, decay, initial scale and multiplier; one file each.

A rule reads roles and fans, never parameter names. Rules are computed on the unsharded network and end in optimiser
groups, initial values and factors of modules, so they are the same under every strategy.

A name is one part, or several joined by `+`, such as `mup+depth+horizon`: a rule for width, one for depth, one law for
horizon and batch; the section then has the fields of each. Without a rule for width it is the standard one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from modules import registry
from trainer.parametrization.rule import Rule
from trainer.parametrization.scheme import Scheme

PARAMETRIZATIONS = {
    "standard": "trainer.parametrization.standard:Standard",
    "ntk": "trainer.parametrization.ntk:NTK",
    "mup": "trainer.parametrization.mup:MuP",
    "depth": "trainer.parametrization.depth:Depth",
    "horizon": "trainer.parametrization.horizon:Horizon",
}


def lookup(name: str) -> tuple[type, Callable[[Any], Scheme]]:
    """Config dataclass of a parametrisation, and what makes a `Scheme` of such a config.

    Raises:
        ValueError: an unknown part, two of a kind, or depth without a rule for width over the same base model.
    """
    found = [registry.resolve(PARAMETRIZATIONS, "parametrization", part) for part in name.split("+")]
    kinds = [cls.kind for _, cls in found]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise ValueError(f"parametrization.name={name}: more than one {kind} rule; keep one")
    if "depth" in kinds and not {"mup", "ntk"} & set(name.split("+")):
        raise ValueError(f"parametrization.name={name}: depth goes with a rule over a base model, such as mup+depth")
    configs = [config for config, _ in found]
    merged = configs[0] if len(configs) == 1 else _merged(configs)
    return merged, lambda config: Scheme([cls(config) for _, cls in found], config)


def _merged(configs: list[type]) -> type:
    """A dataclass with the fields of all, and their checks."""

    def check(self: Any) -> None:
        for config in configs:
            if hasattr(config, "__post_init__"):
                config.__post_init__(self)

    # A class that another one of the list derives from would come before its heir in the order of bases.
    bases = tuple(c for c in configs if not any(c is not other and issubclass(other, c) for other in configs))
    return dataclasses.make_dataclass("Parametrization", [], bases=bases, namespace={"__post_init__": check})


def groups(
    parameters: Mapping[str, torch.nn.Parameter],
    rules: Mapping[str, Rule],
    *,
    lr: float,
    weight_decay: float,
    eps: float | None = None,
) -> list[dict[str, Any]]:
    """Optimiser groups: parameters with equal rules share one, in order of first appearance.

    Args:
        parameters: name -> parameter, sharded or not.
        rules: name -> rule, computed before sharding under the same names.
        eps: the optimiser's epsilon; None: it has none.
    """
    by_rule: dict[Rule, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rule = rules[name]
        by_rule.setdefault(dataclasses.replace(rule, init_scale=1.0, weight_factor=1.0), []).append(parameter)
    return [
        {
            "params": members,
            "lr": lr * rule.lr_scale,
            "weight_decay": weight_decay * rule.decay_scale,
            "role": rule.role,
            **({} if eps is None else {"eps": eps * rule.eps_scale}),
        }
        for rule, members in by_rule.items()
    ]

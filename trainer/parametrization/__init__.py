"""Parametrisations: rules from a tensor's role and shape to its rate, decay and initial scale; one file each.

A rule reads roles, never parameter names. Rules are computed on the unsharded network and end in optimiser groups,
so they are the same under every strategy.
"""

from collections.abc import Mapping
from typing import Any

import torch

from modules import registry
from trainer.parametrization.rule import Rule

PARAMETRIZATIONS = {
    "standard": "trainer.parametrization.standard:Standard",
}


def lookup(name: str) -> tuple[type, Any]:
    """Config dataclass and class of a parametrisation (`cls(config).rules(network) -> {parameter name: Rule}`)."""
    return registry.resolve(PARAMETRIZATIONS, "parametrization", name)


def groups(
    parameters: Mapping[str, torch.nn.Parameter], rules: Mapping[str, Rule], *, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Optimiser groups: parameters with equal rules share one, in order of first appearance.

    Args:
        parameters: name -> parameter, sharded or not.
        rules: name -> rule, computed before sharding under the same names.
    """
    by_rule: dict[Rule, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_rule.setdefault(rules[name], []).append(parameter)
    return [
        {
            "params": members,
            "lr": lr * rule.lr_scale,
            "weight_decay": weight_decay * rule.decay_scale,
            "role": rule.role,
        }
        for rule, members in by_rule.items()
    ]

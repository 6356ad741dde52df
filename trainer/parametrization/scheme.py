"""Parts put together, and held against a network and its base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from modules import scales
from modules.roles import roles
from modules.scales import Factor
from trainer.parametrization.parts import FAMILIES, Part
from trainer.parametrization.rule import Case, Growth, Rule, Setting


class Scheme:
    """A parametrisation: at most one part of each kind, in the order width, depth, law.

    Args:
        parts: in any order.
        config: the section of the run's config, with the fields of all parts.
    """

    def __init__(self, parts: Sequence[Part], config: Any) -> None:
        order = ("width", "depth", "law")
        self.parts = sorted(parts, key=lambda part: order.index(part.kind))
        self.config = config

    @property
    def base(self) -> dict[str, Any]:
        """Fields of the model that differ in the base model; empty: the rules need none."""
        return dict(getattr(self.config, "base", {}))

    def rules(self, network: nn.Module, base: nn.Module | None, case: Case) -> dict[str, Rule]:
        """Parameter name -> rule, for the unsharded `network` (its values do not matter: it may be on the meta device).

        Args:
            base: the base model; None: the network itself.
            case: its `depth` is filled in here.

        Raises:
            ValueError: an optimiser or a network that the parts have no rules for.
        """
        case = self._case(network, base, case)
        if self.base and case.family not in FAMILIES:
            raise ValueError(
                f"parametrization.name={self.config.name} has rules for adamw and sgd, not for this optimiser; use "
                "parametrization.name=standard"
            )
        found = {}
        for name, tensor in growths(network, base).items():
            rule = Rule(tensor.role)
            for part in self.parts:
                before, rule = rule.lr_scale, rule.times(part.rule(tensor, case))
                if part.kind != "law" and self._decay == "constant":
                    rule = rule.times(Rule(tensor.role, decay_scale=before / rule.lr_scale))
            if self._decay == "independent":
                rule = dataclasses.replace(rule, decay_scale=1.0 / (case.lr * rule.lr_scale))
            if tensor.role == "vector" and not self.config.decay_vectors:
                rule = dataclasses.replace(rule, decay_scale=0.0)
            found[name] = rule
        return found

    def apply(self, network: nn.Module, base: nn.Module | None, case: Case) -> None:
        """Scales the initial values of `network` and sets the factors of its modules, in place, before it is sharded."""
        rules = self.rules(network, base, case)
        case = self._case(network, base, case)
        tensors, paths = growths(network, base), _counterparts(network, base)
        with torch.no_grad():
            for name, rule in rules.items():
                if rule.init_scale != 1.0:
                    network.get_parameter(name).mul_(rule.init_scale)
                owner, _, own = name.rpartition(".")
                if rule.weight_factor == 1.0:
                    continue
                module = network.get_submodule(owner)
                if own != "weight" or "weight" not in scales.factors(module):
                    raise ValueError(f"{name}: {type(module).__name__} declares no factor on it (modules.scales)")
                scales.set_factor(module, "weight", rule.weight_factor * scales.factor(module, "weight"))
        for path, module in network.named_modules():
            for kind, value in scales.factors(module).items():
                if kind == "weight":
                    continue
                other = module if base is None else base.get_submodule(paths[path])
                setting = Setting(kind, value, scales.factors(other)[kind], tensors.get(f"{path}.weight"))
                for part in self.parts:
                    changed = part.factor(setting, case)
                    if changed is not None:
                        scales.set_factor(module, cast(Factor, kind), changed)

    @property
    def _decay(self) -> str:
        return getattr(self.config, "decay", "with_rate")

    def _case(self, network: nn.Module, base: nn.Module | None, case: Case) -> Case:
        depth = 1.0 if base is None else len(_blocks(network)) / len(_blocks(base))
        names = {part.kind for part in self.parts}
        if depth != 1.0 and "depth" not in names:
            raise ValueError(
                f"parametrization.base has another number of blocks, which {self.config.name} has no rule for: "
                f"use parametrization.name={self.config.name}+depth, or the same number"
            )
        if "depth" in names and not any("branch" in scales.factors(module) for module in network.modules()):
            raise ValueError(
                f"parametrization.name={self.config.name}: {type(network).__name__} declares no residual branches that "
                "could be scaled with depth"
            )
        return dataclasses.replace(case, depth=depth)


def growths(network: nn.Module, base: nn.Module | None) -> dict[str, Growth]:
    """Parameter name -> its growth over the base model's counterpart (over itself without one).

    Raises:
        ValueError: a matrix whose module declares no fans, or a parameter that the base model lacks.
    """
    paths = _counterparts(network, base)
    repeated = {id(p) for block in _blocks(network) for p in block.parameters()} if base is not None else set()
    found = {}
    for name, role in roles(network).items():
        if base is None:
            found[name] = Growth(role)
            continue
        owner, _, own = name.rpartition(".")
        module, other = network.get_submodule(owner), base.get_submodule(paths[owner])
        (fan_in, fan_out), (base_in, base_out) = _fans(module, own, name, role), _fans(other, own, name, role)
        std, base_std = scales.initial_std(module, own), scales.initial_std(other, own)
        found[name] = Growth(
            role,
            fan_in / base_in,
            fan_out / base_out,
            1.0 if std is None or base_std is None else std / base_std,
            id(network.get_parameter(name)) in repeated,
        )
    return found


def _fans(module: nn.Module, own: str, name: str, role: str) -> tuple[int, int]:
    if role == "vector":
        return 1, module.get_parameter(own).numel()
    declared = scales.fans(module, own)
    if declared is None:
        raise ValueError(
            f"{name}: {type(module).__name__} declares no fans; call modules.scales.declare_fans(self, {own}=(in, out))"
        )
    return declared


def _counterparts(network: nn.Module, base: nn.Module | None) -> Mapping[str, str]:
    """Path of each module -> that of the same module of the base model; of blocks that it lacks, its last one."""
    if base is None:
        return {path: path for path, _ in network.named_modules()}
    known = {path for path, _ in base.named_modules()}
    own, others = _block_paths(network), _block_paths(base)
    found = {}
    for path, _ in network.named_modules():
        block = next((b for b in own if path == b or path.startswith(b + ".")), None)
        there = path
        if block is not None:
            there = others[min(own.index(block), len(others) - 1)] + path[len(block) :]
        if there not in known:
            raise ValueError(f"parametrization.base: the base model has no {path}; only its sizes may differ")
        found[path] = there
    return found


def _block_paths(network: nn.Module) -> list[str]:
    position = {id(block): index for index, block in enumerate(_blocks(network))}
    found = {position[id(m)]: path for path, m in network.named_modules() if id(m) in position}
    return [found[index] for index in range(len(found))]


def _blocks(network: nn.Module) -> list[nn.Module]:
    return list(network.blocks())  # type: ignore[operator]

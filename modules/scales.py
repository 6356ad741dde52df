"""What modules say of the size of their tensors, and the factors by which a parametrisation may scale what they compute.

Declared beside the role (`modules.roles`): the fans of each matrix, the standard deviation with which it starts, and
factors, which are one, or what the module's own formula has, until a parametrisation sets them before training:

- `weight`: the module computes with this times its weight;
- `score`: the same where a token table is used a second time, as the readout;
- `attention`: what scores q.k are multiplied by;
- `branch`: what each residual branch is multiplied by before it is added.

All of it lies on the modules and so survives whatever replaces their parameters (sharding, loading).
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

Factor = Literal["weight", "score", "attention", "branch"]

_FANS = "_keel_fans"
_STDS = "_keel_stds"
_FACTORS = "_keel_factors"


def declare_fans(module: nn.Module, **parameters: tuple[int, int]) -> None:
    """Record (fan-in, fan-out) of `module`'s own matrices: the features that each output is a sum over, and outputs.

    A token table has fan-in 1: one row is read. Raises ValueError for a name that the module does not own.
    """
    for name in parameters:
        if name not in module._parameters:
            raise ValueError(f"{type(module).__name__}.{name}: fans were declared, but no such parameter is registered")
    module.__dict__.setdefault(_FANS, {}).update(parameters)


def declare_factors(module: nn.Module, **factors: float) -> None:
    """Record the factors that `module` applies, with their own values. Raises ValueError for an unknown kind."""
    for kind in factors:
        if kind not in get_args(Factor):
            raise ValueError(f"{type(module).__name__}: factor {kind}: choose one of {', '.join(get_args(Factor))}")
    module.__dict__.setdefault(_FACTORS, {}).update(factors)


def factors(module: nn.Module) -> dict[str, float]:
    """The factors of `module` itself by kind; empty where it declares none."""
    return dict(module.__dict__.get(_FACTORS, {}))


def set_factor(module: nn.Module, kind: Factor, value: float) -> None:
    """Changes a declared factor. Raises ValueError for one that the module does not have."""
    if kind not in module.__dict__.get(_FACTORS, {}):
        raise ValueError(f"{type(module).__name__} has no factor {kind}")
    module.__dict__[_FACTORS][kind] = value


def factor(module: nn.Module, kind: Factor) -> float:
    """A factor that `module` has declared, as it is now."""
    value: float = module.__dict__[_FACTORS][kind]
    return value


def scaled(x: Tensor, module: nn.Module, kind: Factor) -> Tensor:
    """`x` times a factor of `module`; a factor of one costs nothing and changes no bit."""
    value = factor(module, kind)
    return x if value == 1.0 else x * value


def fans(module: nn.Module, name: str) -> tuple[int, int] | None:
    """(fan-in, fan-out) of an own matrix; None: not declared."""
    found: tuple[int, int] | None = module.__dict__.get(_FANS, {}).get(name)
    return found


def initial_std(module: nn.Module, name: str) -> float | None:
    """Standard deviation of an own parameter's initial values; None: they are constant."""
    found: float | None = module.__dict__.get(_STDS, {}).get(name)
    return found


def normal_(module: nn.Module, name: str, std: float) -> None:
    """Fills an own parameter with normal numbers, and records their standard deviation."""
    nn.init.normal_(module.get_parameter(name), std=std)
    module.__dict__.setdefault(_STDS, {})[name] = std


def uniform_(module: nn.Module, name: str, bound: float) -> None:
    """Fills an own parameter with uniform numbers from -bound to bound, and records their standard deviation."""
    nn.init.uniform_(module.get_parameter(name), -bound, bound)
    module.__dict__.setdefault(_STDS, {})[name] = bound / 3**0.5

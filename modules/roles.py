"""What a parameter is for, said by the module that owns it.

Rules that set an initial scale, a learning rate or a multiplier from width and depth read roles, never names or shapes:

- `embedding`: maps an input of fixed size to the width (token table, lifting);
- `hidden`: maps width to width, both grow with the model;
- `readout`: maps the width to an output of fixed size;
- `vector`: one number per unit (gains, biases, gates);
- `spectral`: a matrix per Fourier mode, stored as real pairs.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

Role = Literal["embedding", "hidden", "readout", "vector", "spectral"]

_ATTRIBUTE = "_keel_roles"


def declare(module: nn.Module, **parameters: Role) -> None:
    """Record the role of `module`'s own parameters, by local name, e.g. `declare(self, weight="hidden", bias="vector")`.

    The record lives on the module, so it survives whatever replaces the parameter objects (sharding, loading). A
    parameter registered as None (an absent bias) may be declared. Raises ValueError for a name that the module does not
    own or an unknown role.
    """
    for name, role in parameters.items():
        if name not in module._parameters:
            raise ValueError(
                f"{type(module).__name__}.{name}: a role was declared, but no such parameter is registered"
            )
        if role not in get_args(Role):
            raise ValueError(f"{type(module).__name__}.{name}: role={role}: choose one of {', '.join(get_args(Role))}")
    module.__dict__.setdefault(_ATTRIBUTE, {}).update(parameters)


def roles(network: nn.Module) -> dict[str, Role]:
    """Role of each parameter by its qualified name, in the order of `named_parameters()`.

    A shared parameter is reported once, under its first name. Raises ValueError that names a parameter without a role.
    """
    found: dict[str, Role] = {}
    seen: set[int] = set()
    for prefix, module in network.named_modules():
        declared: dict[str, Role] = module.__dict__.get(_ATTRIBUTE, {})
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            path = f"{prefix}.{name}" if prefix else name
            if name not in declared:
                raise ValueError(
                    f"{path}: parameter of {type(module).__name__} has no role; "
                    f"call modules.roles.declare(self, {name}=...) where the module creates it"
                )
            found[path] = declared[name]
    return found

"""The variants that a run can name: one line per network, one line per task.

A line maps the name used in configs to `package.module:Class`; the class is imported only when it is looked up, and its
class attribute `config_class` is the dataclass that it is built from.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["model", "task"]

MODELS: dict[str, str] = {
    "fno": "modules.operators.fno:FNO",
    "transformer": "modules.language.transformer:Transformer",
}

TASKS: dict[str, str] = {
    "field_rollout": "modules.tasks.field_rollout:FieldRollout",
    "next_token": "modules.tasks.next_token:NextToken",
}

_TABLES: dict[str, dict[str, str]] = {"model": MODELS, "task": TASKS}


def names(kind: Kind) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(_table(kind))


def lookup(kind: Kind, name: str) -> tuple[type[Any], type[Any]]:
    """The (config dataclass, class) registered under `name`. Raises ValueError for an unknown kind or name."""
    return resolve(_table(kind), kind, name)


def resolve(table: Mapping[str, str], kind: str, name: str) -> tuple[type[Any], Any]:
    """What `table` holds under `name`, imported: (its `config_class`, itself). Raises ValueError, naming near names."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(table))}"
        raise ValueError(f"{kind}.name={name}: no such {kind}; {hint}")
    module, _, attribute = table[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    return cls.config_class, cls


def _table(kind: str) -> dict[str, str]:
    if kind not in _TABLES:
        raise ValueError(f"kind={kind}: the registry holds {' and '.join(_TABLES)}")
    return _TABLES[kind]

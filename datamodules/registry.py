"""What a config can name: one line per kind of data set that is streamed, one line per generator that writes one.

A line maps a name to `package.module:Class`, imported when it is looked up; the class attribute `config_class` is its
config dataclass.
"""

import difflib
import importlib
from typing import Any, Literal

DATA: dict[str, str] = {
    "fields": "datamodules.data:FieldsData",
    "text": "datamodules.data:TextData",
}

GENERATORS: dict[str, str] = {
    "navier_stokes_2d": "datamodules.simulators.navier_stokes_2d:NavierStokes2D",
    "stdlib_text": "datamodules.text:StdlibText",
}

_TABLES = {"data": DATA, "generator": GENERATORS}


def lookup(kind: Literal["data", "generator"], name: str) -> tuple[type[Any], type[Any]]:
    """The (config dataclass, class) registered under `name`. Raises ValueError naming the nearest valid names."""
    table = _TABLES[kind]
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(table))}"
        raise ValueError(f"{kind}.name={name}: no such {kind}; {hint}")
    module, _, attribute = table[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    return cls.config_class, cls


def names(kind: Literal["data", "generator"]) -> list[str]:
    """The registered names of a kind, sorted."""
    return sorted(_TABLES[kind])

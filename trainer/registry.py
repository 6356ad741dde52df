"""Lazy look-up of registered parts: name -> "package.module:Class", whose `config_class` is its config dataclass."""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any


def lookup(table: Mapping[str, str], name: str) -> tuple[type, Any]:
    """The config dataclass and the class registered under `name`.

    Raises:
        ValueError: no such name; the message gives the nearest valid one.
    """
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise ValueError(f"unknown name '{name}': {hint}valid: {', '.join(sorted(table))}")
    module, _, attribute = table[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    return cls.config_class, cls

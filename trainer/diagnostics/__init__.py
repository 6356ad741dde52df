"""Stability diagnostics: what is measured on every k-th step, one per file.

A diagnostic costs nothing on the other steps: it is attached before the first micro-batch of a step that is to be
measured and detached after it. Names map to `module:Class`, loaded when asked for.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.diagnostics.base import Diagnostic

DIAGNOSTICS: dict[str, str] = {
    "activations": "trainer.diagnostics.activations:Activations",
    "gradients": "trainer.diagnostics.gradients:Gradients",
    "logits": "trainer.diagnostics.logits:Logits",
    "spectrum": "trainer.diagnostics.spectrum:Spectrum",
    "updates": "trainer.diagnostics.updates:Updates",
}


def build(names: Sequence[str]) -> dict[str, Diagnostic]:
    """One fresh diagnostic per name. Raises ValueError for an unknown name, with the nearest valid ones."""
    found: dict[str, Diagnostic] = {}
    for name in names:
        if name not in DIAGNOSTICS:
            near = difflib.get_close_matches(name, DIAGNOSTICS, n=2) or sorted(DIAGNOSTICS)
            raise ValueError(f"diagnostics.names: {name!r} is unknown; did you mean {' or '.join(near)}?")
        module, _, attribute = DIAGNOSTICS[name].partition(":")
        found[name] = getattr(importlib.import_module(module), attribute)()
    return found

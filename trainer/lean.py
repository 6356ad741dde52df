"""Spares every process of a run the import of scipy and matplotlib, a quarter of the time that its imports take.

Lightning imports torchmetrics for its base class, and torchmetrics imports both of them, where they are installed, for
plots and for scores of audio. While it is imported it is told that they are not. What imports torchmetrics before
`trainer` gets all of it.
"""

import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_NAME, _WITHOUT = "torchmetrics", ("scipy", "matplotlib")


class _Loader(importlib.abc.Loader):
    """Runs the package as its own loader does, without the two."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        imports: Any = importlib.import_module("lightning_utilities.core.imports")

        met, present = imports.RequirementCache.__bool__, imports.package_available

        def there(requirement: Any) -> bool:
            return bool(not str(requirement.requirement or "").startswith(_WITHOUT) and met(requirement))

        imports.RequirementCache.__bool__ = there
        imports.package_available = lambda name: name not in _WITHOUT and present(name)
        _finder.done = True
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        try:
            self.loader.exec_module(module)
            # A plot that is asked for later then says what it lacks, and does not fail on a name.
            flags = sys.modules.get(f"{_NAME}.utilities.imports")
            if (flag := getattr(flags, "_MATPLOTLIB_AVAILABLE", None)) is not None:
                flag.available = False
        finally:
            imports.RequirementCache.__bool__ = met
            imports.package_available = present


class _Finder(importlib.abc.MetaPathFinder):
    done = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _NAME or self.done:
            return None
        self.done = True
        try:
            found = importlib.util.find_spec(name)
        finally:
            self.done = False
        if found is not None and found.loader is not None:
            found.loader = _Loader(found.loader)
        return found


_finder = _Finder()


def install() -> None:
    """From now on, once."""
    if _NAME not in sys.modules and _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)

"""Runs a function right after a module of torch's is imported, without importing it where nobody has yet."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module the usual way, once, and has `then` run right after it is executed."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, then: Callable[[ModuleType], None]) -> None:
    """Has `then(module)` run after the module of that name is imported: now, if it has been.

    Args:
        name: of the module.
        then: takes the module. It runs once more for each import of this package.
    """

    def waits(finder: object) -> bool:
        # Not isinstance: the class may have been imported anew since.
        return type(finder).__name__ == _AfterImport.__name__ and getattr(finder, "name", None) == name

    if name in sys.modules:
        then(sys.modules[name])
    elif not any(waits(finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, then))

"""Python imports this by itself when its folder is on the path: it plants the bug that PLANTED_BUG names.

Nothing in the product knows of it. A bug replaces a function where the product really calls it, in every process of the
run, right after the module that holds the function has been imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType


class _Loader(importlib.abc.Loader):
    """Runs a module as its own loader would, then spoils it."""

    def __init__(self, loader: importlib.abc.Loader, spoil: Callable[[ModuleType], None]) -> None:
        self._loader, self._spoil = loader, spoil

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._spoil(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loader of one module."""

    def __init__(self, target: str, spoil: Callable[[ModuleType], None]) -> None:
        self._target, self._spoil = target, spoil

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._target:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._spoil)  # type: ignore[arg-type]
        return spec


if bug := os.environ.get("PLANTED_BUG"):
    from planted_bugs import BUGS

    module, plant = BUGS[bug]
    sys.meta_path.insert(0, _Finder(module, plant))

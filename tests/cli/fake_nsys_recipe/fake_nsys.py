"""A stand-in for ``nsys recipe``: finds a recipe by the folders of NSYS_RECIPE_PATH and runs it.

With FAKE_NSYS_ONLY, modules of other origin than Python, pandas and numpy cannot be imported, as in nsys's own Python.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

_THERE = {"numpy", "pandas", "dateutil", "six", "pytz", "tzdata", "nsys_recipe", "fake_nsys", "eplb_overlap"}
"""Pandas and what it stands on."""


class _Context:
    """Calls one after the other; what would go to another process must be able to."""

    def map(self, function: Callable[..., Any], values: Iterable[Any], **kwargs: Any) -> list[Any]:
        """Start a call for each value."""
        there = pickle.loads(pickle.dumps((function, kwargs)))
        return [pickle.loads(pickle.dumps(there[0](value, **there[1]))) for value in values]

    def wait(self, started: list[Any]) -> list[Any]:
        """What the calls gave."""
        return started


class _NothingElse(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Refuse, or leave it to the others. Our own packages must have been put there by the recipe itself."""
        top = fullname.partition(".")[0]
        ours = top in ("moe_eplb", "eplbctl") and top in sys.modules
        standard = top in sys.stdlib_module_names or top.startswith("_sysconfigdata")
        if not (ours or standard or top in _THERE):
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def main(arguments: list[str]) -> int:
    """``--version``, or ``recipe NAME ...``."""
    if arguments == ["--version"]:
        print("NVIDIA Nsight Systems version 2025.3.1.90-253135822126v0")
        return 0
    assert arguments[0] == "recipe", arguments
    if os.environ.get("FAKE_NSYS_ONLY"):
        sys.meta_path.insert(0, _NothingElse())
    return run(arguments[1], arguments[2:])


def run(name: str, arguments: list[str]) -> int:
    """One recipe."""
    from nsys_recipe.lib.recipe import Recipe

    folders = [Path(folder) / name for folder in os.environ.get("NSYS_RECIPE_PATH", "").split(os.pathsep) if folder]
    folder = next((folder for folder in folders if (folder / "metadata.json").is_file()), None)
    if folder is None:
        print(f"Unknown recipe: {name}", file=sys.stderr)
        return 1
    metadata = json.loads((folder / "metadata.json").read_text())
    assert metadata["display_name"]
    assert "".join(metadata["description"])
    sys.path.insert(0, str(folder))
    module = importlib.import_module(metadata["module_name"])
    found = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Recipe)]
    assert len(found) == 1, found
    found[0](name, found[0].get_argument_parser().parse_args(arguments)).run(_Context())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Arguments of recipes."""

from __future__ import annotations

import argparse
import enum
from typing import Any


class Option(enum.Enum):
    """Arguments that recipes have in common; every recipe has the last two."""

    INPUT = ("--input",)
    CSV = ("--csv",)
    OUTPUT = ("--output",)
    FORCE_OVERWRITE = ("--force-overwrite",)


_HOW: dict[Option, dict[str, Any]] = {
    Option.INPUT: {"nargs": "+"},
    Option.CSV: {"action": "store_true"},
    Option.OUTPUT: {},
    Option.FORCE_OVERWRITE: {"action": "store_true"},
}


class ArgumentParser(argparse.ArgumentParser):
    """Adds arguments by option or by name."""

    def add_recipe_argument(self, option: Option | str, *args: Any, **kwargs: Any) -> None:
        """An option of all recipes, or one of this recipe's own; an option twice is an error."""
        if isinstance(option, Option):
            self.add_argument(*option.value, **(_HOW[option] | kwargs))
        else:
            self.add_argument(option, *args, **kwargs)

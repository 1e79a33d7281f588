"""Options that several commands share, and where their output goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from eplbctl.output import say
from moe_eplb.core.errors import UsageError

__all__ = ["Destination", "format_option", "output_options", "overrides_option", "refuse_existing"]

Function = Callable[..., Any]


@dataclass(frozen=True)
class Destination:
    """A file, or stdout when there is no path."""

    path: Path | None

    def write(self, text: str) -> None:
        """Write the text with exactly one newline at its end."""
        text = text.rstrip("\n")
        if self.path is not None:
            self.path.write_text(text + "\n", encoding="utf-8")
        else:
            say(text)


def refuse_existing(path: Path, *, force: bool) -> None:
    """Raise UsageError unless `path` may be written: it must be free, or `force` given, and its folder must exist."""
    if path.is_dir():
        raise UsageError("E002", f"{path} is a folder", hint="give the path of a file")
    if path.exists() and not force:
        raise UsageError("E002", f"{path} exists already", hint="use --force to overwrite it, or choose another name")
    if not path.parent.is_dir():
        raise UsageError("E004", f"there is no folder {path.parent} to write {path.name} to", hint="make it first")


def output_options(function: Function) -> Function:
    """Add ``-o/--output`` and ``--force``; the command gets a `Destination` that was checked before it started."""

    @click.option("-o", "--output", type=click.Path(path_type=Path), help="Write to this file instead of stdout.")
    @click.option("--force", is_flag=True, help="Overwrite the output file if it exists.")
    @functools.wraps(function)
    def wrapper(*args: Any, output: Path | None, force: bool, **kwargs: Any) -> Any:
        if output is not None:
            refuse_existing(output, force=force)
        return function(*args, destination=Destination(output), **kwargs)

    return wrapper


def format_option(*choices: str) -> Callable[[Function], Function]:
    """Add ``--format`` with these choices; the first is the default."""
    kind = click.Choice(choices)
    return click.option(
        "--format", "form", type=kind, default=choices[0], show_default=True, help="Form of the output."
    )


def overrides_option(function: Function) -> Function:
    """Add ``--set key=value``, repeatable."""
    text = "Change one value of the scenario, such as model.layers=2. Repeatable."
    return click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help=text)(function)

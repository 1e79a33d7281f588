"""Options that several commands share, and where their output goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from eplbctl.output import require_writable, say, write_file
from moe_eplb.core.errors import UsageError

__all__ = ["PATH", "Destination", "format_option", "output_options", "overrides_option", "recorder_option"]

Function = Callable[..., Any]


class _Path(click.Path):
    """A path that is not empty: `Path("")` would be the current folder, and all that is in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            name = param.human_readable_name if param is not None else "a path"
            raise UsageError("E013", f"{name} is empty", hint="is a variable of the shell unset?")
        return super().convert(value, param, ctx)


PATH = _Path(path_type=Path)


@dataclass(frozen=True)
class Destination:
    """A file, or stdout when there is no path."""

    path: Path | None

    def write(self, text: str) -> None:
        """Write the text with exactly one newline at its end."""
        text = text.rstrip("\n")
        if self.path is not None:
            write_file(self.path, text + "\n")
        else:
            say(text)


def output_options(function: Function) -> Function:
    """Add ``-o/--output`` and ``--force``; the command gets a `Destination` that was checked before it started."""

    @click.option("-o", "--output", type=PATH, help="Write to this file instead of stdout.")
    @click.option("--force", is_flag=True, help="Overwrite the output file if it exists.")
    @functools.wraps(function)
    def wrapper(*args: Any, output: Path | None, force: bool, **kwargs: Any) -> Any:
        if output is not None:
            require_writable(output, force=force)
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


def recorder_option(function: Function) -> Function:
    """Add ``--recorder``; without it the scenario says what records."""
    choice = click.Choice(("builtin", "torch", "nsys"))
    text = "Short for --set record.recorder=NAME: the torch profiler, or Nsight Systems, beside our own event log."
    return click.option("--recorder", type=choice, help=text)(function)

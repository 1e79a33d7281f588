"""``eplbctl nsys``: the recipe that says within Nsight Systems what ``eplbctl report`` says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from eplbctl.output import say
from moe_eplb.core.errors import UsageError

__all__ = ["command"]

_RECIPES = Path(__file__).resolve().parents[1] / "nsys_recipes"
_RECIPE = "eplb_overlap"
_VARIABLE = "NSYS_RECIPE_PATH"


@click.group()
def command() -> None:
    """Use the recipe eplb_overlap of Nsight Systems."""


@command.command("recipe-path")
def recipe_path() -> None:
    """Print the folder in which nsys finds the recipe, for its variable NSYS_RECIPE_PATH.

    \b
    Example:
      NSYS_RECIPE_PATH=$(eplbctl nsys recipe-path) nsys recipe eplb_overlap --input rank0.nsys-rep
    """
    say(str(_RECIPES))


@command.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[ARGUMENT]...")
def recipe(arguments: tuple[str, ...]) -> NoReturn:
    """Run the recipe: nsys recipe eplb_overlap ARGUMENT..., whose exit code is that of nsys.

    It writes the figures of `eplbctl report` for each report of Nsight Systems into a folder, as CSV and, where pandas
    can, as Parquet. What else it takes: eplbctl nsys recipe -- --help

    \b
    Examples:
      eplbctl nsys recipe --input rank0.nsys-rep rank1.nsys-rep
      eplbctl nsys recipe --input reports/ --output overlap
    """
    from moe_eplb.recording import nsys_tool

    try:
        program = str(nsys_tool.find().path)
    except UsageError as error:
        raise UsageError(
            "E079", "the recipe runs in Nsight Systems, and none that runs was found", why=error.why or error.what,
            hint="export the report where nsys runs (nsys export --type sqlite), then: eplbctl report FILE.sqlite",
        ) from error  # fmt: skip
    # Its own folders stay known: a user may have recipes of their own.
    folders = os.pathsep.join(filter(None, (str(_RECIPES), os.environ.get(_VARIABLE))))
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(program, [program, "recipe", _RECIPE, *arguments], {**os.environ, _VARIABLE: folders})
    except OSError as error:
        why = f"{program}: {error.strerror or error}"
        raise UsageError("E079", "nsys could not be started", why=why) from error

"""``eplbctl protocol``: the legal order of the balancer's calls, printed and searched."""

from __future__ import annotations

import click

from eplbctl.options import Destination, format_option, output_options
from moe_eplb.core.errors import ExitCode

__all__ = ["command"]


@click.group()
def command() -> None:
    """Show and search the legal order of the balancer's calls."""


@command.command()
@format_option("text", "json", "markdown")
@output_options
def show(form: str, destination: Destination) -> None:
    """Print what each call needs, and the error when it is missing.

    This is the table that the running balancer asserts and that recorded traces are judged by.
    """
    from eplbctl.render import protocol as render

    destination.write({"text": render.text, "markdown": render.markdown, "json": render.json_text}[form]())


@command.command()
@click.option("--layers", type=click.IntRange(1, 8), default=2, show_default=True, help="Layers of the model searched.")
@format_option("text", "json")
@output_options
def explore(layers: int, form: str, destination: Destination) -> ExitCode:
    """Search every sequence of calls, and print the shortest way to each violation.

    Exit code 1 if there is a state without a legal call or without a way back to the start, or a rule that no sequence
    can break.
    """
    from eplbctl.render import exploration as render
    from moe_eplb.core import explore as search

    found = render.Searches(
        {
            "layer, dynamic routing": search.explore(dynamic=True),
            "layer, static routing": search.explore(dynamic=False),
            f"iterations, {layers} layers": search.explore_iterations(layers=layers),
        }
    )
    destination.write(render.json_text(found) if form == "json" else render.text(found))
    return ExitCode.VALID if found.sound else ExitCode.INVALID

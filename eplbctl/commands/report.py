"""``eplbctl report``: what a finished run spent its time on, what moved, and what it brought."""

from __future__ import annotations

from pathlib import Path

import click

from eplbctl.options import PATH, Destination, format_option, output_options
from moe_eplb.core.errors import TraceError

__all__ = ["command"]


@click.command()
@click.argument("run", type=PATH)
@format_option("text", "json", "markdown")
@output_options
def command(run: Path, form: str, destination: Destination) -> None:
    """Print the tables of a run folder: stages, moves, balancedness, overlap, first violation.

    RUN is a run folder. It needs neither the machine of the run nor torch.

    \b
    Examples:
      eplbctl report runs/quickstart-20260102T030405Z
      eplbctl report runs/quickstart-20260102T030405Z --format markdown -o report.md
    """
    from eplbctl.render import report as render
    from moe_eplb.analysis import run_folder, stages

    folder = run_folder.load(run)
    try:
        made = stages.make_report(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(
            "E058", "the evidence does not add up to a report", why=f"{type(error).__name__}: {error}", where=str(run),
            hint=f"judge it instead: eplbctl verify {run}",
        ) from error  # fmt: skip
    if form == "json":
        destination.write(render.json_text(made))
    elif form == "markdown":
        destination.write(render.markdown(made, f"{folder.scenario.name}: {run.name}"))
    else:
        destination.write(render.text(made))

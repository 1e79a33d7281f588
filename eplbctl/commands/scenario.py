"""``eplbctl scenario``: write, check, show and list scenario files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import PATH, Destination, FiniteRange, format_option, output_options, overrides_option
from eplbctl.output import require_writable, say, write_file
from eplbctl.targets import Target, load_all, select, targets
from moe_eplb.core.errors import UsageError

if TYPE_CHECKING:
    from eplbctl.render.memory import Checked
    from moe_eplb.core.scenario import Scenario

__all__ = ["TEMPLATES", "command"]

TEMPLATES = ("balance", "static", "calls")


@click.group()
def command() -> None:
    """Write, check, show and list scenario files."""


@command.command()
@click.argument("path", type=PATH, default=Path("scenario.yaml"))
@click.option(
    "--template", type=click.Choice(TEMPLATES), default=TEMPLATES[0], show_default=True, help="What to start from."
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def init(path: Path, template: str, force: bool) -> None:
    """Write a scenario to start from; PATH is scenario.yaml by default."""
    require_writable(path, force=force)
    text = resources.files("eplbctl").joinpath("templates", f"{template}.yaml").read_text(encoding="utf-8")
    write_file(path, text)
    say(f"wrote {path}")
    say(f"next: eplbctl run {path}", err=True)


@command.command()
@click.argument("paths", nargs=-1, required=True, type=PATH, metavar="PATH...")
@overrides_option
@click.option(
    "--bandwidth", type=FiniteRange(0, min_open=True), default=55.0, show_default=True, metavar="GB/S",
    help="Assumed speed of a move; by default that of pinned host memory to an H200 over PCIe 5.",
)  # fmt: skip
@click.option("--step-ms", type=FiniteRange(0, min_open=True), help="Assumed time of an iteration, to judge moves by.")
@format_option("text", "json")
@output_options
def check(
    paths: tuple[Path, ...],
    overrides: tuple[str, ...],
    bandwidth: float,
    step_ms: float | None,
    form: str,
    destination: Destination,
) -> None:
    """Check scenario files, or folders of them, without running anything.

    Says what each takes: memory of a rank and of the node, what an update copies, and whether that is hidden between
    two uses of a layer. One scenario is told in detail, several have a line each.
    """
    from eplbctl.render import memory as render

    chosen = _files(paths)
    checked = _checked(chosen, load_all(chosen, overrides), bandwidth, step_ms)
    if form == "json":
        destination.write(render.json_text(checked, bandwidth_gb_s=bandwidth, step_ms=step_ms))
    else:
        destination.write(render.details(checked[0]) if len(checked) == 1 else render.lines(checked))


@command.command()
@click.argument("path", type=PATH)
@overrides_option
@output_options
def show(path: Path, overrides: tuple[str, ...], destination: Destination) -> None:
    """Print a scenario with every default and every --set filled in."""
    from moe_eplb.core import scenario

    chosen = select(targets([path]), (), ())
    if len(chosen) > 1:
        raise UsageError("E008", f"{path} holds {len(chosen)} scenarios", hint=f"give one, such as {chosen[0].path}")
    (loaded,) = load_all(chosen, overrides)
    destination.write(scenario.dump(loaded))


@command.command("list")
@click.argument("paths", nargs=-1, type=PATH, metavar="[PATH]...")
@format_option("text", "json")
@output_options
def list_(paths: tuple[Path, ...], form: str, destination: Destination) -> None:
    """List scenarios and what each proves; PATH is scenarios/ by default."""
    from eplbctl.render.text import table

    chosen = _files(paths or (Path("scenarios"),))
    headers = ("name", "ranks", "iterations", "balancer", "description", "path")
    rows = [
        (s.name, s.ranks, s.iterations, "off" if s.balancer_off_reason() else "on", s.description, str(target.path))
        for target, s in zip(chosen, load_all(chosen), strict=True)
    ]
    if form == "json":
        destination.write(json.dumps([dict(zip(headers, row, strict=True)) for row in rows], indent=2))
    else:
        destination.write(table(headers[:-1], [row[:-1] for row in rows]))


@command.command()
@output_options
def schema(destination: Destination) -> None:
    """Print the JSON Schema of a scenario file, for editors and CI."""
    from moe_eplb.core import scenario

    destination.write(json.dumps(scenario.json_schema(), indent=2))


def _files(paths: tuple[Path, ...]) -> list[Target]:
    return select([target for target in targets(paths) if not target.finished], (), ())


def _checked(
    chosen: Sequence[Target], loaded: Sequence[Scenario], bandwidth: float, step_ms: float | None
) -> list[Checked]:
    from eplbctl.render.memory import Checked
    from moe_eplb.balancer.host_memory import SHM_DIR
    from moe_eplb.core.memory import memory_of, move_time

    stat = os.statvfs(SHM_DIR)
    made = []
    for target, scenario in zip(chosen, loaded, strict=True):
        memory = memory_of(scenario)
        move = move_time(memory, bandwidth_gb_s=bandwidth, step_ms=step_ms)
        made.append(Checked(str(target.path), scenario, memory, move, stat.f_bavail * stat.f_frsize))
    return made

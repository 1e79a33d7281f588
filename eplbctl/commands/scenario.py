"""``eplbctl scenario``: write, check, show and list scenario files."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import click

from eplbctl.options import Destination, format_option, output_options, overrides_option, refuse_existing
from eplbctl.output import say
from eplbctl.targets import Target, load_all, select, targets
from moe_eplb.core.errors import UsageError

__all__ = ["TEMPLATES", "command"]

TEMPLATES = ("balance", "static", "calls")


@click.group()
def command() -> None:
    """Write, check, show and list scenario files."""


@command.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("scenario.yaml"))
@click.option(
    "--template", type=click.Choice(TEMPLATES), default=TEMPLATES[0], show_default=True, help="What to start from."
)
@click.option("--force", is_flag=True, help="Overwrite the file if it exists.")
def init(path: Path, template: str, force: bool) -> None:
    """Write a scenario to start from; PATH is scenario.yaml by default."""
    refuse_existing(path, force=force)
    text = resources.files("eplbctl").joinpath("templates", f"{template}.yaml").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    say(f"wrote {path}")
    say(f"next: eplbctl run {path}", err=True)


@command.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH...")
@overrides_option
def check(paths: tuple[Path, ...], overrides: tuple[str, ...]) -> None:
    """Check scenario files, or folders of them, without running anything."""
    chosen = _files(paths)
    loaded = load_all(chosen, overrides)
    for target, scenario in zip(chosen, loaded, strict=True):
        reason = scenario.balancer_off_reason()
        say(f"{target.path}: good" + (f" (balancer: off, because {reason})" if reason else ""))


@command.command()
@click.argument("path", type=click.Path(path_type=Path))
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
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[PATH]...")
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

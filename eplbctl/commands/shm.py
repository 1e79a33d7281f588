"""``eplbctl shm``: the shared host memory that runs use, and what crashed runs left of it."""

from __future__ import annotations

import click

from eplbctl.output import say

__all__ = ["command"]


@click.group()
def command() -> None:
    """List and remove shared memory segments of runs."""


@command.command("list")
def list_() -> None:
    """List the segments on this node; a stale one belongs to a process that has ended."""
    from eplbctl.render.text import table
    from moe_eplb.balancer.host_memory import list_segments

    rows = [(s.name, f"{s.bytes:,}", s.owner_pid, "in use" if s.alive else "stale") for s in list_segments()]
    if not rows:
        say("no segments")
        return
    say(table(("segment", "bytes", "owner", "state"), rows))
    if any(row[-1] == "stale" for row in rows):
        say("next: eplbctl shm clean", err=True)


@command.command()
@click.option("--all", "include_alive", is_flag=True, help="Remove segments in use too: their runs will fail.")
def clean(include_alive: bool) -> None:
    """Remove stale segments."""
    from moe_eplb.balancer.host_memory import clean_segments

    removed = clean_segments(include_alive=include_alive)
    for segment in removed:
        say(f"removed {segment.name} ({segment.bytes:,} bytes)")
    if not removed:
        say("nothing to remove")

"""Lines for people. A reader that leaves early (head, a closed pager) is no error and changes no exit code."""

from __future__ import annotations

import os
import sys

import click

__all__ = ["say"]


def say(text: str, *, err: bool = False) -> None:
    """Print a line to stdout, or to stderr; once the reader has gone, the stream's later lines go nowhere."""
    try:
        click.echo(text, err=err)
    except BrokenPipeError:
        gone = sys.stderr if err else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), gone.fileno())

"""``eplbctl completion``: the script that teaches a shell to complete eplbctl's commands and options."""

from __future__ import annotations

import click

from eplbctl.output import say

__all__ = ["command"]


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    Examples:
      eval "$(eplbctl completion bash)"
      eplbctl completion fish > ~/.config/fish/completions/eplbctl.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, "the choices are click's own shells"
    say(kind(ctx.find_root().command, {}, "eplbctl", "_EPLBCTL_COMPLETE").source())

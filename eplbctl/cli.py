"""The group of all commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Sequence

import click

from eplbctl.output import say
from moe_eplb.core.errors import EXIT_MEANING, EplbError, ExitCode, RunFailed, UsageError

__all__ = ["COMMANDS", "cli", "invoke"]

COMMANDS = (
    "run",
    "verify",
    "report",
    "compare",
    "trace",
    "nsys",
    "bench",
    "plan",
    "replay",
    "convert",
    "scenario",
    "protocol",
    "doctor",
    "shm",
    "completion",
)
"""The commands in the order in which a new user meets them; each is a module of `eplbctl.commands`."""


class _LazyGroup(click.Group):
    """Imports a command's module when the command is asked for, and the heavy parts only when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"eplbctl.commands.{cmd_name}").command
        return command

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(int(code)), meaning) for code, meaning in EXIT_MEANING.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="moe-eplb", prog_name="eplbctl")
def cli() -> None:
    """Run, judge and explain an online expert-parallel load balancer.

    Results go to stdout, progress and hints to stderr.
    """


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code. Never raises for what a user can cause."""
    try:
        result = cli.main(args=list(arguments), prog_name="eplbctl", standalone_mode=False, obj=("eplbctl", *arguments))
        return int(result or ExitCode.VALID)
    except click.ClickException as error:
        error.show()
        return int(ExitCode.USAGE)
    except EplbError as error:
        return _known_error(error)
    except (KeyboardInterrupt, click.Abort):
        say("interrupted", err=True)
        return int(ExitCode.INTERRUPTED)
    except SystemExit as ended:
        # Only click ends so: after completing a word, or when the reader of its pages has gone.
        return int(ExitCode.UNKNOWN if ended.code else ExitCode.VALID)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            return _known_error(UsageError("E006", f"cannot use {error.filename}", why=error.strerror or str(error)))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            return _known_error(RunFailed("E183", "the output could not be written", why=str(error.strerror)))
        return _internal_error(error)


def _known_error(error: EplbError) -> int:
    say(str(error), err=True)
    return int(error.exit_code)


def _internal_error(error: Exception) -> int:
    say(f"internal error: {type(error).__name__}: {error}", err=True)
    if os.environ.get("EPLBCTL_DEBUG") == "1":
        import traceback

        say("".join(traceback.format_exception(error)).rstrip(), err=True)
    else:
        say("  This is a bug in eplbctl. Run it again with EPLBCTL_DEBUG=1 and report the traceback", err=True)
        say("  with the scenario and the output of `eplbctl doctor`.", err=True)
    return int(ExitCode.INTERNAL)

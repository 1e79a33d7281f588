"""Options that several commands share, and where their output goes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from eplbctl.output import require_writable, say, write_file
from moe_eplb.core.errors import UsageError

__all__ = [
    "OFFSET", "PATH", "Destination", "FiniteRange", "format_option", "layers_option", "loads_options", "output_options",
    "overrides_option", "recorder_option", "trace_options",
]  # fmt: skip

Function = Callable[..., Any]
_MOST_LAYERS = 10_000


class _Path(click.Path):
    """A path that is not empty: `Path("")` would be the current folder, and all that is in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            name = param.human_readable_name if param is not None else "a path"
            raise UsageError("E013", f"{name} is empty", hint="is a variable of the shell unset?")
        return super().convert(value, param, ctx)


class FiniteRange(click.FloatRange):
    """Finite numbers of a range: to click "nan" lies in every one, and "inf" in those without an end."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = super().convert(value, param, ctx)
        if not math.isfinite(found):
            self.fail(f"{found:g} is not a finite number", param, ctx)
        return found


PATH = _Path(path_type=Path)
OFFSET = click.IntRange(-(1 << 60), 1 << 60)
"""ns that may be added to times; more, and sums of times would not fit 64 bits."""


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

    def write_bytes(self, data: bytes) -> None:
        """Write what is no text; UsageError E083 without a file to write it to."""
        if self.path is None:
            raise UsageError("E083", "this form is no text for a terminal", hint="name a file for it: -o PATH")
        write_file(self.path, data)


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


def trace_options(function: Function) -> Function:
    """Add the options that say how traces are read and what of them is asked for; the command gets a `Question`."""

    @click.option("--iterations", metavar="RANGES", help="Only these iterations, such as 3 or 0-7,12 or 5-.")
    @click.option("--rank", metavar="RANGES", help="Only these ranks.")
    @click.option("--layer", metavar="RANGES", help="Only these layers.")
    @click.option(
        "--roles", "role_tables", multiple=True, type=PATH, help="YAML that says what kernels are. Repeatable."
    )
    @click.option(
        "--call-names",
        "call_tables",
        multiple=True,
        type=PATH,
        help="YAML that says which ranges are calls. Repeatable.",
    )
    @click.option(
        "--offset", "offsets", multiple=True, type=OFFSET, help="ns to add to each trace's times, in their order."
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any, iterations: str | None, rank: str | None, layer: str | None, role_tables: tuple[Path, ...],
        call_tables: tuple[Path, ...], offsets: tuple[int, ...], **kwargs: Any,
    ) -> Any:  # fmt: skip
        from moe_eplb.analysis.report import Question
        from moe_eplb.analysis.selection import Selection, parse_numbers

        named = {"ranks": ("--rank", rank), "iterations": ("--iterations", iterations), "layers": ("--layer", layer)}
        wanted = {name: parse_numbers(text, option) for name, (option, text) in named.items() if text is not None}
        asked = Question(Selection(**wanted), role_tables, call_tables, offsets)
        return function(*args, question=asked, **kwargs)

    return wrapper


def loads_options(function: Function) -> Function:
    """Add the options that say of a file of loads what it does not say itself; the command gets a `Reading`."""

    @click.option(
        "--tokens-per-window", type=click.IntRange(1), default=4096, show_default=True, help="Of a file of ids."
    )
    @click.option("--experts", type=click.IntRange(1), help="Experts of a layer; loads of another number are refused.")
    @click.option("--model", metavar="NAME", help="Which model's loads, in a file of several.")
    @layers_option
    @click.option("--merge", type=click.IntRange(0), default=1, help="Windows to sum into one, 0 for all of them.")
    @functools.wraps(function)
    def wrapper(
        *args: Any, tokens_per_window: int, experts: int | None, model: str | None, layers: tuple[int, ...] | None,
        merge: int, **kwargs: Any,
    ) -> Any:  # fmt: skip
        from moe_eplb.planning.formats.loads import Reading

        return function(*args, reading=Reading(tokens_per_window, experts, model, layers, merge), **kwargs)

    return wrapper


def layers_option(function: Function) -> Function:
    """Add ``--layers``; the command gets the numbers, or None."""

    @click.option("--layers", metavar="RANGES", help="The model's numbers of the layers, such as 3-60, if unknown.")
    @functools.wraps(function)
    def wrapper(*args: Any, layers: str | None, **kwargs: Any) -> Any:
        return function(*args, layers=None if layers is None else _numbers(layers), **kwargs)

    return wrapper


def _numbers(text: str) -> tuple[int, ...]:
    """The layers of ranges such as ``3-60``."""
    from moe_eplb.analysis.selection import parse_numbers

    found = parse_numbers(text, "--layers")
    if any(last - first > _MOST_LAYERS for first, last in found):
        raise UsageError("E080", f"--layers {text[:60]!r} is too long", hint="write where it ends, such as 3-60")
    return tuple(number for first, last in found for number in range(first, last + 1))

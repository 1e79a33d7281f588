"""``eplbctl trace``: what a trace is, and traces without private parts, in other formats, of several ranks as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from eplbctl.options import OFFSET, PATH, Destination, format_option, output_options
from eplbctl.output import place_file, require_room, require_writable, say
from eplbctl.signals import held, released
from moe_eplb.core.errors import UsageError

if TYPE_CHECKING:
    from moe_eplb.analysis.capture import Capture

__all__ = ["command"]

_FORMS = {".sqlite": "sqlite", ".db": "sqlite", ".json": "chrome", ".json.gz": "chrome.gz"}


@click.group()
def command() -> None:
    """Look into traces, redact, convert and merge them."""


@command.command()
@click.argument("traces", nargs=-1, required=True, type=PATH, metavar="TRACE...")
@click.option("--roles", "role_tables", multiple=True, type=PATH, help="YAML that says what kernels are. Repeatable.")
@format_option("text", "json", "markdown")
@output_options
def info(traces: tuple[Path, ...], role_tables: tuple[Path, ...], form: str, destination: Destination) -> None:
    """Say what traces hold and lack: format, ranks, streams, ranges, roles, what no rule knows, how clocks lie.

    \b
    Examples:
      eplbctl trace info capture.sqlite
      eplbctl trace info rank0.json.gz rank1.json.gz --format json
    """
    from eplbctl.render import trace_info as render
    from moe_eplb.analysis.trace_info import trace_info

    infos = trace_info(traces, role_tables)
    forms = {"text": render.text, "json": render.json_text, "markdown": render.markdown}
    destination.write(forms[form](infos))


@command.command()
@click.argument("trace", type=PATH)
@click.option("-o", "--output", type=PATH, help="Write the redacted trace here.")
@click.option("--in-place", is_flag=True, help="Replace the trace itself.")
@click.option("--force", is_flag=True, help="Overwrite the output if it exists.")
def redact(trace: Path, output: Path | None, in_place: bool, force: bool) -> None:
    """Take out of TRACE what must not leave the machine, and say what that was.

    Removed are environment variables, secrets, arguments, lists of processes, names of users and hosts, private paths,
    UUIDs and addresses. TRACE is an SQLite file, Chrome JSON (both plain, gzip or xz), or a run folder, whose scenario
    stays. A report of Nsight Systems (.nsys-rep) cannot be redacted: export it first. A copy of a folder holds the
    files that a run writes, without a report; what was left out is said. --in-place refuses a folder that holds others.

    \b
    Examples:
      eplbctl trace redact capture.sqlite -o public.sqlite
      eplbctl trace redact runs/quickstart --in-place
    """
    if (output is None) == (not in_place):
        raise UsageError("E076", "say where the redacted trace goes", hint="-o PATH for a copy, or --in-place")
    _require_redactable(trace)
    if output is None:
        removed = _redacted(trace)
    elif trace.is_dir():
        removed = _redacted_folder(trace, output)
    else:
        require_writable(output, force=force)
        _require_another(trace, output)
        removed = _redacted_file(trace, output)
    say("\n".join(removed) or "nothing had to be removed")
    if trace.is_dir():
        say("scenario.yaml stays as it was run; it may name files", err=True)


@command.command()
@click.argument("trace", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, help="Write to this file.")
@click.option(
    "--to", "form", type=click.Choice(("sqlite", "chrome", "chrome.gz")), help="By default as the suffix says."
)
@click.option("--rank", type=click.IntRange(0), help="Only this rank.")
@click.option("--force", is_flag=True, help="Overwrite the output file if it exists.")
def convert(trace: Path, output: Path, form: str | None, rank: int | None, force: bool) -> None:
    """Write TRACE in another format, and say what that format cannot hold.

    sqlite has the tables of an Nsight Systems export; chrome is Chrome JSON as the PyTorch profiler writes it, for one
    rank, and chrome.gz the same with gzip. Times keep every ns.

    \b
    Examples:
      eplbctl trace convert kineto.rank0.json.gz -o rank0.sqlite
      eplbctl trace convert runs/quickstart -o rank0.json.gz --rank 0
    """
    from moe_eplb.analysis.readers.any import read_capture

    form = form or _form_of(output)
    require_writable(output, force=force)
    _require_another(trace, output)
    capture = read_capture(trace)
    if rank is not None:
        capture = _only(capture, rank)
    _write(capture, output, form)


@command.command()
@click.argument("traces", nargs=-1, required=True, type=PATH, metavar="TRACE...")
@click.option("-o", "--output", type=PATH, required=True, help="Write to this SQLite file.")
@click.option(
    "--offset", "offsets", multiple=True, type=OFFSET, help="ns to add to each trace's times, in their order."
)
@click.option("--force", is_flag=True, help="Overwrite the output file if it exists.")
def merge(traces: tuple[Path, ...], output: Path, offsets: tuple[int, ...], force: bool) -> None:
    """Write the traces of several ranks as one, on one clock, and say how sure that clock is.

    \b
    Example:
      eplbctl trace merge rank0.json.gz rank1.json.gz -o job.sqlite
    """
    from moe_eplb.analysis.merge import merge_aligned
    from moe_eplb.analysis.readers.any import read_capture

    if len(traces) < 2:
        raise UsageError("E078", "one trace is not merged", hint="give two or more; convert changes the format of one")
    require_writable(output, force=force)
    for trace in traces:
        _require_another(trace, output)
    whole, moved = merge_aligned([read_capture(trace) for trace in traces], offsets)
    say("\n".join(moved), err=True)
    _write(whole, output, "sqlite")


def _write(capture: Capture, output: Path, form: str) -> None:
    from moe_eplb.analysis.writers import chrome, sqlite

    lost = sqlite.losses(capture) if form == "sqlite" else chrome.chrome_losses(capture)
    with _made_at(output) as partial:
        if form == "sqlite":
            sqlite.write_sqlite(capture, partial)
        else:
            chrome.write_chrome(capture, partial, packed=form == "chrome.gz")
    for what in lost:
        say(f"not in {output}: {what}", err=True)


def _only(capture: Capture, rank: int) -> Capture:
    if rank not in capture.ranks:
        raise UsageError("E077", f"the trace has no rank {rank}", why=f"it has {capture.ranks}")
    tables = {
        name: table[table["rank"] == rank] if "rank" in (table.dtype.names or ()) else table
        for name, table in capture.tables().items()
    }
    streams = {key: name for key, name in capture.streams.items() if key[0] == rank}
    return replace(capture, streams=streams).with_tables(tables)


def _form_of(output: Path) -> str:
    for suffix in sorted(_FORMS, key=len, reverse=True):
        if output.name.endswith(suffix):
            return _FORMS[suffix]
    hint = f"end its name with one of {', '.join(_FORMS)}, or use --to"
    raise UsageError("E077", f"what format is {output.name} to have?", hint=hint)


def _require_another(trace: Path, output: Path) -> None:
    if output.exists() and trace.exists() and output.samefile(trace):
        raise UsageError("E076", "a trace is not written over itself", why=str(output), hint="choose another name")


def _require_redactable(trace: Path) -> None:
    if trace.suffix == ".nsys-rep":
        hint = f"nsys export --type sqlite {trace}, and redact that"
        raise UsageError(
            "E076", "a report of Nsight Systems cannot be redacted", why="its format is not public", hint=hint
        )
    if not trace.exists():
        raise UsageError("E076", f"there is no trace {trace}")
    if trace.is_dir() and not (trace / "meta.json").is_file():
        raise UsageError("E076", f"{trace} is no run folder", why="it holds no meta.json")


def _redacted(trace: Path) -> list[str]:
    from moe_eplb.recording.redact import redact as redact_file
    from moe_eplb.recording.redact_run import redact_run

    with held():
        return redact_run(trace) if trace.is_dir() else redact_file(trace)


def _redacted_file(trace: Path, output: Path) -> list[str]:
    import shutil

    from moe_eplb.recording.redact import require_no_journal

    require_no_journal(trace)
    with _made_at(output) as partial:
        shutil.copyfile(trace, partial)
        return _redacted(partial)


def _redacted_folder(trace: Path, output: Path) -> list[str]:
    import tempfile

    from moe_eplb.recording.redact_run import copy_run

    if output.exists():
        raise UsageError("E002", f"{output} exists already", hint="choose another name for the copy")
    require_room(output)
    with held():
        with tempfile.TemporaryDirectory(prefix=".eplbctl-", dir=output.resolve().parent) as folder, released():
            copy = Path(folder) / "run"
            removed, left_out = copy_run(trace, copy)
            copy.rename(output)
        for name in left_out:
            say(f"not in {output}: {name}, which is no file that can be redacted", err=True)
        return removed


@contextmanager
def _made_at(output: Path) -> Iterator[Path]:
    """A file to write that becomes `output` as a whole, or goes."""
    import tempfile

    with held(), tempfile.TemporaryDirectory(prefix=".eplbctl-", dir=output.resolve().parent) as folder, released():
        partial = Path(folder) / "partial"
        yield partial
        place_file(partial, output)

"""Reads a trace of any known format; what it is, is told by its content and not by its name."""

from __future__ import annotations

import gzip
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeAlias

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.merge import merge
from moe_eplb.analysis.readers.chrome import read_chrome
from moe_eplb.analysis.readers.json_events import unpacked
from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS, Limits, too_large
from moe_eplb.analysis.readers.nsys import read_nsys
from moe_eplb.analysis.readers.nsys_report import read_nsys_report
from moe_eplb.analysis.readers.records import read_records
from moe_eplb.analysis.readers.sound import require_sound
from moe_eplb.analysis.readers.sqlite_tables import MAGIC, open_database
from moe_eplb.core.errors import TraceError
from moe_eplb.core.input_file import open_input
from moe_eplb.core.packed import GZIP_MAGIC, XZ_MAGIC, un_xz

__all__ = ["RUN_TRACE", "read_capture", "read_captures"]

RUN_TRACE = "trace.sqlite"
"""Name of the trace in a run folder."""
_LOOK = 4096

_Unpack: TypeAlias = Callable[[BinaryIO], Iterator[bytes]]


def read_captures(paths: Sequence[Path], limits: Limits = DEFAULT_LIMITS, offsets: Sequence[int] = ()) -> Capture:
    """Read one trace, or several of one job as one with their clocks aligned, see `moe_eplb.analysis.merge`."""
    captures = [read_capture(path, limits) for path in paths]
    return captures[0] if len(captures) == 1 and not offsets else merge(captures, offsets, limits)


def read_capture(path: Path, limits: Limits = DEFAULT_LIMITS) -> Capture:
    """Read a run folder, its trace, an export or a report of Nsight Systems, or a trace of the PyTorch profiler.

    SQLite and JSON may be packed with gzip, SQLite with xz too.

    Raises:
        TraceError: E060 there is no such file or it is of no known format, E061 it is cut off, E062 it is damaged,
            E063 it is empty, E064 it is too large, E065 nsys is needed and cannot do it.
    """
    found = _read(path / RUN_TRACE if path.is_dir() else path, limits)
    if not len(found.gpu) and not len(found.ranges):
        why = f"no GPU events and no ranges ({found.form})"
        raise TraceError("E063", "a trace is empty", why=why, where=str(path))
    require_sound(found, limits)
    return found


def _read(path: Path, limits: Limits) -> Capture:
    try:
        with open_input(path) as file:
            start = file.read(_LOOK)
    except OSError as error:
        why = error.strerror or str(error)
        raise TraceError("E060", "a trace cannot be opened", why=why, where=str(path)) from error
    if not start:
        raise TraceError("E063", "a trace is empty", why="0 bytes", where=str(path))
    if start.startswith(MAGIC):
        return _read_sqlite(path, limits)
    if path.suffix == ".nsys-rep":
        return read_nsys_report(path, limits)
    if start.startswith(GZIP_MAGIC):
        return _read_packed(path, limits)
    if start.startswith(XZ_MAGIC):
        return _read_packed_database(path, limits, un_xz)
    if start.lstrip()[:1] in (b"{", b"["):
        return read_chrome(path, limits)
    hint = "give a run folder, an .nsys-rep or its SQLite export, or a trace of the PyTorch profiler (.json, .json.gz)"
    why = f"it starts with {start[:8].hex(' ')}"
    raise TraceError("E060", "a trace is of no known format", why=why, where=str(path), hint=hint)


def _read_sqlite(path: Path, limits: Limits) -> Capture:
    with open_database(path, limits) as database:
        ours = database.has("EPLB_RECORD")
    return read_records(path, limits) if ours else read_nsys(path, limits)


def _read_packed(path: Path, limits: Limits) -> Capture:
    try:
        with gzip.open(path) as file:
            packed_database = file.read(len(MAGIC)) == MAGIC
    except EOFError as error:
        raise TraceError("E061", "a trace is cut off", why=str(error), where=str(path)) from error
    except (OSError, zlib.error) as error:
        raise TraceError("E062", "a trace is damaged", why=f"gzip: {error}", where=str(path)) from error
    if not packed_database:
        return read_chrome(path, limits)
    return _read_packed_database(path, limits, partial(unpacked, packed=True))


def _read_packed_database(path: Path, limits: Limits, unpack: _Unpack) -> Capture:
    with tempfile.TemporaryDirectory(prefix="moe_eplb_unpacked_") as folder:
        target = Path(folder) / "trace.sqlite"
        _unpack(path, target, limits, unpack)
        with target.open("rb") as file:
            start = file.read(len(MAGIC))
        if start != MAGIC:
            raise TraceError(
                "E060", "a trace is of no known format", why="what is packed is no SQLite", where=str(path)
            )
        return replace(_read_sqlite(target, limits), source=str(path))


def _unpack(path: Path, target: Path, limits: Limits, unpack: _Unpack) -> None:
    written = 0
    try:
        with open_input(path) as file, target.open("wb") as out:
            for piece in unpack(file):
                written += out.write(piece)
                if written > limits.text_bytes:
                    raise too_large(path, f"it unpacks to more than {limits.text_bytes} bytes", f"byte {written}")
    except EOFError as error:
        raise TraceError("E061", "a trace is cut off", why=str(error), where=str(path)) from error
    except (zlib.error, ValueError) as error:
        raise TraceError("E062", "a trace is damaged", why=f"unpacking: {error}", where=str(path)) from error

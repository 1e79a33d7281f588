"""Reader of Nsight Systems' own reports, which only its program understands: they are exported first."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS, Limits
from moe_eplb.analysis.readers.nsys import read_nsys
from moe_eplb.core.errors import TraceError

__all__ = ["find_nsys", "read_nsys_report"]

_FOLDERS = (
    "/opt/nvidia/nsight-systems*/*/target-linux-*/nsys",
    "/opt/nvidia/nsight-systems*/*/bin/nsys",
    "/usr/local/cuda*/bin/nsys",
    "/opt/nvidia/nsight-compute*/*/host/target-linux-*/nsys",
    "/usr/local/cuda*/nsight-compute-*/host/target-linux-*/nsys",
)
_GRACE_S = 5.0


def find_nsys() -> Path | None:
    """The program on PATH, else where Nsight Systems or Nsight Compute install it; the last by name of several."""
    if on_path := shutil.which("nsys"):
        return Path(on_path)
    found = [file for pattern in _FOLDERS for file in sorted(Path("/").glob(pattern[1:])) if os.access(file, os.X_OK)]
    return found[-1] if found else None


def read_nsys_report(path: Path, limits: Limits = DEFAULT_LIMITS, nsys: Path | None = None) -> Capture:
    """Read a ``.nsys-rep`` through ``nsys export``; the export is removed again.

    Args:
        path: The report.
        limits: Bounds, of which `seconds` is the longest that the export may take.
        nsys: The program, by default what `find_nsys` finds.

    Raises:
        TraceError: E065 the program is not found, fails, or takes too long; else see `read_nsys`.
    """
    program = nsys or find_nsys()
    if program is None:
        hint = "export it where nsys is installed: nsys export --type sqlite FILE, and give the .sqlite"
        raise TraceError("E065", "a report of Nsight Systems needs nsys to be read", where=str(path), hint=hint)
    with tempfile.TemporaryDirectory(prefix="moe_eplb_export_") as folder:
        target = Path(folder) / "export.sqlite"
        _export(
            [str(program), "export", "--type", "sqlite", "--output", str(target), str(path.resolve())], path, limits
        )
        if not target.is_file():
            raise TraceError("E065", "nsys exported nothing", why="it ended without an error", where=str(path))
        found = read_nsys(target, limits)
    return replace(found, source=str(path))


def _export(command: list[str], path: Path, limits: Limits) -> None:
    # A session of its own, so that helpers that nsys starts end with it.
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise TraceError("E065", "nsys cannot be started", why=str(error), where=str(path)) from error
        try:
            status = process.wait(limits.seconds)
        except subprocess.TimeoutExpired as error:
            why = f"it was ended after {limits.seconds:g} s"
            raise TraceError("E065", "nsys takes too long to export a report", why=why, where=str(path)) from error
        finally:
            _end(process)
        said.seek(0)
        text = said.read(4096).decode(errors="replace").strip()
    if status:
        why = f"exit status {status}: {text[-300:]}"
        raise TraceError("E065", "nsys cannot export a report", why=why, where=str(path))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program and what it started; nothing is left to do when all of them have ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait(_GRACE_S)

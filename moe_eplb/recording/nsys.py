"""The recorder ``nsys``: Nsight Systems around a whole run, its report exported to SQLite and redacted."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moe_eplb.core.errors import ExitCode, RunFailed
from moe_eplb.recording.children import run_bounded
from moe_eplb.recording.nsys_tool import LIBRARIES_FIX, Nsys, missing_library
from moe_eplb.recording.profilers import WRAPPED
from moe_eplb.recording.redact import redact

__all__ = ["EXPORT", "REPORT", "export_report", "record"]

EXPORT = "nsys.sqlite"
"""The redacted export in a run folder."""
REPORT = "nsys.nsys-rep"
"""The raw report, kept only where it is asked for."""

_PROFILE = ("profile", "-s", "none", "--cpuctxsw=none", "-t", "cuda,nvtx", "--cuda-graph-trace=node")
"""What is traced. CPU samples would cost minutes and gigabytes; without node mode a graph replay is one bar."""
_EXPORT_S = 900.0
_TOLD = frozenset(int(code) for code in ExitCode if code not in (ExitCode.VALID, ExitCode.INVALID, ExitCode.UNKNOWN))
"""Exit codes with which ``eplbctl`` itself says, without a verdict, that it failed and why."""


def record(tool: Nsys, command: Sequence[str], folder: Path, *, timeout_s: float, keep_report: bool = False) -> int:
    """Run a command that makes the run folder `folder` under Nsight Systems, and put `EXPORT` into that folder.

    The raw report holds the environment of every process, so it is made in a folder that only this user can read, and
    is removed whatever happens, unless `keep_report`. A run that fails before its verdict leaves no export.

    Args:
        tool: What `nsys_tool.find` found.
        command: A command line of ``eplbctl run``; it finds `profilers.WRAPPED` in its environment.
        folder: The run folder, which the command may have to make itself; its parent is made.
        timeout_s: For the command and its report; writing the export has a bound of its own.

    Returns:
        The command's exit code.

    Raises:
        RunFailed: E185 nsys could not be started, ran out of time, left no report, or could not export it.
        TraceError: E068 the export could not be redacted; it is removed then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as private:
        report = Path(private) / REPORT
        output = [*_PROFILE, "-o", str(report.with_suffix("")), "--force-overwrite=true"]
        try:
            ended = run_bounded([str(tool.path), *output, *command], mark=WRAPPED, timeout_s=timeout_s)
        except OSError as error:
            raise _failed("could not be started", error.strerror or str(error)) from error
        if ended.code is None:
            raise _failed(f"did not end within {timeout_s:g} s", ended.tail, "raise timeout_s if the run is slow")
        if ended.code != 0 and not (folder / "verdict.json").exists():
            if ended.code in _TOLD:
                return ended.code
            raise _failed(f"ended with code {ended.code} before the run had a verdict", ended.tail)
        if not report.exists():
            raise _failed("left no report", ended.tail)
        if keep_report:
            report.chmod(0o600)
            report = report.replace(folder / REPORT)
        export_report(tool, report, folder / EXPORT)
    return ended.code


def export_report(tool: Nsys, report: Path, target: Path, *, timeout_s: float = _EXPORT_S) -> list[str]:
    """Export a report to redacted SQLite at `target`, whole or not at all; returns what was removed.

    Raises:
        RunFailed: E185 nsys failed or ran out of time.
        TraceError: E068 the export could not be redacted.
    """
    with tempfile.TemporaryDirectory(prefix=".nsys-", dir=target.parent) as private:
        raw = Path(private) / EXPORT
        command = [str(tool.path), "export", "--type=sqlite", "--force-overwrite=true", f"--output={raw}", str(report)]
        try:
            answer = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", timeout=timeout_s, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise _failed(f"did not export its report within {timeout_s:g} s", str(error.output or "")) from error
        except OSError as error:
            raise _failed("could not be started", error.strerror or str(error)) from error
        if answer.returncode != 0 or not raw.exists():
            raise _failed(f"export ended with code {answer.returncode}", answer.stdout)
        removed = redact(raw)
        raw.replace(target)
    return removed


def _failed(what: str, text: str, hint: str = "") -> RunFailed:
    library = missing_library(text)
    why = "its last words: " + " | ".join(line.strip() for line in text.splitlines()[-8:] if line.strip())
    hint = hint or (LIBRARIES_FIX if library else "run `eplbctl doctor`, or use --recorder builtin or torch")
    return RunFailed("E185", f"nsys {what}", why=why if text.strip() else "", hint=hint)

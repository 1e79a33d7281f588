"""A run under Nsight Systems: this program starts itself once more, and shows what came out."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eplbctl.signals import Terminated
from moe_eplb.core.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from moe_eplb.core.scenario import Scenario
    from moe_eplb.session import RunResult

__all__ = ["require_recorders", "run_under_nsys"]

_MARGIN_S = 600.0
"""Beyond the scenario's own bound: the start of the ranks, each of which imports torch, and the report of nsys."""


def require_recorders(scenarios: Sequence[Scenario]) -> None:
    """Raise UsageError before anything runs when a scenario's recorder cannot be had: E009 no nsys, E019 not here."""
    from moe_eplb.recording import nsys_tool, profilers

    recorders = {scenario.record.recorder for scenario in scenarios}
    if "torch" in recorders:
        profilers.require_no_profiler("torch")
    if "nsys" not in recorders or profilers.wrapped():
        return
    if profilers.foreign_profiler():
        profilers.require_no_profiler("nsys")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UsageError(
            "E019", "the recorder 'nsys' starts its own ranks", why="torchrun has started this one",
            hint="leave torchrun out, or put `nsys profile` before it and use --recorder builtin",
        )  # fmt: skip
    nsys_tool.find()


def run_under_nsys(scenario: Scenario, path: Path, changes: Sequence[str], folder: Path) -> RunResult | ExitCode:
    """Run a scenario file or a run folder, with changes, into `folder`; the exit code alone when it has no verdict.

    Raises:
        UsageError: E009 there is no nsys that runs.
        RunFailed: E185 nsys failed.
        TraceError: E068 its export could not be redacted.
        KeyboardInterrupt, Terminated: a signal has ended the run, so that none is to follow.
    """
    from moe_eplb.core.verdict import Verdict
    from moe_eplb.recording import nsys, nsys_tool
    from moe_eplb.session import RunResult

    started = time.monotonic()
    changed = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-m", "eplbctl", "run", *changed, "--out", str(folder), "--", str(path)]
    code = nsys.record(
        nsys_tool.find(), command, folder, timeout_s=scenario.timeout_s + _MARGIN_S,
        keep_report=scenario.record.keep_report,
    )  # fmt: skip
    verdict = folder / "verdict.json"
    if not verdict.exists():
        return _without_verdict(ExitCode(code))
    data = json.loads(verdict.read_text(encoding="utf-8"))
    return RunResult(folder, Verdict.from_json(data), time.monotonic() - started)


def _without_verdict(code: ExitCode) -> ExitCode:
    """The exit code of a run that has told by itself why it did not get to a verdict."""
    if code is ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code is ExitCode.TERMINATED:
        raise Terminated(signal.SIGTERM)
    return code

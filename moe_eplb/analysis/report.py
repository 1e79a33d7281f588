"""From paths to a whole report: what a run left behind, or what a profiler of any kind saw."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.measures import Measures
from moe_eplb.analysis.order_check import check_order
from moe_eplb.analysis.readers.any import RUN_TRACE, read_captures
from moe_eplb.analysis.readers.records import capture_of
from moe_eplb.analysis.report_metrics import judge_limit, report_measures
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.selection import EVERYTHING, Selection
from moe_eplb.analysis.trace_report import TraceReport, make_trace_report
from moe_eplb.core.errors import TraceError
from moe_eplb.core.thresholds import Threshold
from moe_eplb.core.verdict import CheckResult, Status

if TYPE_CHECKING:
    from moe_eplb.analysis import stages

__all__ = ["Question", "Report", "make_report"]


@dataclass(frozen=True)
class Question:
    """What is asked of traces.

    Attributes:
        role_tables, call_tables: Files with rules that go before the built-in ones.
        offsets: ns to add to each file's times, empty to align them by what they have in common.
        limits: Thresholds that must hold.
        most_exposed: How many of the longest exposed stretches to list.
    """

    selection: Selection = EVERYTHING
    role_tables: tuple[Path, ...] = ()
    call_tables: tuple[Path, ...] = ()
    offsets: tuple[int, ...] = ()
    limits: tuple[Threshold, ...] = ()
    most_exposed: int = 10


EVERYTHING_ASKED = Question()
_BESIDE = ("nsys.sqlite", "kineto.rank*.json.gz")


@dataclass(frozen=True)
class Report:
    """A report. `run` is there for a run folder, `trace` and `capture` for everything that holds a trace.

    `beside` names what other recorders left in the run folder.
    """

    name: str
    run: stages.Report | None
    trace: TraceReport | None
    capture: Capture | None
    measures: Measures
    limits: tuple[CheckResult, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def invalid(self) -> bool:
        """Whether something is known to be wrong."""
        return any(check.status is Status.INVALID for check in self.checks)

    @property
    def undecided(self) -> bool:
        """Whether a limit could not be judged."""
        return any(check.status is Status.UNKNOWN for check in self.limits)

    @property
    def checks(self) -> tuple[CheckResult, ...]:
        """The order checks, then the limits."""
        return self.trace.checks if self.trace is not None else self.limits


def make_report(paths: Sequence[Path], question: Question = EVERYTHING_ASKED) -> Report:
    """Read traces of one job, one for each rank or one for all, and report on them.

    Raises:
        TraceError: a trace cannot be read, see `moe_eplb.analysis.readers.any`, or a run folder is damaged.
        UsageError: E080 a selection leaves nothing of a trace, or a table of roles or calls is not acceptable.
    """
    if len(paths) == 1 and paths[0].is_dir() and not _only_a_trace(paths[0]):
        return _of_run(paths[0], question)
    capture = read_captures(paths, offsets=question.offsets)
    return _of_capture(paths[0].name if len(paths) == 1 else f"{len(paths)} traces", capture, question)


def _only_a_trace(folder: Path) -> bool:
    """Whether a folder holds the trace of a run and nothing else of it; a run that lost a part is no trace."""
    parts = ("scenario.yaml", "meta.json", "verdict.json")
    return (folder / RUN_TRACE).exists() and not any(os.path.lexists(folder / part) for part in parts)


def _of_run(path: Path, question: Question) -> Report:
    # Only a run folder needs scenarios, and what reads them takes as long to import as all the rest.
    from moe_eplb.analysis import run_folder, stages
    from moe_eplb.analysis.metrics import measure_run

    folder = run_folder.load(path)
    try:
        run, measures = stages.make_report(folder), measure_run(folder)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(
            "E058", "the evidence does not add up to a report", why=f"{type(error).__name__}: {error}",
            where=str(folder.path), hint=f"judge it instead: eplbctl verify {folder.path}",
        ) from error  # fmt: skip
    name = folder.scenario.name or folder.path.name
    beside = tuple(sorted(str(path) for pattern in _BESIDE for path in folder.path.glob(pattern)))
    if folder.trace is None:
        limits = tuple(judge_limit(limit, measures) for limit in question.limits)
        return Report(name, run, None, None, measures, limits, beside)
    return replace(_of_capture(name, capture_of(folder.trace), question, run, measures), beside=beside)


def _of_capture(
    name: str, capture: Capture, question: Question, run: stages.Report | None = None, measured: Measures | None = None
) -> Report:
    capture = prepare(capture, tables=question.role_tables)
    question.selection.require_some(capture.gpu, capture.source)
    trace = make_trace_report(
        capture, question.selection, check_order(capture, question.call_tables).checks, question.most_exposed
    )
    measures = report_measures(trace)
    if measured is not None:  # what only a run's evidence tells
        measures.single = measured.single | {k: v for k, v in measures.single.items() if v is not None}
        measures.series = measured.series | measures.series
    limits = tuple(judge_limit(limit, measures) for limit in question.limits)
    return Report(name, run, replace(trace, checks=(*trace.checks, *limits)), capture, measures, limits)

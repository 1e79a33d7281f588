"""A clock has no zero that means anything: with all times moved, below 0 too, every answer is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.order_check import check_order
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.roles import prepare
from moe_eplb.analysis.timeline import make_timeline
from moe_eplb.analysis.trace_report import TraceReport, make_trace_report
from moe_eplb.core.events import Role
from tests.analysis.captures import MakeCapture

TRACES = Path(__file__).parents[2] / "traces"
SHIFT = -(10**15)
_KEPT = ["path_a.nsys.sqlite.gz", "path_c.chrome.json.gz", "path_b_graph.nsys.sqlite.gz"]
_BAD = ["complete-range_never_closed.nsys.sqlite.gz", "complete-iteration_never_ends.nsys.sqlite.gz"]
_BAD += ["joins-route_without_the_wait.nsys.sqlite.gz", "call_order-E103-*.nsys.sqlite.gz"]
CAPTURES = [
    *sorted((TRACES / "recorded").glob("*_2gpu.nsys.sqlite.xz")),
    *(TRACES / "good_captures" / name for name in _KEPT),
    *(path for name in _BAD for path in sorted((TRACES / "bad_captures").rglob(name))),
]


def _moved(capture: Capture, by: int) -> Capture:
    """With all times moved; not by `merge`, which leaves none below zero."""
    tables = {name: table.copy() for name, table in capture.tables().items()}
    for name, table in tables.items():
        for column in {"start", "end"} & {*(table.dtype.names or ())}:
            known = table[column] != c.UNKNOWN if name == "ranges" else np.ones(len(table), np.bool_)
            table[column][known] += by
    return capture.with_tables(tables)


def _report(capture: Capture, back: int) -> TraceReport:
    report = make_trace_report(prepare(capture))
    exposed = tuple(replace(one, start=one.start + back, end=one.end + back) for one in report.exposed)
    return replace(report, exposed=exposed)


def _order(capture: Capture) -> tuple[object, ...]:
    """What is said of the calls' order, without the moments of calls."""
    report = check_order(prepare(capture))
    illegal = [(one.rank, one.code, one.what, one.why, one.call.name, one.path) for one in report.illegal]
    checks = [(check.name, check.status, check.observed) for check in report.checks]
    return checks, illegal, report.calls, report.notes


@pytest.mark.parametrize("path", CAPTURES, ids=lambda path: path.name)
def test_a_capture_says_the_same_on_a_clock_below_zero(path: Path) -> None:
    capture = _moved(read_capture(path), 0)
    assert len(capture.gpu)
    moved = _moved(capture, SHIFT)
    assert _report(moved, -SHIFT) == _report(capture, 0)
    assert _order(moved) == _order(capture)


def test_a_range_that_was_never_closed_is_drawn_to_the_end_on_a_clock_below_zero() -> None:
    made = MakeCapture()
    made.range("step", 10, c.UNKNOWN)
    made.launched(Role.COMPUTE, 20, 30, 50)
    lanes = [make_timeline(prepare(_moved(made.done(), by))).lanes for by in (0, -1000)]
    flags = [[lane.events["flags"].tolist() for lane in of_clock] for of_clock in lanes]
    assert flags[0] == flags[1]


_STREAM = st.sampled_from([7, 20, 30])
_ROLE = st.sampled_from([Role.COMPUTE, Role.COMM, Role.EPLB_STATISTIC, Role.EPLB_MIGRATE, Role.EPLB_WAIT])
_EVENT = st.tuples(st.integers(0, 200), st.integers(0, 40), st.integers(0, 30), _STREAM, _ROLE, st.booleans())
_WAIT = st.tuples(_STREAM, _STREAM, st.integers(0, 200))


@settings(max_examples=300, deadline=None)
@given(st.lists(_EVENT, min_size=1, max_size=10), st.lists(_WAIT, max_size=6), st.integers(-(10**15), -1000))
def test_any_report_is_the_same_on_a_clock_below_zero(
    events: list[tuple[int, int, int, int, Role, bool]], waits: list[tuple[int, int, int]], by: int
) -> None:
    made = MakeCapture()
    for launch, before, length, stream, role, known in events:
        start = launch + before
        if known:
            made.launched(role, launch, start, start + length, stream, iteration=launch // 100)
        else:
            made.gpu(role, start, start + length, stream, iteration=launch // 100)
    for stream, on, at in waits:
        made.wait(stream, on, at)
    capture = _moved(made.done(), 0)
    assert _report(_moved(capture, by), -by) == _report(capture, 0)

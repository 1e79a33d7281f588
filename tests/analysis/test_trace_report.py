"""The report on a capture, against figures worked out by hand, and the conditions under which it fails."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.idle import Cause
from moe_eplb.analysis.overlap import Hidden
from moe_eplb.analysis.report_metrics import REPORT_METRICS, judge_limit, parse_limits, report_measures
from moe_eplb.analysis.selection import Selection
from moe_eplb.analysis.stream_pairs import StreamPair
from moe_eplb.analysis.trace_report import TraceReport, make_trace_report
from moe_eplb.core.errors import UsageError
from moe_eplb.core.events import Role
from moe_eplb.core.verdict import CheckResult, Status

from .captures import MakeCapture

MAIN, BALANCER, COMM = 7, 20, 30


def two_iterations() -> Capture:
    """Rank 0 twice: compute 0-100 and a statistic 80-120 beside it; in iteration 1 a move, a wait and a collective."""
    made = MakeCapture()
    made.stream(MAIN, "Main")
    made.stream(BALANCER, "MoeBalancer")
    for iteration, begin in enumerate((0, 1000)):
        where = {"iteration": iteration, "layer": iteration}
        made.launched(Role.COMPUTE, begin, begin + 10, begin + 110, MAIN, **where)
        made.launched(Role.EPLB_STATISTIC, begin + 4, begin + 90, begin + 130, BALANCER, name="histogram", **where)
    made.launched(Role.EPLB_MIGRATE, 1006, 1130, 1150, BALANCER, name="move", iteration=1, layer=1)
    made.launched(Role.UNKNOWN, 1008, 1040, 1060, COMM, name="mystery", iteration=1)
    made.wait(MAIN, BALANCER, 1010)
    made.launched(Role.COMM, 1014, 1150, 1170, MAIN, name="nccl_all", iteration=1, layer=1)
    return made.done()


def test_pairs_whole_and_in_parts() -> None:
    report = make_trace_report(two_iterations())
    pair = report.pairs["balancer"]
    assert pair.whole == Hidden(100, 40)
    assert pair.ranks == {0: Hidden(100, 40)}
    assert pair.iterations == {0: Hidden(40, 20), 1: Hidden(60, 20)}
    assert pair.layers == {0: Hidden(40, 20), 1: Hidden(60, 20)}
    assert pair.streams == {(0, BALANCER): Hidden(100, 40)}
    assert pair.worst == {0: 20, 1: 40}
    assert (pair.updates, pair.steady) == (Hidden(60, 20), Hidden(40, 20))
    assert report.update_iterations == (1,)
    assert report.pairs["reduction"].whole.overlap is None
    assert report.pairs["migration"].whole == Hidden(20, 0)


def test_work_of_no_iteration_is_neither_where_experts_move_nor_elsewhere() -> None:
    made = MakeCapture()
    made.gpu(Role.COMPUTE, 0, 100, MAIN)
    made.gpu(Role.EPLB_MIGRATE, 50, 70, BALANCER)
    pair = make_trace_report(made.done()).pairs["balancer"]
    assert (pair.whole, pair.updates, pair.steady) == (Hidden(20, 20), Hidden(), Hidden())


def test_what_was_seen() -> None:
    report = make_trace_report(two_iterations())
    assert (report.ranks, report.gpus, report.events, report.span_ns) == ((0,), 1, 7, 1160)
    assert (report.iterations, report.layers) == ((0, 1), (0, 1))
    roles = {row.role: (row.events, row.total_ns, row.busy_ns) for row in report.roles}
    assert roles[Role.COMPUTE] == (2, 200, 200)
    assert [time.name for time in report.unknown] == ["mystery"]
    assert report.streams[0] == StreamPair(0, 0, MAIN, BALANCER, 220, 100, 40)
    assert report.exposed[0].length == 40
    assert report.exposed[0].work == (("histogram", 20), ("move", 20))


def test_idle_path_and_stall_add_up() -> None:
    report = make_trace_report(two_iterations())
    (idle,) = report.idle
    assert idle.idle_ns == sum(idle.causes.values()) == 1010 - 130
    assert idle.causes[Cause.HOST] == 1000 - 130
    assert report.path is not None
    assert report.path.steps == {0: 130, 1: 170}
    assert sum(report.path.by_what.values()) == report.path.length_ns == 300
    assert report.stall is not None
    assert report.stall.idle_ns == 1150 - 1110  # from the end of compute to the start of what waited for the move
    assert report.stall.worst == {1: 40}


def test_a_selection_takes_work_and_not_what_hides_it() -> None:
    capture = two_iterations()
    report = make_trace_report(capture, Selection(iterations=((1, 1),)))
    assert report.pairs["balancer"].whole == Hidden(60, 20)
    assert (report.iterations, report.selection) == ((1,), "iterations 1")
    assert report.path is not None
    assert report.path.steps == {1: 170}
    moved = replace(capture, gpu=capture.gpu.copy())
    moved.gpu["iteration"][moved.gpu["start"] == 1010] = 0  # the compute that hides it counts for another iteration
    assert make_trace_report(moved, Selection(iterations=((1, 1),))).pairs["balancer"].whole == Hidden(60, 20)
    none = make_trace_report(capture, Selection(ranks=((3, 3),)))
    assert (none.events, none.ranks, none.exposed, none.idle, none.path) == (0, (), (), (), None)
    assert none.pairs["balancer"].whole.overlap is None


def in_part() -> Capture:
    """Iterations 2 and 3 of rank 0 and 2 of rank 1: 40 ns of work in each, 60 between them."""
    made = MakeCapture()
    for rank, iteration in ((0, 2), (0, 3), (1, 2)):
        begin = 100 * iteration
        made.gpu(Role.COMPUTE, begin, begin + 40, MAIN, rank=rank, iteration=iteration, layer=rank)
    return made.done()


@pytest.mark.parametrize(
    ("selection", "idle", "gpus", "notes", "share"),
    [
        (Selection(), [(0, 140, 60), (1, 40, 0)], 2, (), 60 / 180),
        (Selection(iterations=((3, 3),)), [(0, 100, 60)], 1, ("rank 1: no device event of the selection",), 0.6),
        (Selection(iterations=((2, 3),)), [(0, 140, 60), (1, 40, 0)], 2, (), 60 / 180),
        (Selection(ranks=((0, 0),)), [(0, 140, 60)], 1, (), 60 / 140),
        (Selection(ranks=((0, 0),), iterations=((3, 3),)), [(0, 100, 60)], 1, (), 0.6),
        (
            Selection(layers=((1, 1),)), [(0, 140, 60), (1, 40, 0)], 1,
            ("rank 0: no device event of the selection",), None,
        ),
        (
            Selection(iterations=((4, 4),)), [], 0, ("ranks 0, 1: no device event of the selection",), None,
        ),
    ],
)  # fmt: skip
def test_gpus_without_the_selected_iterations_have_no_idle_time(
    selection: Selection, idle: list[tuple[int, int, int]], gpus: int, notes: tuple[str, ...], share: float | None
) -> None:
    report = make_trace_report(in_part(), selection)
    assert [(row.rank, row.span_ns, row.idle_ns) for row in report.idle] == idle
    assert all(sum(row.causes.values()) == row.idle_ns for row in report.idle)
    assert (report.gpus, report.notes) == (gpus, notes)
    assert report_measures(report).single["idle.share"] == pytest.approx(share)
    assert judged("idle.share > 0.5", report).status is (
        Status.UNKNOWN if share is None else Status.INVALID if share > 0.5 else Status.VALID
    )


def test_a_capture_without_anything() -> None:
    report = make_trace_report(MakeCapture().done())
    assert (report.events, report.span_ns, report.path, report.stall) == (0, 0, None, None)
    assert all(value is None for value in report_measures(report).single.values())


def test_measures() -> None:
    measures = report_measures(make_trace_report(two_iterations()))
    assert measures.single["overlap.balancer"] == 0.4
    assert measures.series["overlap.balancer"] == [0.5, 20 / 60]
    assert measures.single["exposed.p50_us"] == pytest.approx(0.03)
    assert measures.single["exposed.max_us"] == pytest.approx(0.04)
    assert measures.single["step.p95_ms"] == pytest.approx((130 + 0.95 * 40) / 1e6)
    assert measures.single["stall.share"] == pytest.approx(40 / 300)
    assert measures.single["unknown.share"] == pytest.approx(20 / 340)
    assert measures.single["idle.share"] == pytest.approx(880 / 1160)
    assert measures.single["skew.max_us"] is None
    assert set(measures.single) | set(measures.series) <= set(REPORT_METRICS)
    assert all(value is None or math.isfinite(value) for value in measures.single.values())


def test_stall_is_not_known_without_recorded_waits() -> None:
    capture = two_iterations()
    measures = report_measures(make_trace_report(replace(capture, syncs=capture.syncs[:0])))
    assert (measures.single["stall.p50_us"], measures.single["critical_path.balancer_share"]) == (None, None)


def judged(condition: str, report: TraceReport | None = None) -> CheckResult:
    (limit,) = parse_limits([condition])
    return judge_limit(limit, report_measures(report or make_trace_report(two_iterations())))


@pytest.mark.parametrize(
    ("condition", "status"),
    [
        ("exposed.max_us > 0.039", Status.INVALID),
        ("exposed.max_us > 0.05", Status.VALID),
        ("overlap.balancer < 0.4", Status.INVALID),  # in iteration 1 alone
        ("overlap.balancer p50 < 0.4", Status.VALID),
        ("overlap.balancer min<=0.33", Status.VALID),
        ("unknown.share >= 0.05", Status.INVALID),
        ("unknown.share == 0", Status.VALID),
        ("unknown.share != 0", Status.INVALID),
        ("skew.max_us > 1e9", Status.UNKNOWN),
        ("overlap.reduction < 2", Status.UNKNOWN),
        ("balancedness.min < 0.5", Status.UNKNOWN),
    ],
)
def test_conditions(condition: str, status: Status) -> None:
    check = judged(condition)
    assert check.status is status
    assert check.name == f"limit {condition.split()[0]}"


@pytest.mark.parametrize(
    ("condition", "hint"),
    [
        ("", "write"), ("> 3", "write"), ("exposed.p95_us", "write"), ("exposed.p95_us > x", "write"),
        ("exposed.p95_us p50 > 3", "write"), ("exposed.p95 > 3", "did you mean 'exposed.p95_us'"),
        ("nothing.like.it > 3", "one of"), ("exposed.p95_us > 1e999", "write"),
    ],
)  # fmt: skip
def test_conditions_that_do_not_parse(condition: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_limits([condition])
    assert caught.value.code == "E081"
    assert hint in caught.value.hint

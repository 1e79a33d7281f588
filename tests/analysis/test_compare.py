"""Two traces of the same work: what counts as worse, and what is only noise."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.compare import METRICS, Change, Compared, Tolerance, compare_reports
from moe_eplb.analysis.measures import Measures
from moe_eplb.analysis.report import Report
from moe_eplb.analysis.trace_report import make_trace_report
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import Role
from moe_eplb.core.samples import paired_difference
from moe_eplb.core.verdict import Status

from .captures import MakeCapture

US = 1000


def _run(iterations: int, exposed_us: float, noise_us: float = 0.0, seed: int = 0, layers: int = 2) -> Report:
    """Iterations of 100 us of compute beside 30 us of statistics, some of them exposed after it."""
    drawn, made = random.Random(seed), MakeCapture()
    made.stream(7, "Main")
    for iteration in range(iterations):
        for layer in range(layers):
            begin = (iteration * layers + layer) * 1000 * US
            late = round((exposed_us + drawn.uniform(-noise_us, noise_us)) * US)
            where = {"iteration": iteration, "layer": layer}
            made.launched(Role.COMPUTE, begin, begin + 5, begin + 100 * US, 7, **where)
            made.launched(Role.EPLB_STATISTIC, begin + 3, begin + 70 * US + late, begin + 100 * US + late, 20, **where)
    return _report(made.done())


def _report(capture: Capture) -> Report:
    return Report("made", None, make_trace_report(capture), capture, Measures())


def _by_metric(compared: list[Compared]) -> dict[tuple[str, int], Compared]:
    return {(one.metric, one.layer): one for one in compared}


def test_a_trace_is_the_same_as_itself() -> None:
    run = _run(12, 10)
    compared, checks = compare_reports(run, run, Tolerance())
    assert {one.change for one in compared} == {Change.SAME}
    assert {check.status for check in checks} == {Status.VALID}
    assert {(one.metric, one.layer) for one in compared} == {
        ("step", -1), ("exposed", -1), ("statistic", -1), ("exposed", 0), ("exposed", 1),
    }  # fmt: skip


def test_more_exposed_work_is_worse_and_less_is_better() -> None:
    before, after = _run(12, 10, noise_us=2, seed=1), _run(12, 20, noise_us=2, seed=2)
    compared, checks = compare_reports(before, after, Tolerance())
    found = _by_metric(compared)
    worse = found["exposed", -1]
    assert worse.change is found["exposed", 0].change is found["exposed", 1].change is Change.WORSE
    assert worse.difference is not None
    assert worse.difference.low < 20 < worse.difference.high + 3
    assert found["statistic", -1].change is Change.SAME
    by_name = {check.name: check for check in checks}
    assert by_name["compare exposed"].status is Status.INVALID
    assert by_name["compare statistic"].status is Status.VALID
    back = _by_metric(compare_reports(after, before, Tolerance())[0])
    assert back["exposed", -1].change is Change.BETTER


def test_noise_is_not_worse() -> None:
    """Runs that differ by noise alone: hardly any is called worse, though no tolerance helps."""
    worse = 0
    for seed in range(60):
        a, b = (_run(10, 10, noise_us=4, seed=1000 * k + seed, layers=1) for k in (1, 2))
        found = _by_metric(compare_reports(a, b, Tolerance(share=0, floor_us=0))[0])
        worse += found["exposed", -1].change is Change.WORSE
    assert worse <= 6  # 2.5 % of 60 are expected


def test_small_differences_are_allowed() -> None:
    before, after = _run(12, 10), _run(12, 10.4)
    assert _by_metric(compare_reports(before, after, Tolerance(0.05, 1.0))[0])["exposed", -1].change is Change.SAME
    assert _by_metric(compare_reports(before, after, Tolerance(0.05, 0))[0])["exposed", -1].change is Change.SAME
    assert _by_metric(compare_reports(before, after, Tolerance(0.01, 0))[0])["exposed", -1].change is Change.WORSE


def test_too_few_iterations_in_common_are_unknown() -> None:
    compared, checks = compare_reports(_run(12, 10), _run(9, 99), Tolerance())
    assert {one.change for one in compared} == {Change.UNKNOWN}
    assert {check.status for check in checks} == {Status.UNKNOWN}
    assert "9 iterations in common, 10 are needed" in checks[0].observed
    assert compare_reports(_run(12, 10), _run(9, 99), Tolerance(pairs=9))[1][1].status is Status.INVALID


def test_only_gates_are_judged() -> None:
    _, checks = compare_reports(_run(12, 10), _run(12, 99), Tolerance(), ["statistic"])
    assert [(check.name, check.status) for check in checks] == [("compare statistic", Status.VALID)]


def test_what_only_one_trace_has_cannot_be_judged() -> None:
    capture = _run(12, 10).capture
    assert capture is not None
    without = _report(capture.with_tables({"gpu": capture.gpu[capture.gpu["stream"] == 7]}))
    by_name = {check.name: check.status for check in compare_reports(_run(12, 10), without, Tolerance())[1]}
    assert by_name == {
        "compare step": Status.VALID, "compare exposed": Status.UNKNOWN, "compare statistic": Status.UNKNOWN,
    }  # fmt: skip


def test_a_run_without_a_trace_cannot_be_compared() -> None:
    with pytest.raises(TraceError, match="nothing to compare"):
        compare_reports(_run(2, 1), Report("bare", None, None, None, Measures()), Tolerance())


def test_metrics_have_a_meaning() -> None:
    assert all(METRICS.values())


@given(st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)), min_size=1, max_size=40))
def test_a_difference_lies_in_its_interval(pairs: list[tuple[float, float]]) -> None:
    first, second = zip(*pairs, strict=True)
    found = paired_difference(first, second)
    assert found.low <= found.median <= found.high
    swapped = paired_difference(second, first)
    assert swapped.median == pytest.approx(-found.median)

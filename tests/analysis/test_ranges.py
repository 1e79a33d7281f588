"""Ranges around launches against looking at each range, nested or not."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.ranges import Launches, RangeIndex, match_pairs, project
from tests.analysis.captures import MakeCapture

_RANGE = st.tuples(st.integers(0, 20), st.integers(-1, 15), st.integers(0, 2), st.integers(0, 1), st.booleans())
_ASKED = st.tuples(st.integers(-2, 40), st.integers(0, 2), st.integers(0, 1))


def _ranges(rows: list[tuple[int, int, int, int, bool]]) -> np.ndarray:
    table = c.filled(c.RANGE, len(rows))
    for number, (start, length, thread, process, mark) in enumerate(rows):
        end = c.UNKNOWN if length < 0 else start + length
        table[number]["start"], table[number]["end"] = start, end
        table[number]["thread"], table[number]["process"] = thread, process
        table[number]["kind"] = c.MARK if mark else c.PUSH_POP
    return table


@settings(max_examples=600, deadline=None)
@given(st.lists(_RANGE, max_size=14), st.lists(_ASKED, min_size=1, max_size=10), st.booleans())
def test_the_innermost_is_the_open_one_that_was_opened_last(
    rows: list[tuple[int, int, int, int, bool]], asked: list[tuple[int, int, int]], any_thread: bool
) -> None:
    table = _ranges(rows)
    moments, threads, processes = (np.array(column, np.int64) for column in zip(*asked, strict=True))
    found = RangeIndex(table, any_thread).around(processes, moments, threads)
    for row, (moment, thread, process) in zip(found.tolist(), asked, strict=True):
        fitting = [
            number
            for number, (start, length, of_thread, of_process, mark) in enumerate(rows)
            if not mark and of_process == process and (any_thread or of_thread == thread)
            if start <= moment and (length < 0 or moment <= start + length)
        ]
        latest = max((rows[number][0] for number in fitting), default=None)
        assert (row == c.UNKNOWN) == (not fitting)
        if fitting:
            assert row in fitting
            assert rows[row][0] == latest


def test_a_path_leads_from_outside_to_inside() -> None:
    table = _ranges([(0, 100, 0, 0, False), (10, 20, 0, 0, False), (12, 5, 0, 0, False), (40, 5, 0, 0, False)])
    assert RangeIndex(table).path(2) == [0, 1, 2]
    assert RangeIndex(table).path(3) == [0, 3]


def test_a_hundred_thousand_ranges_within_each_other() -> None:
    depth = 100_000
    table = _ranges([(0, 0, 0, 0, False)] * depth)
    table["start"], table["end"] = np.arange(depth), 10 * depth - np.arange(depth)
    moments = np.array([depth, 10 * depth - depth // 2, 10 * depth], np.int64)
    found = RangeIndex(table).around(np.zeros(3, np.int64), moments, np.zeros(3, np.int64))
    assert found.tolist() == [depth - 1, depth // 2, 0]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(-3, 3)] * 2), max_size=8),
    st.lists(st.tuples(*[st.integers(-3, 3)] * 2), max_size=8),
)
def test_pairs_find_their_first_equal(wanted: list[tuple[int, int]], keys: list[tuple[int, int]]) -> None:
    for scale in (1, 1 << 44):  # the second is beyond what fits beside the other number
        a, b, x, y = (
            np.array([pair[i] * (scale if i else 1) for pair in pairs], np.int64)
            for pairs in (wanted, keys)
            for i in (0, 1)
        )
        found = match_pairs(a, b, x, y)
        assert found.tolist() == [keys.index(pair) if pair in keys else c.UNKNOWN for pair in wanted]


def test_projection_by_thread_and_by_process() -> None:
    made = MakeCapture()
    made.range("step", 0, 100)
    made.range("step", 200, 300)
    made.launched(None, 10, 50, 60)
    made.launched(None, 20, 70, 90, thread=2)
    made.launched(None, 210, 400, 410)
    capture = made.done()
    assert [(p.instances, p.events, p.span_ns, p.busy_ns) for p in project(capture)] == [(2, 2, 20, 20)]
    (both,) = project(capture, any_thread=True)
    assert (both.instances, both.events, both.span_ns, both.busy_ns) == (2, 3, 50, 40)


def test_a_range_of_the_own_thread_counts_before_one_of_another() -> None:
    made = MakeCapture()
    made.range("outer of another thread, opened later", 5, 100, thread=2)
    made.range("own", 0, 100)
    made.launched(None, 10, 50, 60)
    made.launched(None, 20, 61, 62, thread=3)
    capture = made.done()
    around = Launches(capture).around(capture.ranges)
    assert [capture.names[capture.ranges["text"][row]] for row in around] == [
        "own", "outer of another thread, opened later",
    ]  # fmt: skip

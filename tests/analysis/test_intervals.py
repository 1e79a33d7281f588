"""Every function against a naive twin that counts the points of a small time axis one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis import intervals
from moe_eplb.analysis.intervals import Intervals

MOMENTS = 40
PAIRS = st.lists(
    st.tuples(st.integers(0, MOMENTS), st.integers(0, MOMENTS)).map(lambda p: (min(p), max(p))), max_size=12
)


def _points(pairs: Intervals | list[tuple[int, int]]) -> set[int]:
    return {moment for start, end in pairs for moment in range(start, end)}


def _union(pairs: list[tuple[int, int]]) -> Intervals:
    return intervals.union(intervals.intervals([p[0] for p in pairs], [p[1] for p in pairs]))


@settings(max_examples=80, deadline=None)
@given(PAIRS)
def test_union_is_the_same_points_disjoint_and_in_order(pairs: list[tuple[int, int]]) -> None:
    union = _union(pairs)
    assert _points(union.tolist()) == _points(pairs)
    assert intervals.length(union) == len(_points(pairs))
    assert (union[1:, 0] > union[:-1, 1]).all(), "touching intervals must be merged"
    assert (union[:, 1] > union[:, 0]).all()


@settings(max_examples=80, deadline=None)
@given(PAIRS, PAIRS)
def test_intersections_count_common_points(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    assert intervals.intersect_length(_union(a), _union(b)) == len(_points(a) & _points(b))


@settings(max_examples=80, deadline=None)
@given(PAIRS, st.lists(st.integers(-2, MOMENTS + 2)))
def test_coverage_counts_points_before_a_moment(pairs: list[tuple[int, int]], moments: list[int]) -> None:
    expected = [sum(point < moment for point in _points(pairs)) for moment in moments]
    assert intervals.coverage(_union(pairs), np.array(moments, dtype=np.int64)).tolist() == expected


@settings(max_examples=80, deadline=None)
@given(PAIRS, PAIRS)
def test_clip_keeps_the_covered_points_of_each_interval(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    pairs = intervals.intervals([p[0] for p in a], [p[1] for p in a])
    pieces, owner = intervals.clip(pairs, _union(b))
    for index, pair in enumerate(pairs.tolist()):
        assert _points(pieces[owner == index].tolist()) == _points([tuple(pair)]) & _points(b)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(PAIRS.map(lambda pairs: pairs[:1]), st.integers(0, 4)), max_size=15))
def test_grouped_length_is_each_groups_own_union(tagged: list[tuple[list[tuple[int, int]], int]]) -> None:
    members = [(pair, group) for pairs, group in tagged for pair in pairs]
    pairs = np.array([pair for pair, _ in members], dtype=np.int64).reshape(-1, 2) + 10**15
    groups = np.array([group for _, group in members], dtype=np.int64)
    expected = [len(_points([pair for pair, group in members if group == g])) for g in range(5)]
    assert intervals.grouped_length(pairs, groups, 5).tolist() == expected


@settings(max_examples=300, deadline=None)
@given(PAIRS, PAIRS)
def test_subtraction_leaves_the_points_of_one_alone(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> None:
    rest = intervals.subtract(_union(a), _union(b))
    assert _points(rest.tolist()) == _points(a) - _points(b)
    assert (rest[1:, 0] > rest[:-1, 1]).all()
    assert intervals.length(rest) == intervals.length(_union(a)) - intervals.intersect_length(_union(a), _union(b))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, MOMENTS), st.integers(0, 3), st.booleans()), max_size=10))
def test_groups_that_together_span_more_than_numbers_hold(starts: list[tuple[int, int, bool]]) -> None:
    far, chosen = 1 << 61, [(start + (1 << 61) * late, group) for start, group, late in starts]
    chosen += [(moment, group) for group in range(4) for moment in (-far, far)]
    pairs = np.array([(start, start + 5) for start, _ in chosen], np.int64)
    groups = np.array([group for _, group in chosen], np.int64)
    expected = [len(_points([(s, s + 5) for s, group in chosen if group == g])) for g in range(5)]
    assert intervals.grouped_length(pairs, groups, 5).tolist() == expected


def test_nanoseconds_of_this_century_stay_exact() -> None:
    start = 1_800_000_000 * 10**9 + 1
    union = intervals.union(intervals.intervals([start, start + 2], [start + 1, start + 3]))
    assert intervals.length(union) == 2
    assert intervals.coverage(union, [start + 3]).tolist() == [2]


def test_nothing_covers_nothing() -> None:
    assert intervals.length(intervals.union(intervals.EMPTY)) == 0
    assert intervals.intersect_length(intervals.EMPTY, intervals.EMPTY) == 0
    assert intervals.coverage(intervals.EMPTY, [3]).tolist() == [0]


def test_an_end_before_its_start_is_an_error() -> None:
    with pytest.raises(ValueError, match="interval 1 ends at 3, before its start 5"):
        intervals.intervals([0, 5], [1, 3])

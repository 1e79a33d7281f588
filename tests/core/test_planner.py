from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement, balancedness
from moe_eplb.core.planner import initial_slots, keep_slots, place, plan, replicate


@st.composite
def problems(draw: st.DrawFn, *, experts: int = 10, ranks: int = 5) -> tuple[np.ndarray, int, int]:
    """A load [E], P slots, R ranks."""
    load = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=experts))
    count = draw(st.integers(1, ranks))
    fewest = -(-len(load) // count)
    return np.array(load, dtype=np.float64), count * draw(st.integers(fewest, fewest + 3)), count


def slots_by_rank(slots: np.ndarray, ranks: int) -> list[list[int]]:
    return slots.reshape(ranks, -1).tolist()


# -- replication -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "slots", "counts"),
    [
        ([1, 2, 3, 4], 4, [1, 1, 1, 1]),
        ([0, 0, 0, 0], 6, [2, 2, 1, 1]),
        ([1, 4, 2, 1], 8, [1, 4, 2, 1]),
        ([10, 5, 2, 15, 8], 9, [2, 1, 1, 3, 2]),
        ([0, 10, 0], 4, [1, 2, 1]),
    ],
)
def test_replication_is_that_of_the_reference(load: list[int], slots: int, counts: list[int]) -> None:
    assert replicate(np.array(load), slots).tolist() == counts


def test_the_higher_expert_wins_a_tie() -> None:
    assert replicate(np.array([5, 5, 5]), 4).tolist() == [1, 1, 2]


@settings(max_examples=60, deadline=None)
@given(problems(experts=4, ranks=2))
def test_replication_is_the_best_there_is(problem: tuple[np.ndarray, int, int]) -> None:
    load, slots, _ = problem
    cuts = combinations(range(1, slots), len(load) - 1)
    all_counts = [np.diff([0, *cut, slots]) for cut in cuts]
    best = min(float((load / counts).max()) for counts in all_counts)
    counts = replicate(load, slots)
    assert counts.sum() == slots
    assert counts.min() >= 1
    assert float((load / counts).max()) == best


def test_too_few_slots_are_refused() -> None:
    with pytest.raises(BalancerError, match=r"3 slots cannot hold 4 experts") as caught:
        replicate(np.ones(4), 3)
    assert caught.value.code == "E131"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_load_that_is_no_load_is_refused(bad: float) -> None:
    with pytest.raises(BalancerError, match="expert 1") as caught:
        replicate(np.array([1.0, bad, 2.0]), 4)
    assert caught.value.code == "E149"


# -- placement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "counts", "ranks", "spread"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], 2, 0.001),
        ([1, 3, 2, 1], [1, 2, 2, 1], 2, 0.01),
        ([10, 5, 2, 15, 8], [2, 1, 1, 3, 2], 3, 2.0),
        ([1, 100, 10], [1, 2, 1], 2, 9.0),
        ([2, 3, 4, 5, 6, 7], [1] * 6, 2, 1.0),
    ],
)
def test_rank_loads_differ_no_more_than_in_the_reference(
    load: list[int], counts: list[int], ranks: int, spread: float
) -> None:
    slots = place(np.array(load), np.array(counts), ranks)
    assert np.bincount(slots).tolist() == counts
    per_rank = Placement(ranks, len(load), slots).rank_load(np.array(load))
    assert per_rank.max() - per_rank.min() <= spread + 1e-9


def test_the_heaviest_go_first_to_the_lightest_rank() -> None:
    slots = place(np.array([8.0, 3.0, 9.0, 4.0, 2.0, 1.0]), np.ones(6, dtype=np.int64), 3)
    assert slots_by_rank(slots, 3) == [[2, 5], [0, 4], [3, 1]]
    assert slots.dtype == np.int32


def test_without_a_load_slots_fill_in_order_of_experts_and_ranks() -> None:
    assert slots_by_rank(place(np.zeros(4), np.ones(4, dtype=np.int64), 2), 2) == [[0, 1], [2, 3]]


# -- slot preservation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "old", "new", "kept", "changed"),
    [
        (2, [0, 1, 2, 3, 4, 5, 6, 7], [1, 5, 0, 4, 6, 2, 7, 3], [0, 1, 5, 4, 2, 3, 6, 7], (8, 4)),
        (2, [0, 1, 0, 2, 3, 4, 5, 6, 1, 2], [0, 5, 4, 0, 1, 6, 2, 3, 2, 1], [0, 1, 0, 5, 4, 3, 2, 6, 1, 2], (9, 4)),
        (3, [0, 1, 2, 3] * 3, [0] * 8 + [1, 2, 3, 0], [0] * 8 + [0, 1, 2, 3], (10, 6)),
    ],
)
def test_an_expert_that_stays_on_its_rank_stays_in_its_slot(
    ranks: int, old: list[int], new: list[int], kept: list[int], changed: tuple[int, int]
) -> None:
    before, after = np.array(old, dtype=np.int32), np.array(new, dtype=np.int32)
    found = keep_slots(before, after, ranks)
    assert found.tolist() == kept
    assert (int((before != after).sum()), int((before != found).sum())) == changed


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_keeping_slots_moves_as_little_as_possible_within_ranks(ranks: int, width: int, data: st.DataObject) -> None:
    layouts = st.lists(st.integers(0, 5), min_size=ranks * width, max_size=ranks * width)
    before, after = (np.array(data.draw(layouts), dtype=np.int32) for _ in range(2))
    kept = keep_slots(before, after, ranks)
    for old, new, found in zip(*(slots_by_rank(slots, ranks) for slots in (before, after, kept)), strict=True):
        assert sorted(found) == sorted(new)
        staying = sum((Counter(old) & Counter(new)).values())
        assert sum(a != b for a, b in zip(old, found, strict=True)) == width - staying
    assert (before != kept).sum() <= (before != after).sum()


# -- the plan ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(problems(), st.booleans())
def test_a_plan_is_a_placement_that_conserves_the_load(
    problem: tuple[np.ndarray, int, int], preserve_slots: bool
) -> None:
    load, slots, ranks = problem
    current = Placement(ranks, len(load), initial_slots(len(load), ranks, slots // ranks))
    found = plan(load, current, preserve_slots=preserve_slots)
    assert found.placement.replica_count.tolist() == replicate(load, slots).tolist()
    assert found.changed.tolist() == found.placement.changed_slots(current).tolist()
    np.testing.assert_array_equal(found.predicted, found.placement.rank_load(load))
    np.testing.assert_allclose(found.predicted.sum(), load.sum(), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_preserving_slots_changes_fewer_slots_and_no_load(problem: tuple[np.ndarray, int, int]) -> None:
    load, slots, ranks = problem
    current = Placement(ranks, len(load), initial_slots(len(load), ranks, slots // ranks))
    kept, plain = plan(load, current), plan(load, current, preserve_slots=False)
    assert len(kept.changed) <= len(plain.changed)
    np.testing.assert_allclose(kept.predicted, plain.predicted, rtol=1e-12)


def test_slots_are_preserved_unless_that_is_switched_off() -> None:
    load, current = np.array([1.0, 2.0, 3.0, 4.0]), Placement(2, 4, np.array([0, 3, 1, 2]))
    kept, plain = plan(load, current), plan(load, current, preserve_slots=False)
    assert (kept.placement.slot_to_expert.tolist(), kept.changed.tolist()) == ([0, 3, 1, 2], [])
    assert (plain.placement.slot_to_expert.tolist(), plain.changed.tolist()) == ([3, 0, 2, 1], [0, 1, 2, 3])


def test_a_second_plan_for_the_same_load_moves_nothing() -> None:
    load = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
    first = plan(load, Placement(8, 8, initial_slots(8, 8, 2)))
    assert len(first.changed) > 0
    assert len(plan(load, first.placement).changed) == 0


def test_a_skewed_load_at_full_size_ends_up_balanced() -> None:
    load = 1e6 / np.arange(1, 257)
    current = Placement(32, 256, initial_slots(256, 32, 9))
    assert float(balancedness(current.rank_load(load))) < 0.2
    assert float(balancedness(plan(load, current).predicted)) > 0.98


# -- the beginning -----------------------------------------------------------------------------------------------------


def test_the_experts_begin_where_the_reference_puts_them() -> None:
    assert slots_by_rank(initial_slots(8, 4, 3), 4) == [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 0]]
    assert slots_by_rank(initial_slots(5, 3, 2), 3) == [[0, 1], [1, 2], [3, 4]]


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_every_expert_has_a_slot_at_the_beginning(experts: int, ranks: int, spare: int) -> None:
    per_rank = -(-experts // ranks) + spare
    slots = initial_slots(experts, ranks, per_rank)
    assert slots.dtype == np.int32
    assert Placement(ranks, experts, slots).replica_count.min() >= 1

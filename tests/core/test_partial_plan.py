"""Parts of a plan: small, whole placements, and together they lead to the plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.partial_plan import part_of
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import initial_slots, plan


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, Placement, np.ndarray, int]:
    ranks, per_rank = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    experts = draw(st.integers(1, ranks * per_rank))
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(2):
        slots = np.concatenate((np.arange(experts), rng.integers(0, experts, ranks * per_rank - experts)))
        made.append(Placement(ranks, experts, rng.permutation(slots).astype(np.int32)))
    return made[0], made[1], rng.random(experts), draw(st.integers(1, per_rank))


def refused(*arguments: Any) -> bool:
    try:
        part_of(*arguments)
    except BalancerError as error:
        return error.code == "E175"
    return False


@given(placements())
def test_parts_are_placements_on_the_way_and_arrive(given_: tuple[Placement, Placement, np.ndarray, int]) -> None:
    current, target, load, most = given_
    for _ in range(current.slots + 1):
        left = len(target.changed_slots(current))
        if not left:
            return
        if most < current.slots_per_rank and refused(current, target, load, most):
            return
        part = part_of(current, target, load, most)  # itself refuses an expert without a slot
        changed = part.changed_slots(current)
        assert 0 < len(changed) <= current.slots
        assert np.bincount(changed // current.slots_per_rank).max() <= most
        assert (part.slot_to_expert[changed] == target.slot_to_expert[changed]).all()
        current = part
    pytest.fail("it never arrives")


def test_with_room_for_all_the_part_is_the_whole() -> None:
    current = Placement(2, 8, initial_slots(8, 2, 5))
    load = np.arange(8.0)
    whole = plan(load, current).placement
    assert (plan(load, current, most_changes=5).placement.slot_to_expert == whole.slot_to_expert).all()


def test_what_brings_most_load_goes_first() -> None:
    current = Placement(1, 3, np.array([0, 1, 2, 0, 0]))
    target = Placement(1, 3, np.array([0, 1, 2, 1, 2]))
    part = part_of(current, target, np.array([1.0, 5.0, 9.0]), 1)
    assert part.slot_to_expert.tolist() == [0, 1, 2, 0, 2]


def test_single_replicas_change_places_together_or_not_at_all() -> None:
    current, target = Placement(2, 2, np.array([0, 1])), Placement(2, 2, np.array([1, 0]))
    assert part_of(current, target, np.ones(2), 1).slot_to_expert.tolist() == [1, 0]
    current, target = Placement(1, 2, np.array([0, 1])), Placement(1, 2, np.array([1, 0]))
    with pytest.raises(BalancerError, match="single replica"):
        part_of(current, target, np.ones(2), 1)

"""Cells are assigned alike by every rank that knows the same plans."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.balancer.cells import assign_cells
from moe_eplb.core.errors import BalancerError


def slow_twin(current: list[list[int]], changed: list[int], cells: int) -> list[list[int]]:
    """One slot after the other, each into its rank's lowest cell that is free and not taken yet."""
    after = [list(row) for row in current]
    for number in changed:
        rank, slot = divmod(number, len(current[0]))
        taken = set(current[rank]) | set(after[rank])
        after[rank][slot] = min(set(range(cells)) - taken)
    return after


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[int]], list[int], int]:
    ranks, slots, spare = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(0, 6))
    current = [draw(st.permutations(range(slots + spare)))[:slots] for _ in range(ranks)]
    changed = [
        rank * slots + slot
        for rank in range(ranks)
        for slot in sorted(draw(st.sets(st.integers(0, slots - 1), max_size=min(spare, slots))))
    ]
    return current, changed, slots + spare


@given(cases())
def test_cells_are_those_of_the_slow_twin(case: tuple[list[list[int]], list[int], int]) -> None:
    current, changed, cells = case
    table = np.array(current, np.int32)
    found = assign_cells(table, np.array(changed, np.int64), cells, layer=0, first_rank=0)
    assert found.tolist() == slow_twin(current, changed, cells)
    assert table.tolist() == current, "what is live was not touched"


@given(cases())
def test_what_one_rank_finds_for_itself_is_what_all_find_for_it(case: tuple[list[list[int]], list[int], int]) -> None:
    current, changed, cells = case
    slots = len(current[0])
    all_ranks = assign_cells(np.array(current), np.array(changed, np.int64), cells, layer=0, first_rank=0)
    for rank, row in enumerate(current):
        mine = np.array([number - rank * slots for number in changed if number // slots == rank], np.int64)
        alone = assign_cells(np.array([row]), mine, cells, layer=0, first_rank=rank)
        assert alone[0].tolist() == all_ranks[rank].tolist()


def test_too_few_cells_are_told_with_the_rank_that_lacks_them() -> None:
    with pytest.raises(BalancerError, match=r"layer 7: 2 slots of rank 5 change at once") as info:
        assign_cells(np.array([[0, 1], [1, 2]]), np.array([0, 2, 3]), 3, layer=7, first_rank=4)
    assert info.value.code == "E172"
    assert info.value.why == "1 of 3 cells are free"

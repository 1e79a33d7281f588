"""Single steps of the local search against trying everything and adding up anew."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moe_eplb.planning.kernels import new_state, set_layer
from moe_eplb.planning.kernels.fixes import find_fix
from moe_eplb.planning.kernels.rounds import LONGEST, new_ways, set_ways
from moe_eplb.planning.kernels.steps import best_free_swap, best_replace, best_swap
from moe_eplb.planning.policies import solve
from moe_eplb.planning.problem import Problem, rank_loads

Slots = np.ndarray[Any, np.dtype[np.int32]]
SIZES = [(3, 12, 18), (4, 10, 20), (6, 30, 42), (5, 12, 15)]


class Case:
    """A layer whose load has drifted away from its placement, and its heaviest rank."""

    def __init__(self, seed: int, ranks: int, experts: int, slots: int) -> None:
        rng = np.random.default_rng(seed)
        load = np.exp(rng.normal(0, 1, (1, experts)))
        self.home = solve(Problem(load, ranks, slots), "greedy").slots[0]
        self.load = load[0] * np.exp(rng.normal(0, 0.3, experts))
        self.size = slots // ranks
        self.first = np.arange(ranks + 1, dtype=np.int64) * self.size
        self.state = new_state(experts, self.first)
        set_layer(self.state, self.load, self.home)
        self.held = self.weigh(self.home)
        self.heaviest = int(np.argmax(self.held))

    def weigh(self, slots: Slots) -> np.ndarray[Any, np.dtype[np.float64]]:
        return rank_loads(slots[np.newaxis], self.load[np.newaxis], self.first)[0]

    def legal(self, slots: Slots) -> bool:
        apart = all(len(set(row)) == self.size for row in slots.reshape(-1, self.size).tolist())
        return apart and len(set(slots.tolist())) == len(self.load)

    def swaps(self) -> Iterator[Slots]:
        for one in range(len(self.home)):
            for two in range(len(self.home)):
                if one // self.size == self.heaviest != two // self.size:
                    slots = self.home.copy()
                    slots[[one, two]] = slots[[two, one]]
                    if self.legal(slots):
                        yield slots

    def replacements(self) -> Iterator[Slots]:
        for slot in range(len(self.home)):
            for expert in range(len(self.load)):
                slots = self.home.copy()
                slots[slot] = expert
                if expert != self.home[slot] and self.legal(slots):
                    yield slots

    def top(self, slots: Slots) -> float:
        """The largest load of the heaviest rank and of those that lost an expert or that hold one that did."""
        changed = np.flatnonzero(slots != self.home)
        gone = self.home[changed] if len(changed) == 1 else self.home[:0]
        touched = np.isin(self.home.reshape(-1, self.size), gone).any(axis=1)
        touched[[self.heaviest, *(changed // self.size)]] = True
        return float(self.weigh(slots)[touched].max())


@pytest.mark.parametrize(("ranks", "experts", "slots"), SIZES)
@pytest.mark.parametrize("seed", range(8))
def test_the_best_exchange_is_that_of_trying_all(seed: int, ranks: int, experts: int, slots: int) -> None:
    case = Case(seed, ranks, experts, slots)
    gains = [case.held[case.heaviest] - case.top(one) for one in case.swaps()]
    order, best = np.argsort(case.held), max(0.0, *gains)
    carried = case.state.share[case.home]
    gain, one, two = best_free_swap(case.state, case.heaviest, False, carried, np.repeat(case.held, case.size))
    assert gain == pytest.approx(best)
    if best > 0:
        there = case.home.copy()
        there[[one, two]] = there[[two, one]]
        assert case.held[case.heaviest] - case.top(there) == pytest.approx(best)
    for home, moves in ((np.empty(0, np.int32), 1), (case.home, 2)):
        each, _, _ = best_swap(case.state, case.heaviest, order, False, home, slots, np.inf)
        assert each == pytest.approx(best / moves)


@pytest.mark.parametrize(("ranks", "experts", "slots"), SIZES)
@pytest.mark.parametrize("seed", range(8))
def test_the_best_change_of_a_replica_is_that_of_trying_all(seed: int, ranks: int, experts: int, slots: int) -> None:
    case = Case(seed, ranks, experts, slots)
    gains = [case.held[case.heaviest] - case.top(one) for one in case.replacements()]
    gain, slot, new = best_replace(case.state, case.heaviest, False, np.empty(0, np.int32), 2, np.inf, 0.0)
    best = max([0.0, *gains])
    assert gain == pytest.approx(best)
    if best > 0:
        there = case.home.copy()
        there[slot] = new
        assert case.held[case.heaviest] - case.top(there) == pytest.approx(best)


@pytest.mark.parametrize(("ranks", "experts", "slots"), SIZES)
@pytest.mark.parametrize("seed", range(8))
def test_a_fix_leaves_nothing_above_the_target_and_is_found_where_two_slots_do(
    seed: int, ranks: int, experts: int, slots: int
) -> None:
    case = Case(seed, ranks, experts, slots)
    chosen, ways = np.empty(LONGEST, np.int64), new_ways(slots)
    order = np.argsort(case.held)
    for target in np.linspace(case.held.mean() * 1.001, case.held.max() * 0.999, 7):
        set_ways(case.state, target, ways)
        count = find_fix(case.state, case.heaviest, target, order, False, case.home, slots, ways, chosen)
        two = any(case.top(one) <= target and case.weigh(one)[case.heaviest] <= target for one in case.swaps())
        assert count > 0 or not two
        if count == 0:
            continue
        after = case.home.copy()
        after[chosen[:count]] = case.home[np.roll(chosen[:count], 1)]
        assert case.legal(after)
        assert len(set((chosen[:count] // case.size).tolist())) == count
        touched = np.unique(chosen[:count] // case.size)
        assert (case.weigh(after)[touched] <= target * (1 + 1e-12)).all()
        assert case.heaviest in touched
        assert find_fix(case.state, case.heaviest, target, order, False, case.home, 1, ways, chosen) == 0


def test_one_rank_with_room_serves_several_that_are_too_heavy() -> None:
    """Each has to change a slot: a round over all of them changes no more."""
    held = np.array([[10.0, 4.0], [9.0, 4.8], [8.0, 5.6], [7.0, 3.0], [2.0, 1.0]])
    slots, first = np.arange(10, dtype=np.int32), np.arange(0, 12, 2, dtype=np.int64)
    state, ways, chosen = new_state(10, first), new_ways(10), np.empty(LONGEST, np.int64)
    set_layer(state, held.reshape(-1), slots)
    target, order = 13.4, np.argsort(state.held)
    set_ways(state, target, ways)
    count = find_fix(state, 0, target, order, False, slots, 10, ways, chosen)
    after = slots.copy()
    after[chosen[:count]] = slots[np.roll(chosen[:count], 1)]
    assert count == 4
    assert held.reshape(-1)[after].reshape(5, 2).sum(axis=1).max() <= target

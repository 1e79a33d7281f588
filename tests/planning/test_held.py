"""Layers that are held keep what they have, and leave the budget of moves to the others."""

from __future__ import annotations

import numpy as np
import pytest

from moe_eplb.core.errors import UsageError
from moe_eplb.core.planner import initial_slots
from moe_eplb.planning.policies import POLICIES, solve
from moe_eplb.planning.problem import Problem
from moe_eplb.planning.usable import usable

START = np.tile(initial_slots(16, 4, 6), (3, 1))


def _problem(held: tuple[int, ...] = (), budget: int | None = None, heavy: float = 1.0) -> Problem:
    load = np.exp(np.random.default_rng(2).normal(0, 1, (1, 3, 16)))
    load[:, 0] *= heavy
    return Problem(load, 4, 24, current=START, max_moves=budget, held=held)


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"static"}))
def test_held_layers_keep_their_slots_and_others_move(policy: str) -> None:
    free, held = solve(_problem(), policy), solve(_problem((0, 2)), policy)
    assert (free.slots != START).any(axis=1).all()
    assert (held.slots != START).any(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize("policy", ["incremental", "robust"])
def test_no_moves_are_spent_on_held_layers(policy: str) -> None:
    """Left to itself the budget goes to the layer with by far the most load."""
    free, held = (solve(_problem(layers, 3, heavy=1000.0), policy).slots != START for layers in ((), (0,)))
    assert 0 < free[0].sum() <= 3
    assert free[1:].sum() == 0
    assert held[0].sum() == 0
    assert 0 < held[1:].sum() <= 3


@pytest.mark.parametrize("policy", ["incremental", "robust"])
def test_a_held_layer_is_not_repaired(policy: str) -> None:
    """Else the repair, which is undone, would be paid for by the others."""
    current = START.copy()
    current[0, :6] = [0, 0, 0, 1, 1, 1]
    loads = np.exp(np.random.default_rng(2).normal(0, 1, (1, 3, 16)))
    found = [solve(Problem(loads, 4, 24, current=start, max_moves=4, held=(0,)), policy) for start in (START, current)]
    assert np.array_equal(found[1].slots[0], current[0])
    assert np.array_equal(found[0].slots[1:], found[1].slots[1:])
    assert found[1].notes == ()


@pytest.mark.parametrize("layers", [(3,), (0, -1)])
def test_layers_that_do_not_exist_are_not_held(layers: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"E190.*held layer does not exist\n.*of 3 layers"):
        _problem(layers)


def test_layers_that_hold_nothing_are_not_held() -> None:
    with pytest.raises(UsageError, match=r"(?s)E190.*layers \(1,\) are held.*give the current placement"):
        Problem(np.ones((1, 3, 16)), 4, 24, held=(1,))


def test_a_held_layer_keeps_what_lies_on_a_masked_rank() -> None:
    problem = Problem(np.ones((1, 3, 16)), 4, 24, current=START, held=(0, 1, 2), masked_ranks=(3,))
    home, notes = usable(problem)
    assert np.array_equal(home, START)
    assert notes == ()

"""Bounds that nothing beats, and what a certificate says of a plan."""

from __future__ import annotations

import json

import numpy as np
import pytest

from moe_eplb.planning.bounds import free_split
from moe_eplb.planning.certificate import Links, certify
from moe_eplb.planning.policies import solve
from moe_eplb.planning.problem import Problem, Solution


def _free_by_linear_program(load: np.ndarray, slots: list[int], ranks: int) -> float:
    from scipy.optimize import linprog

    size, held = len(slots) // ranks, [slot for slot, expert in enumerate(slots) if expert >= 0]
    column = {slot: number for number, slot in enumerate(held)}
    equal = np.zeros((len(load), len(held) + 1))
    less = np.zeros((ranks, len(held) + 1))
    for slot in held:
        equal[slots[slot], column[slot]] = 1
        less[slot // size, column[slot]] = 1
    less[:, -1] = -1
    goal = np.zeros(len(held) + 1)
    goal[-1] = 1
    return float(linprog(goal, A_ub=less, b_ub=np.zeros(ranks), A_eq=equal, b_eq=load).fun)


@pytest.mark.parametrize("seed", range(30))
def test_a_free_split_is_that_of_the_linear_program(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 8))
    experts = int(rng.integers(ranks, 4 * ranks))
    size = min(-(-experts // ranks) + int(rng.integers(0, 3)), experts)
    load = np.round(np.exp(rng.normal(0, 1.5, (2, experts))) * 10)
    problem = Problem(load, ranks, ranks * size)
    slots = solve(problem, "static").slots
    found = free_split(problem, slots, load)
    for layer in range(2):
        assert found[layer] == pytest.approx(_free_by_linear_program(load[layer], slots[layer].tolist(), ranks))
    equal = Solution("x", slots, 0.0).rank_loads(load, problem).max(axis=1)
    assert (found <= equal * (1 + 1e-9)).all()


def test_a_free_split_of_nothing_and_with_empty_ranks() -> None:
    problem = Problem(np.array([[0.0, 0.0], [3.0, 1.0]]), 2, 4, masked_ranks=(1,))
    assert free_split(problem, np.array([[0, 1, -1, -1]] * 2, np.int32), problem.newest).tolist() == [0.0, 4.0]


def test_a_certificate_by_hand() -> None:
    """Two ranks, four experts of load 40 30 20 10, six slots; then expert 0 is given a replica on rank 1."""
    load = np.array([[40.0, 30.0, 20.0, 10.0]])
    there = np.array([[0, 1, 2, 3, 2, 1]], np.int32)  # 40 + 15 + 10, 10 + 10 + 15
    plan = Solution("by hand", np.array([[0, 1, 2, 3, 0, 1]], np.int32), 0.5)  # 20 + 15 + 20, 10 + 20 + 15
    problem = Problem(load, 2, 6, current=there)
    links = Links(slot_bytes=1_000_000, same_node_gb_s=1.0, us_per_token=2.0)
    found = certify(problem, plan, links, min_gain=0.1)
    (row,) = found.layers
    assert (row.before, row.largest, row.bound) == (65, 55, 50)
    assert (row.kept, row.moved) == (5, 1)
    assert found.balancedness == pytest.approx(50 / 55)
    assert found.before == pytest.approx(50 / 65)
    assert found.gain == pytest.approx(65 / 55 - 1)
    assert found.pays is True
    assert found.bytes_by_link == {"same_rank": 0, "same_node": 1_000_000, "cross_node": 0, "host": 0}
    assert found.migration_ms == pytest.approx(1.0)
    assert found.saved_us == pytest.approx(20)
    assert found.break_even == pytest.approx(1000 / 20)
    assert certify(problem, plan, links, min_gain=0.5).pays is False
    assert json.loads(json.dumps(found.to_json()))["layers"][0]["moved"] == 1


def test_links_go_by_nodes() -> None:
    load = np.ones((1, 8))
    there = np.arange(8, dtype=np.int32)[np.newaxis]
    moved = there.copy()
    moved[0, [0, 1]] = there[0, [1, 0]]  # within rank 0
    moved[0, [2, 4]] = there[0, [4, 2]]  # rank 1 of node 0 and rank 2 of node 1
    found = certify(Problem(load, 4, 8, nodes=2, current=there), Solution("x", moved, 0.0), Links(slot_bytes=1))
    assert found.bytes_by_link == {"same_rank": 2, "same_node": 0, "cross_node": 2, "host": 0}


def test_a_plan_that_brings_nothing_never_pays() -> None:
    load = np.ones((1, 4))
    there = np.array([[0, 1, 2, 3]], np.int32)
    found = certify(Problem(load, 2, 4, current=there), Solution("x", there[:, ::-1].copy(), 0.0))
    assert found.break_even == float("inf")
    assert found.to_json()["break_even"] is None
    assert certify(Problem(load, 2, 4), Solution("x", there, 0.0)).break_even is None

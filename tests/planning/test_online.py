"""Planners of running layers: equal to their twins, within their budgets, alike on every rank."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moe_eplb.core import planner
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement
from moe_eplb.planning import online
from moe_eplb.planning.online import HISTORY, OnlinePolicy, Planning, prepare

MOVING: list[OnlinePolicy] = ["incremental", "robust"]


def draw(seed: int) -> tuple[np.ndarray, Placement]:
    """A load with ties and zeros, and a placement that some other load led to."""
    random = np.random.default_rng(seed)
    ranks, experts = int(random.integers(1, 9)), int(random.integers(2, 40))
    per_rank = int(-(-experts // ranks) + random.integers(0, 4))
    first = planner.initial_slots(experts, ranks, per_rank)
    loads = random.integers(0, random.choice([3, 40, 10_000]), (2, experts)).astype(np.float64)
    current = planner.plan(loads[0], Placement(ranks, experts, first)).placement
    return loads[1] * float(random.choice([1.0, 0.3, 0.0])), current


@pytest.mark.parametrize("keep", [True, False])
def test_the_compiled_rules_are_those_of_the_twin(keep: bool) -> None:
    for seed in range(400):
        load, current = draw(seed)
        slow = planner.plan(load, current, preserve_slots=keep)
        fast = Planning(preserve_slots=keep, compiled=True).planner()(load, current)
        assert np.array_equal(fast.placement.slot_to_expert, slow.placement.slot_to_expert), seed
        assert np.array_equal(fast.changed, slow.changed)
        assert np.array_equal(fast.predicted, slow.predicted)


def test_the_compiled_rules_take_plans_in_parts_too() -> None:
    random = np.random.default_rng(5)
    current = Placement(4, 32, planner.initial_slots(32, 4, 10))
    for _ in range(20):
        load = random.gamma(0.5, 100.0, 32)
        slow = planner.plan(load, current, most_changes=2)
        fast = Planning(most_changes=2, compiled=True).planner()(load, current)
        assert np.array_equal(fast.placement.slot_to_expert, slow.placement.slot_to_expert)
        current = slow.placement


@pytest.mark.parametrize("policy", MOVING)
@pytest.mark.parametrize("budget", [0, 1, 5, None])
def test_a_plan_moves_no_more_than_it_may(policy: OnlinePolicy, budget: int | None) -> None:
    random = np.random.default_rng(7)
    planned = Planning(policy, moves=budget).planner()
    current = Placement(
        4, 32, planner.plan(np.ones(32), Placement(4, 32, planner.initial_slots(32, 4, 10))).placement.slot_to_expert
    )
    moved = 0
    for _ in range(6):
        made = planned(random.gamma(0.5, 100.0, 32), current)
        assert budget is None or len(made.changed) <= budget
        assert np.array_equal(made.changed, made.placement.changed_slots(current))
        current = made.placement
        moved += len(made.changed)
    assert moved or budget in (0, 1), "one move alone need not help: it may take an exchange"


def test_incremental_balances_as_a_plan_from_scratch_with_fewer_moves() -> None:
    random = np.random.default_rng(9)
    current = Placement(8, 64, planner.initial_slots(64, 8, 9))
    load = random.gamma(0.7, 100.0, 64)
    current = planner.plan(load, current).placement
    moves = {"incremental": 0, "reference": 0}
    for _ in range(10):
        load = load * random.lognormal(0, 0.05, 64)
        scratch, few = planner.plan(load, current), Planning("incremental").planner()(load, current)
        assert few.predicted.max() <= scratch.predicted.max() * 1.001
        moves["incremental"] += len(few.changed)
        moves["reference"] += len(scratch.changed)
        current = few.placement
    assert moves["incremental"] * 3 < moves["reference"]


def test_robust_plans_from_the_last_loads_and_no_older_ones() -> None:
    random = np.random.default_rng(11)
    current = Placement(4, 32, planner.initial_slots(32, 4, 10))
    loads = [random.gamma(0.5, 100.0, 32) for _ in range(HISTORY + 3)]
    remembers, began_later = Planning("robust").planner(), Planning("robust").planner()
    for load in loads[:-1]:
        remembers(load, current)
    for load in loads[3:-1]:
        began_later(load, current)
    forgetful = Planning("robust").planner()(loads[-1], current).placement.digest()
    assert remembers(loads[-1], current).placement.digest() == began_later(loads[-1], current).placement.digest()
    assert forgetful != began_later(loads[-1], current).placement.digest()


POLICIES: list[OnlinePolicy] = ["reference", *MOVING]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("compiled", [True, False])
def test_slots_move_only_where_the_balancedness_grows_enough(policy: OnlinePolicy, compiled: bool) -> None:
    kept = moved = 0
    for seed in range(60):
        load, current = draw(seed)
        load += seed % 2 * 5 * load.max()  # every other one is nearly even
        always = Planning(policy, compiled=compiled).planner()(load, current)
        gated = Planning(policy, compiled=compiled, min_gain=0.1).planner()(load, current)
        now, then = current.rank_load(load).max(), always.predicted.max()
        if load.any() and now >= 1.1 * then:
            assert np.array_equal(gated.placement.slot_to_expert, always.placement.slot_to_expert)
            moved += len(gated.changed) > 0
        else:
            assert gated.placement.digest() == current.digest()
            assert len(gated.changed) == 0
            assert np.array_equal(gated.predicted, current.rank_load(load))
            kept += len(always.changed) > 0
    assert min(kept, moved) > 5, "both kinds are drawn"


@pytest.mark.parametrize(
    "planning",
    [Planning("reference", most_changes=1), Planning("incremental", moves=2), Planning("robust", most_changes=1)],
    ids=lambda planning: planning.policy,
)
def test_parts_that_gain_little_by_themselves_are_moved_where_the_whole_pays(planning: Planning) -> None:
    """Else a balancer with a small budget of moves would do nothing, and say nothing."""
    current = Placement(4, 32, planner.initial_slots(32, 4, 10))
    load = np.ones(32)
    load[:8] += 1.0  # rank 0 has them all
    gated, sizes, smallest = replace(planning, min_gain=0.2).planner(), list[int](), float("inf")
    for _ in range(20):
        made = gated(load, current)
        if len(made.changed):
            smallest = min(smallest, current.rank_load(load).max() / made.predicted.max() - 1)
        sizes.append(len(made.changed))
        current = made.placement
    best = Planning(planning.policy).planner()(load, current).predicted.max()
    assert current.rank_load(load).max() / best - 1 < 0.2
    assert smallest < 0.2, "some part alone would not have paid"
    assert sizes[-1] == 0, "what is left does not pay"


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("policy", POLICIES)
def test_no_part_makes_a_layer_less_balanced(policy: OnlinePolicy, most: int) -> None:
    """Plans from scratch have another target with each load, towards which a part may lead away from balance."""
    random = np.random.default_rng(3)
    skew = random.gamma(0.7, 100.0, 128)
    current = first = Placement(8, 128, planner.initial_slots(128, 8, 17))
    gated = Planning(policy, most_changes=most, min_gain=0.02).planner()
    moves = 0
    for _ in range(40):
        load = random.poisson(skew * 20).astype(np.float64)
        made = gated(load, current)
        assert made.predicted.max() <= current.rank_load(load).max()
        moves += len(made.changed) > 0
        current = made.placement
    assert moves, "and some move"
    assert current.rank_load(skew).max() < first.rank_load(skew).max()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_gain_of_just_so_much_pays(policy: OnlinePolicy) -> None:
    current = Placement(2, 4, np.array([0, 1, 2, 3], np.int32))
    load = np.array([2.0, 2.0, 1.0, 1.0])  # 4 and 2, or 3 and 3: a gain of one third
    gains = {share: Planning(policy, min_gain=share).planner()(load, current).predicted.max() for share in (0.33, 0.34)}
    assert gains == {0.33: 3.0, 0.34: 4.0}
    exactly = Planning(policy, min_gain=4.0 / 3.0 - 1).planner()(load, current)
    assert exactly.predicted.max() == 3.0


def test_no_part_is_looked_for_where_the_whole_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be none that fits, which is an error."""

    def none_fits(*given: object) -> Placement:
        raise BalancerError("E175", "no part of the plan fits")

    monkeypatch.setattr(online, "part_of", none_fits)
    current = Placement(2, 4, np.array([0, 1, 2, 3], np.int32))
    load = np.array([2.0, 2.0, 1.0, 1.0])
    made = Planning("incremental", most_changes=1, min_gain=0.34).planner()(load, current)
    assert made.placement is current
    with pytest.raises(BalancerError, match="E175"):
        Planning("incremental", most_changes=1, min_gain=0.33).planner()(load, current)


@pytest.mark.parametrize("planning", [Planning("incremental"), Planning("robust"), Planning(compiled=True)])
def test_a_load_that_is_no_load_is_refused(planning: Planning) -> None:
    prepare(planning)
    with pytest.raises(BalancerError, match="E149"):
        planning.planner()(np.array([1.0, np.nan, 1.0, 1.0]), Placement(2, 4, np.array([0, 1, 2, 3], np.int32)))

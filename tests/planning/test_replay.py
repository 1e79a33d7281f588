"""The balancer over recorded windows: what is served is the window after the plan."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from moe_eplb.core.errors import UsageError
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import initial_slots
from moe_eplb.planning.online import HISTORY, OnlinePolicy, Planning
from moe_eplb.planning.policies import solve
from moe_eplb.planning.problem import Problem, rank_loads
from moe_eplb.planning.replay import CostModel, Setting, best, replay, settings_to_try, why


def _switching(windows: int = 8) -> np.ndarray:
    """Two layers in which one of four experts gets 70 of 100, another one every fourth window."""
    counts = np.full((windows, 2, 4), 10)
    for window in range(windows):
        counts[window, :, 2 * (window // 4)] = 70
    return counts


def test_a_plan_serves_from_the_next_window_on() -> None:
    """The first plan replicates the hot expert, which balances until, for one window, another one is hot."""
    found = replay(_switching(), 2, 6, Setting("greedy"))
    assert found.plans == 7
    assert found.now == pytest.approx([1.0] * 7)
    assert found.following == pytest.approx([1.0, 1.0, 1.0, 50 / 80, 1.0, 1.0, 1.0])


def test_nothing_moves_without_a_balancer() -> None:
    found = replay(_switching(), 2, 6, Setting("static", interval=1))
    assert (found.moves, found.moves_us) == (0, 0.0)
    assert found.following == found.unbalanced


def test_time_is_that_of_the_largest_ranks_and_of_moves() -> None:
    cost = CostModel(us_per_token=2.0, slot_bytes=1000, link_gb_s=1.0, hidden=0.5)
    counts = np.array([[[30, 10]], [[30, 10]], [[30, 10]]])
    found = replay(counts, 2, 2, Setting("static", interval=9), cost)
    assert found.steps_us == 2 * 30 * 2.0
    assert cost.move_us(np.array([3, 1])) == pytest.approx(3 * 1000 / 1e3 * 0.5)


def test_budgets_are_those_of_a_plan() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(50 * rng.random((20, 3, 16)) + 1)
    found = replay(counts, 4, 20, Setting("robust", interval=2, window=4, move_share=0.1))
    assert found.plans == 9
    assert found.moves <= 9 * int(0.1 * 3 * 20)


def test_the_best_setting_and_what_speaks_for_it() -> None:
    rng = np.random.default_rng(1)
    counts = rng.poisson(200 * np.exp(rng.normal(0, 1, (1, 4, 16))), (24, 4, 16))
    results = [replay(counts, 4, 24, setting) for setting in settings_to_try(["static", "incremental"], 24)]
    chosen = best(results)
    assert chosen.setting.policy == "incremental"
    reasons = why(chosen, results)
    assert reasons[0].startswith("against no balancer: ")
    assert any("interval" in reason for reason in reasons)
    assert chosen.total_us == min(one.total_us for one in results)


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    replay(_switching(4), 2, 6, Setting("greedy"), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@dataclass(frozen=True)
class _Seen(CostModel):
    """Keeps the largest rank load of each layer [L] in each window that was served."""

    tops: list[np.ndarray] = field(default_factory=list)

    def steps_us(self, tops: np.ndarray) -> float:
        self.tops.append(tops)
        return super().steps_us(tops)


RANKS, SLOTS, EXPERTS, LAYERS = 4, 24, 16, 6
GAIN = 0.1


def _uneven(seed: int, windows: int = 3) -> np.ndarray:
    """Windows of layers from nearly even to very uneven, which scatter."""
    rng = np.random.default_rng(seed)
    skews = np.linspace(0.0, 1.2, LAYERS)[:, np.newaxis]
    rates = 100 * np.exp(skews * rng.normal(0, 1, (LAYERS, EXPERTS)))
    return rng.poisson(rates, (windows, LAYERS, EXPERTS)).astype(float)


def _gains(problem: Problem, planned: np.ndarray, load: np.ndarray) -> np.ndarray:
    assert problem.current is not None
    now, then = (rank_loads(slots, load, problem.first_slot).max(axis=1) for slots in (problem.current, planned))
    return now / then - 1


@pytest.mark.parametrize("policy", ["greedy", "refine", "incremental", "robust"])
def test_slots_of_a_layer_move_only_where_its_balancedness_grows_enough(policy: str) -> None:
    """The plan is made from two windows, judged on the newest of them and seen in the third."""
    kept = moved = elsewhere = 0
    for seed in range(12):
        counts, cost = _uneven(seed), _Seen()
        start = solve(Problem(_uneven(seed + 100, 1), RANKS, SLOTS), "greedy").slots
        problem = Problem(counts[:2], RANKS, SLOTS, current=start)
        always = solve(problem, policy).slots
        pays = _gains(problem, always, counts[1]) >= GAIN
        expected = np.where(pays[:, np.newaxis], always, start)
        found = replay(counts, RANKS, SLOTS, Setting(policy, 2, 2, None, GAIN), cost, start=start)
        assert found.plans == 1
        assert found.moves == (expected != start).sum()
        assert np.array_equal(cost.tops[-1], rank_loads(expected, counts[2], problem.first_slot).max(axis=1))
        changes = (always != start).any(axis=1)
        kept += (changes & ~pays).sum()
        moved += (changes & pays).sum()
        elsewhere += (pays != (_gains(problem, always, counts[:2].mean(axis=0)) >= GAIN)).sum()
    assert min(kept, moved) > 5, "both kinds are drawn"
    assert elsewhere, "another load than the newest would tell another story"


@pytest.mark.parametrize(
    "setting", [Setting("greedy"), Setting("incremental", 1, 1, 0.1), Setting("robust", 2, 4, 0.1)], ids=str
)
def test_without_a_least_gain_every_plan_is_carried_out(setting: Setting) -> None:
    counts, cost = _uneven(3, windows=9), _Seen()
    found = replay(counts, RANKS, SLOTS, replace(setting, min_gain=0.0), cost)
    placed, moves, tops = np.tile(initial_slots(EXPERTS, RANKS, SLOTS // RANKS), (LAYERS, 1)), 0, list[np.ndarray]()
    budget = None if setting.move_share is None else int(setting.move_share * LAYERS * SLOTS)
    for window in range(9):
        windows = counts[max(0, window + 1 - setting.window) : window + 1]
        problem = Problem(windows, RANKS, SLOTS, current=placed, max_moves=budget)
        tops.append(rank_loads(placed, counts[window], problem.first_slot).max(axis=1))
        if (window + 1) % setting.interval == 0 and window < 8:
            planned = solve(problem, setting.policy).slots
            moves, placed = moves + int((planned != placed).sum()), planned
    assert found.moves == moves > 0
    assert np.array_equal(cost.tops, tops[1:])
    assert found.setting == setting


@pytest.mark.parametrize("policy", ["incremental", "robust"])
def test_a_budget_goes_to_layers_that_pay_until_none_does(policy: str) -> None:
    """Left to itself it goes to the heavy layer, whose largest load falls most: by 3 %, the light one's by a third."""
    load = np.ones((2, 32))
    load[:, :8] = 2.0  # rank 0 has them all
    load[0] = 10_000 + 500 * (load[0] - 1)
    start = np.tile(initial_slots(32, 4, 10), (2, 1))
    edges = Problem(load, 4, 40).first_slot
    heavy, light = rank_loads(start, load, edges).max(axis=1)
    counts, free, seen, setting = np.tile(load, (12, 1, 1)), _Seen(), _Seen(), Setting(policy, 1, 1, 2 / start.size)
    replay(counts[:2], 4, 40, setting, free, start=start)
    assert free.tops[0][0] < heavy
    assert free.tops[0][1] == light
    found = replay(counts, 4, 40, replace(setting, min_gain=0.25), seen, start=start)
    tops = np.array([[heavy, light], *seen.tops])
    assert (tops[:, 0] == heavy).all()
    assert (tops[:-1, 1] / tops[1:, 1]).max() < 1.25, "no part alone would have paid"
    best = rank_loads(solve(Problem(load, 4, 40, current=start), policy).slots, load, edges).max(axis=1)[1]
    assert light / best > 1.25 > tops[-1, 1] / best
    assert 2 < found.moves <= 2 * found.plans


def test_a_load_that_only_jitters_is_left_alone() -> None:
    rng = np.random.default_rng(4)
    counts = rng.poisson(500 * np.exp(rng.normal(0, 1, (1, LAYERS, EXPERTS))), (30, LAYERS, EXPERTS))
    both = [replay(counts, RANKS, SLOTS, Setting("incremental", 1, 1, None, gain)) for gain in (0.0, 0.05)]
    always, gated = both
    assert 0 < gated.moves < always.moves / 4
    assert gated.mean_following > always.mean_following - 0.01
    assert gated.mean_following > np.mean(gated.unbalanced) + 0.1
    assert replay(counts, RANKS, SLOTS, Setting("incremental", min_gain=100.0)).moves == 0
    assert best(both) is gated
    assert [reason.split(":")[0] for reason in why(gated, both)] == ["against min_gain 0.0"]


@pytest.mark.parametrize("policy", ["incremental", "robust"])
@pytest.mark.parametrize("budget", [None, 4])
@pytest.mark.parametrize("gain", [0.0, 0.04])
def test_a_layer_is_replayed_as_it_is_planned_online(policy: OnlinePolicy, budget: int | None, gain: float) -> None:
    """Layers one by one, for a replay weighs them against each other."""
    window = 1 if policy == "incremental" else HISTORY
    setting = Setting(policy, 1, window, None if budget is None else budget / SLOTS, gain)
    kept = moved = 0
    for layer in range(LAYERS):
        counts, seen = _uneven(6, windows=16)[:, layer : layer + 1], _Seen()
        found = replay(counts, RANKS, SLOTS, setting, seen)
        planned = Planning(policy, moves=budget, min_gain=gain).planner()
        placement, moves = Placement(RANKS, EXPERTS, initial_slots(EXPERTS, RANKS, SLOTS // RANKS)), list[int]()
        for load, following, top in zip(counts[:-1, 0], counts[1:, 0], seen.tops, strict=True):
            made = planned(load, placement)
            placement = made.placement
            moves.append(len(made.changed))
            assert placement.rank_load(following).max() == pytest.approx(top[0])
        assert found.moves == sum(moves)
        kept, moved = kept + moves.count(0), moved + len(moves) - moves.count(0)
    assert min(kept, moved) > 5 or not gain, "both kinds are drawn"


@pytest.mark.parametrize("policy", ["greedy", "refine", "incremental", "robust"])
def test_a_layer_without_load_keeps_its_slots(policy: str) -> None:
    counts, seen = _uneven(7), _Seen()
    counts[1, 2:] = 0.0
    found = replay(counts, RANKS, SLOTS, Setting(policy, 2, 2, None, 1e-6), seen)
    first = np.tile(initial_slots(EXPERTS, RANKS, SLOTS // RANKS), (LAYERS, 1))
    untouched = rank_loads(first, counts[2], Problem(counts, RANKS, SLOTS).first_slot).max(axis=1)
    assert found.moves > 0
    assert np.array_equal(seen.tops[-1][2:], untouched[2:])
    counts[1] = 0.0
    assert replay(counts, RANKS, SLOTS, Setting(policy, 2, 2, None, 1e-6)).moves == 0
    assert replay(counts, RANKS, SLOTS, Setting(policy, 2, 2, 0.1, 1e-6)).moves == 0


@pytest.mark.parametrize("gain", [-0.01, float("nan"), float("inf")])
def test_a_least_gain_is_a_share(gain: float) -> None:
    with pytest.raises(UsageError, match=f"E190.*min_gain {gain:g}"):
        Setting("greedy", min_gain=gain)


def test_settings_tell_their_least_gain() -> None:
    assert str(Setting("greedy", 1, 8, None, 0.02)) == "greedy every 1 from 8, only where a layer gains 2%"
    assert str(Setting("robust", 2, 4, 0.05, 0.005)).endswith("at most 5% of the slots, only where a layer gains 0.5%")
    assert "gains" not in str(Setting("greedy"))


def test_the_grid_has_each_setting_with_and_without_a_least_gain() -> None:
    plain, both = (settings_to_try(["static", "greedy", "robust"], 9, gain) for gain in (0.0, 0.02))
    assert plain == settings_to_try(["static", "greedy", "robust"], 9)
    assert [one for one in both if not one.min_gain] == plain
    assert [replace(one, min_gain=0.0) for one in both if one.min_gain] == plain[1:]
    assert {one.min_gain for one in both} == {0.0, 0.02}

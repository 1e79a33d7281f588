"""The balancer over recorded windows: what is served is the window after the plan."""

from __future__ import annotations

import numpy as np
import pytest

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

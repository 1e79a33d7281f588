"""Comparisons of samples: what is equal says so, what differs is told by how much, and drift does not fool it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_eplb.core.samples import compare, gain


def drawn(scale: float, seed: int, rounds: int = 20, steps: int = 30) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return (scale * rng.lognormal(0.0, 0.1, (rounds, steps))).tolist()


def test_the_first_variant_is_one_to_itself() -> None:
    first, _ = compare([drawn(1.0, 0), drawn(2.0, 1)])
    assert (first.ratio, first.low, first.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.3])
def test_a_difference_is_found_and_its_interval_holds_it(factor: float) -> None:
    _, second = compare([drawn(1.0, 0), drawn(factor, 1)])
    assert second.ratio == pytest.approx(factor, rel=0.05)
    assert second.low <= factor <= second.high
    assert not second.low <= 1.0 <= second.high


def test_equal_variants_are_not_told_apart() -> None:
    told = sum(not (c.low <= 1.0 <= c.high) for seed in range(40) for c in compare([drawn(1, seed), drawn(1, 99)])[1:])
    assert told <= 6  # 95 % intervals of 40 comparisons


def test_a_machine_that_slows_down_meets_both_alike() -> None:
    drift = np.linspace(1.0, 3.0, 20)[:, None]
    first, second = (np.array(drawn(scale, seed)) * drift for scale, seed in ((1.0, 0), (1.2, 1)))
    _, found = compare([first.tolist(), second.tolist()])
    assert found.ratio == pytest.approx(1.2, rel=0.05)
    assert found.high < 1.3


def test_medians_and_tails_are_those_of_all_samples() -> None:
    rounds = [[1.0] * 50, [2.0] * 49 + [100.0]]
    (only,) = compare([rounds])
    assert only.steps == 100
    assert only.median_ms == 1.5
    assert only.p99_ms == pytest.approx(np.percentile(np.concatenate(rounds), 99))


def test_each_variant_is_held_against_the_one_before_it_too() -> None:
    first, second, third = compare([drawn(1.0, 0), drawn(2.0, 1), drawn(3.0, 2)])
    assert (first.step_ratio, first.step_low, first.step_high) == (1.0, 1.0, 1.0)
    assert (second.step_ratio, second.step_low, second.step_high) == (second.ratio, second.low, second.high)
    assert third.ratio == pytest.approx(3.0, rel=0.05)
    assert third.step_ratio == pytest.approx(1.5, rel=0.05)
    assert third.step_low <= 1.5 <= third.step_high


def test_a_gain_counts_every_step_and_knows_its_interval() -> None:
    static = [[10.0, 10.0], [12.0, 8.0], [10.0, 10.0]]
    dynamic = [[20.0, 5.0], [6.0, 5.0], [6.0, 6.0]]  # the first moves are in it
    balanced = [[5.0, 5.0], [5.0, 5.0], [6.0, 4.0]]
    found = gain([static, dynamic, balanced])
    assert (found.static_ms, found.dynamic_ms, found.balanced_ms, found.cost) == (60.0, 48.0, 30.0, 2.0)
    assert found.share == pytest.approx(12 / 30)
    assert found.tells
    assert found.low == pytest.approx((20 - 25) / 10)
    assert found.high == pytest.approx((20 - 11) / 10)


def test_a_gain_of_nothing_is_no_number_and_tells_nothing() -> None:
    same = [[5.0], [5.0]]
    found = gain([same, same, same])
    assert not found.tells
    assert math.isnan(found.share)

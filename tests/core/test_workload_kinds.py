from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_eplb.core import workload, workload_start
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Scenario
from tests.support.workloads import counts, make

ASSIGNED = "{slots_per_rank: 3, initial_global_assignments: {0: [0, 1, 2, 3, 1, 0], 1: [3, 2, 3, 1, 0, 2]}}"
"""Four experts on two ranks, differently in both layers."""


def hottest(scenario: Scenario, iteration: int = 0, layer: int = 0) -> set[int]:
    """The experts of the greatest weight."""
    weights = workload.expert_weights(scenario, iteration, layer)
    return set(np.flatnonzero(weights == weights.max()).tolist())


def test_hot_experts_get_their_share() -> None:
    scenario = make("{kind: hot, tokens_per_rank: 2000, hot_experts: 2, hot_share: 0.6}", experts=32, top_k=1)
    shares = np.sort(counts(scenario))[::-1] / 4000
    assert shares[:2].sum() == pytest.approx(0.6, abs=0.03)
    assert shares[2:].max() < 0.03


def test_zipf_falls_with_the_rank_and_uniform_does_not() -> None:
    zipf = np.sort(counts(make("{kind: zipf, tokens_per_rank: 2000}", top_k=1)))[::-1] / 4000
    flat = counts(make("{kind: uniform, tokens_per_rank: 2000}", top_k=1)) / 4000
    harmonic = (1 / np.arange(1, 17)).sum()
    assert zipf[:4] == pytest.approx(1 / np.arange(1, 5) / harmonic, abs=0.03)
    assert flat == pytest.approx(1 / 16, abs=0.02)


def test_steep_weights_still_give_distinct_experts() -> None:
    scenario = make("{kind: zipf, tokens_per_rank: 50, skew: 16}", experts=512, top_k=8)
    chosen = workload.topk_ids(scenario, 0, 0, 0)
    assert chosen is not None
    assert all(len(set(row)) == 8 for row in chosen.tolist())


@pytest.mark.parametrize("kind", ["zipf", "hot"])
def test_drift_changes_the_hot_experts_only_at_its_iterations(kind: str) -> None:
    scenario = make(f"{{kind: {kind}, drift_every: 3}}")
    weights = [workload.expert_weights(scenario, iteration, 0) for iteration in range(6)]
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(weights)]
    assert same == [True, True, False, True, True]
    assert np.array_equal(np.sort(weights[0]), np.sort(weights[3]))


@pytest.mark.parametrize("kind", ["zipf", "hot", "spread_hot", "rotating"])
def test_layers_have_different_hot_experts(kind: str) -> None:
    scenario = make(f"{{kind: {kind}}}")
    assert not np.array_equal(workload.expert_weights(scenario, 0, 0), workload.expert_weights(scenario, 0, 1))


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(1, 24), top_k=st.integers(1, 8), tokens=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    place=st.tuples(st.integers(0, 11), st.integers(0, 1), st.integers(0, 2)),
)  # fmt: skip
def test_balanced_experts_differ_by_one_entry_at_most(
    experts: int, top_k: int, tokens: list[int], place: tuple[int, int, int]
) -> None:
    assume(top_k <= experts and any(tokens))
    scenario = make(f"{{kind: balanced, tokens_per_rank: {tokens}}}", experts=experts, top_k=top_k, ranks=len(tokens))
    entries = counts(scenario, *place)
    assert entries.sum() == sum(tokens) * top_k
    assert entries.max() - entries.min() <= 1


def test_balanced_tokens_are_counted_as_they_are_in_each_iteration() -> None:
    for more in ("ragged: 1.0", "steps: mixed, prompt_tokens: 13", "steps: generate, prompt_tokens: 3"):
        scenario = make(f"{{kind: balanced, tokens_per_rank: [7, 5, 2], {more}}}", ranks=3)
        for iteration in range(12):
            entries = counts(scenario, iteration)
            assert entries.sum() == 4 * sum(workload.tokens(scenario, iteration, rank) for rank in range(3))
            assert entries.max() - entries.min() <= 1


def test_the_experts_of_a_hot_rank_share_the_heat() -> None:
    scenario = make("{kind: hot_rank, hot_rank: 2, hot_share: 0.8, tokens_per_rank: 1000}", ranks=4, top_k=1)
    share = counts(scenario).reshape(4, 4).sum(axis=1) / 4000
    assert share == pytest.approx([0.2 / 3, 0.2 / 3, 0.8, 0.2 / 3], abs=0.03)


def test_a_hot_rank_is_hot_by_the_scenario_s_own_assignment() -> None:
    scenario = make("{kind: hot_rank, hot_rank: 1, hot_share: 0.9}", experts=4, top_k=1, balancer=ASSIGNED)
    assert hottest(scenario, layer=0) == {0, 1, 3}
    assert hottest(scenario, layer=1) == {0, 1, 2}
    assert hottest(
        make("{kind: hot_rank, hot_rank: 0, hot_share: 0.9}", experts=4, top_k=1, balancer=ASSIGNED), layer=1
    ) == {2, 3}


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(2, 40), ranks=st.integers(2, 6), more_slots=st.integers(0, 4), many=st.integers(1, 40),
    seed=st.integers(0, 99), layer=st.integers(0, 1),
)  # fmt: skip
def test_spread_hot_experts_are_spread_equally_over_their_ranks(
    experts: int, ranks: int, more_slots: int, many: int, seed: int, layer: int
) -> None:
    slots = -(-experts // ranks) + more_slots
    try:
        scenario = make(
            f"{{kind: spread_hot, hot_share: 0.99, hot_experts: {many}}}", experts=experts, top_k=1, ranks=ranks,
            seed=seed, balancer=f"{{slots_per_rank: {slots}}}",
        )  # fmt: skip
    except ScenarioError:
        assume(False)
    hot = hottest(scenario, 5, layer)
    homes = [workload_start.initial_slots(scenario, layer).tolist().index(expert) // slots for expert in range(experts)]
    held = [sum(homes[expert] == rank for expert in hot) for rank in sorted(set(homes))]
    assert len(hot) == many
    assert max(held) - min(held) <= 1


def test_spread_hot_experts_follow_the_scenario_s_own_assignment() -> None:
    # All experts of layer 1 but 0 begin on rank 0, so one of each rank must be expert 0.
    balancer = "{slots_per_rank: 3, initial_global_assignments: {0: [0, 1, 2, 3, 1, 0], 1: [3, 2, 1, 1, 0, 2]}}"
    scenario = make("{kind: spread_hot, hot_experts: 2}", experts=4, top_k=1, balancer=balancer)
    assert 3 in hottest(scenario, layer=0)
    assert 0 in hottest(scenario, layer=1)


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(4, 40), top_k=st.integers(1, 4), idle=st.integers(0, 30), ranks=st.integers(2, 4),
    rank=st.none() | st.integers(0, 3), place=st.tuples(st.integers(0, 11), st.integers(0, 1), st.integers(0, 1)),
)  # fmt: skip
def test_nobody_asks_for_idle_experts(
    experts: int, top_k: int, idle: int, ranks: int, rank: int | None, place: tuple[int, int, int]
) -> None:
    work = f"{{kind: idle, tokens_per_rank: 100, idle_experts: {idle}, idle_rank: {'null' if rank is None else rank}}}"
    try:
        scenario = make(work, experts=experts, top_k=top_k, ranks=ranks)
    except ScenarioError:
        assume(False)
    alone: set[int] = set()
    if rank is not None:
        held = [set(row) for row in workload_start.initial_slots(scenario, place[1]).reshape(ranks, -1).tolist()]
        alone = held[rank] - set().union(*(other for index, other in enumerate(held) if index != rank))
    zeros = set(np.flatnonzero(workload.expert_weights(scenario, place[0], place[1]) == 0).tolist())
    entries = counts(scenario, *place)
    assert alone <= zeros
    assert len(zeros) == len(alone) + idle
    assert entries[sorted(zeros)].sum() == 0
    assert entries.sum() == 100 * ranks * top_k


def test_idle_experts_stay_idle_and_differ_by_layer() -> None:
    scenario = make("{kind: idle, idle_experts: 5}")
    weights = {(i, layer): workload.expert_weights(scenario, i, layer).tolist() for i in range(3) for layer in range(2)}
    assert weights[0, 0] == weights[1, 0] == weights[2, 0]
    assert weights[0, 0] != weights[0, 1]


def test_the_last_top_k_experts_are_asked_for_by_every_token() -> None:
    entries = counts(make("{kind: idle, idle_experts: 12, tokens_per_rank: 9}"))
    assert sorted(entries.tolist()) == [0] * 12 + [18] * 4


@settings(max_examples=40, deadline=None)
@given(experts=st.integers(2, 30), hot=st.integers(1, 29), every=st.integers(0, 4), seed=st.integers(0, 99))
def test_a_rotating_hot_set_moves_on_by_its_size_and_visits_every_expert(
    experts: int, hot: int, every: int, seed: int
) -> None:
    assume(hot < experts)
    work = f"{{kind: rotating, hot_experts: {hot}, hot_share: 0.99, drift_every: {every}}}"
    scenario, length = make(work, experts=experts, top_k=1, seed=seed), max(1, every)
    epochs = [hottest(scenario, epoch * length) for epoch in range(-(-experts // hot) + 1)]
    for epoch, chosen in enumerate(epochs):
        assert len(chosen) == hot
        assert hottest(scenario, (epoch + 1) * length - 1) == chosen
    for before, after in itertools.pairwise(epochs):
        assert len(before & after) == max(0, 2 * hot - experts)
    assert set().union(*epochs[:-1]) == set(range(experts))


def test_only_bursts_have_hot_experts_and_more_tokens() -> None:
    work = "{kind: burst, burst_every: 4, burst_factor: 3, hot_experts: 2, hot_share: 0.9, tokens_per_rank: [500, 200]}"
    scenario = make(work, top_k=1)
    for iteration in range(12):
        entries, bursts = counts(scenario, iteration), iteration in (3, 7, 11)
        assert entries.sum() == 700 * (3 if bursts else 1)
        top_two = np.sort(entries)[-2:].sum() / entries.sum()
        assert top_two == pytest.approx(0.9, abs=0.03) if bursts else top_two < 0.25
        assert workload.tokens(scenario, iteration, 1) == (600 if bursts else 200)
    assert hottest(scenario, 3) == hottest(scenario, 11)

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_eplb.core import workload_tokens
from moe_eplb.core.errors import ScenarioError
from moe_eplb.core.scenario import Scenario
from tests.support.workloads import make


def table(scenario: Scenario, iterations: int = 5) -> list[list[int]]:
    """T by iteration and rank."""
    return [[workload_tokens.tokens(scenario, i, rank) for rank in range(scenario.ranks)] for i in range(iterations)]


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        ("{tokens_per_rank: 4}", [[4, 4]] * 5),
        ("{tokens_per_rank: [3, 0]}", [[3, 0]] * 5),
        ("{tokens_per_rank: [3, 0], steps: prefill, prompt_tokens: 7}", [[21, 0]] * 5),
        ("{tokens_per_rank: [3, 0], steps: mixed, prompt_tokens: 7}", [[10, 0], [3, 7], [10, 0], [3, 7], [10, 0]]),
        ("{tokens_per_rank: [3, 2], steps: generate, prompt_tokens: 7}", [[21, 14], *([[3, 2]] * 4)]),
        ("{tokens_per_rank: [3, 2], kind: burst, burst_every: 2}", [[3, 2], [12, 8], [3, 2], [12, 8], [3, 2]]),
        (
            "{tokens_per_rank: 1, kind: burst, burst_every: 3, burst_factor: 10, steps: mixed, prompt_tokens: 4}",
            [[5, 1], [1, 5], [50, 10], [1, 5], [5, 1]],
        ),
    ],
)
def test_tokens_of_each_kind_of_step(work: str, expected: list[list[int]]) -> None:
    scenario = make(work)
    assert table(scenario) == expected


def test_steps_do_without_tokens_of_sequences() -> None:
    assert table(make("{tokens_per_rank: 0, steps: mixed, prompt_tokens: 6}"), 2) == [[6, 0], [0, 6]]


SHARES = st.sampled_from([0.1, 0.29, 0.3, 0.5, 0.7, 0.9, 1.0]) | st.integers(1, 1000).map(lambda n: n / 1000)
PLAIN = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)


@settings(max_examples=60, deadline=None)
@given(plain=PLAIN, share=SHARES, seed=st.integers(0, 99))
def test_ragged_tokens_stay_within_their_share_and_never_all_vanish(plain: list[int], share: float, seed: int) -> None:
    assume(share * max(plain) >= 1.001)
    scenario = make(f"{{tokens_per_rank: {plain}, ragged: {share}}}", ranks=len(plain), seed=seed)
    exact = Fraction(str(share))
    for drawn in table(scenario, 20):
        assert any(drawn)
        for count, whole in zip(drawn, plain, strict=True):
            assert math.ceil((1 - exact) * whole) <= count <= math.floor((1 + exact) * whole)
    assert table(scenario, 20) == table(scenario, 20)


def test_ragged_tokens_reach_both_ends_of_their_share() -> None:
    scenario = make("{tokens_per_rank: [10, 100], ragged: 0.29}")
    drawn = list(zip(*table(scenario, 2000), strict=True))
    assert set(drawn[0]) == set(range(8, 13))
    assert set(drawn[1]) == set(range(71, 130))


def test_ranks_without_tokens_occur_but_one_always_keeps_its_own() -> None:
    drawn = table(make("{tokens_per_rank: 1, ragged: 1.0}", ranks=2), 400)
    assert {tuple(row) for row in drawn} >= {(0, 1), (1, 0), (0, 2), (2, 0), (1, 1), (2, 2)}
    assert [0, 0] not in drawn


def test_only_a_rank_with_tokens_can_keep_them() -> None:
    drawn = table(make("{tokens_per_rank: [0, 1, 0], ragged: 1.0}", ranks=3), 50)
    assert {tuple(row) for row in drawn} == {(0, 1, 0), (0, 2, 0)}


def test_ragged_tokens_depend_on_seed_iteration_and_rank() -> None:
    first, other = (table(make("{tokens_per_rank: 1000, ragged: 0.5}", seed=seed), 4) for seed in (0, 1))
    assert first != other
    assert len({count for row in first for count in row}) > 6


def test_bursts_and_prompts_are_ragged_as_a_whole() -> None:
    work = "{kind: burst, burst_every: 2, burst_factor: 4, tokens_per_rank: 10, ragged: 0.5}"
    drawn = table(make(work), 400)
    assert {count for row in drawn[::2] for count in row} == set(range(5, 16))
    assert {count for row in drawn[1::2] for count in row} == set(range(20, 61))


def test_ragged_tokens_are_what_they_have_always_been() -> None:
    drawn = table(make("{tokens_per_rank: [100, 3, 0], ragged: 1.0}", ranks=3, seed=7), 4)
    assert drawn == [[146, 4, 0], [144, 0, 0], [117, 1, 0], [4, 6, 0]]


@settings(max_examples=60, deadline=None)
@given(
    plain=PLAIN, steps=st.sampled_from(["decode", "prefill", "mixed", "generate"]), prompt=st.integers(1, 9),
    burst=st.booleans(), share=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_no_iteration_has_more_tokens_than_the_bound(
    plain: list[int], steps: str, prompt: int, burst: bool, share: float
) -> None:
    work = f"tokens_per_rank: {plain}, steps: {steps}, kind: {'burst' if burst else 'uniform'}"
    work += f", prompt_tokens: {prompt}" if steps != "decode" else ""
    work += f", ragged: {share}" if steps != "generate" else ""
    try:
        scenario = make("{" + work + "}", ranks=len(plain))
    except ScenarioError:
        assume(False)
    for rank, drawn in enumerate(zip(*table(scenario, 12), strict=True)):
        assert max(drawn) <= workload_tokens.most_tokens(scenario, rank)


@pytest.mark.parametrize("steps", ["decode", "prefill", "mixed", "generate"])
def test_tokens_before_an_iteration_are_the_sum_of_all_earlier_ones(steps: str) -> None:
    prompt = "" if steps == "decode" else ", prompt_tokens: 5"
    scenario = make(f"{{kind: uniform, steps: {steps}{prompt}, tokens_per_rank: [4, 0, 2]}}", ranks=3)
    totals = [sum(row) for row in table(scenario, 9)]
    assert [workload_tokens.tokens_before(scenario, i) for i in range(10)] == [sum(totals[:i]) for i in range(10)]

"""What others published or asserted of their balancers, with the same inputs here.

Where upstream asserts properties alone, counts and loads are those of lowest-index ties. Placements are compared only
where an array was published: their order is not portable across ties.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from moe_eplb.analysis.balance import mean_over_max
from moe_eplb.checks.replica_twin import expected_slot_counts
from moe_eplb.core.errors import BalancerError, UsageError
from moe_eplb.core.hierarchical import rebalance_experts
from moe_eplb.core.placement import balancedness
from moe_eplb.core.planner import keep_slots
from moe_eplb.planning.certificate import certify
from moe_eplb.planning.exact import exact_optimum
from moe_eplb.planning.policies import solve
from moe_eplb.planning.problem import Problem, Solution

from .deepseek_oracle import placed, rank_loads

README = (
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
)
GRADED = [10, 20, 30, 40, 50, 60]
SIXTEEN = [50, 100, 75, 120, 90, 60, 80, 110, 40, 70, 95, 85, 65, 55, 45, 35]
SHOWCASE = [600, 560, 120, 120, 20, 10, 10, 10]


class Case(NamedTuple):
    """Loads of one layer; slots, groups, nodes, ranks; replica counts and rank loads, None where there are none."""

    load: list[int]
    shape: tuple[int, int, int, int]
    counts: list[int] | None
    loads: list[float] | None


CASES = {
    "readme 0": Case(
        README[0], (16, 4, 2, 8), [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1], [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]
    ),
    "readme 1": Case(README[1], (16, 4, 2, 8), [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1], None),
    "readme 0, global": Case(README[0], (16, 1, 1, 8), None, None),
    "readme 1, global": Case(README[1], (16, 1, 1, 8), None, None),
    "showcase": Case(SHOWCASE, (16, 1, 1, 8), None, None),
    "single": Case([10, 20, 30, 40], (4, 1, 1, 1), [1, 1, 1, 1], [100]),
    "equal": Case([50] * 8, (8, 2, 2, 4), [1] * 8, [100] * 4),
    "extreme": Case([1000, *[1] * 7], (12, 2, 2, 4), None, None),
    "layers, rising": Case(GRADED, (8, 2, 2, 4), [1, 1, 2, 1, 1, 2], [30, 30, 80, 70]),
    "layers, falling": Case(GRADED[::-1], (8, 2, 2, 4), [2, 1, 1, 2, 1, 1], [80, 70, 30, 30]),
    "layers, equal": Case([25] * 6, (8, 2, 2, 4), None, [37.5] * 4),
    "fallback": Case([10, 20, 30, 40], (8, 3, 2, 4), [1, 2, 2, 3], [25, 25, 80 / 3, 70 / 3]),
    "small hierarchical": Case(
        [100, 50, 200, 75, 150, 25, 300, 80], (12, 4, 2, 4), [1, 1, 2, 1, 2, 1, 3, 1], [280, 250, 250, 200]
    ),
    "global fallback": Case(GRADED, (8, 3, 2, 4), [1, 1, 1, 1, 2, 2], [50, 55, 55, 50]),
    "device": Case([10, 20, 30, 40], (6, 2, 1, 2), [1, 1, 2, 2], [50, 50]),
    "add1": Case(SIXTEEN, (24, 8, 4, 8), None, [140, 135, 150, 150, 155, 145, 155, 145]),
    "add2": Case([200, 150, 100, 50, 25, 12], (10, 3, 1, 2), [3, 2, 2, 1, 1, 1], [811 / 3, 800 / 3]),
    "add2, reversed": Case([12, 25, 50, 100, 150, 200], (10, 3, 1, 2), [1, 1, 1, 2, 2, 3], [811 / 3, 800 / 3]),
}
LARGEST = {
    "readme 0": 156, "readme 1": 179.5, "readme 0, global": 138.5, "readme 1, global": 172, "showcase": 232,
    "extreme": 667.667,
}  # fmt: skip
BALANCE = {
    "readme 0": 0.8277, "readme 1": 0.8050, "readme 0, global": 0.9323, "readme 1, global": 0.8401, "add1": 0.9476,
}  # fmt: skip


def _greedy(case: Case) -> list[int]:
    slots, groups, nodes, ranks = case.shape
    load = np.array([case.load], float)
    problem = Problem(load, ranks, slots, nodes=nodes, groups=groups, allow_duplicates=True)
    row: list[int] = solve(problem, "greedy").slots[0].tolist()
    return row


def _hierarchical(case: Case) -> list[int]:
    row: list[int] = rebalance_experts(np.array([case.load]), *case.shape)[0][0].tolist()
    return row


def _oracle(case: Case) -> list[int]:
    return placed(case.load, *case.shape)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", [_greedy, _hierarchical, _oracle])
def test_counts_and_loads_are_the_known_ones(name: str, place: object) -> None:
    assert callable(place)
    case = CASES[name]
    row = place(case)
    counts = np.bincount(row, minlength=len(case.load)).tolist()
    loads = rank_loads(case.load, row, case.shape[3])
    tied = name in ("equal", "extreme", "layers, equal")
    if case.counts is not None:
        assert (sorted(counts) if tied else counts) == (sorted(case.counts) if tied else case.counts)
    if case.loads is not None:
        assert sorted(loads) == pytest.approx(sorted(case.loads))
    if name in LARGEST:
        assert max(loads) == pytest.approx(LARGEST[name], abs=1e-3)
    if name in BALANCE:
        assert sum(loads) / len(loads) / max(loads) == pytest.approx(BALANCE[name], abs=5e-5)
    if name == "extreme":
        assert counts[0] == 3
        assert sorted(counts) == [1, 1, 1, 1, 1, 2, 2, 3]
    if name == "small hierarchical":
        assert counts[6] >= 2
    if name.startswith("add2"):
        assert counts[case.load.index(200)] >= 2


@pytest.mark.parametrize("place", [_hierarchical, _oracle])
def test_deepseeks_example_is_placed_as_published(place: object) -> None:
    assert callable(place)
    assert [place(CASES[f"readme {layer}"]) for layer in (0, 1)] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_greedy_places_deepseeks_example_with_the_published_loads() -> None:
    expected = CASES["readme 0"].loads
    assert expected is not None
    assert sorted(rank_loads(README[0], _greedy(CASES["readme 0"]), 8)) == sorted(expected)
    loads = np.array(README, float)
    problem = Problem(loads, 8, 16, nodes=2, groups=4, allow_duplicates=True)
    plan = certify(problem, solve(problem, "greedy"))
    assert [row.largest for row in plan.layers] == [156, 179.5]


def test_the_fallbacks_other_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="do not divide"):
        Problem(np.array([[10.0, 20, 30, 40]]), 4, 7, nodes=2, groups=3)
    with pytest.raises(BalancerError, match="do not fit"):
        rebalance_experts(np.array([[10, 20, 30, 40]]), 7, 3, 2, 4)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("layer", "optimum", "greedy"), [(0, 136.0, 138.5), (1, 172.0, 172.0)])
def test_the_optimum_of_deepseeks_example_without_groups(layer: int, optimum: float, greedy: float) -> None:
    assert exact_optimum(README[layer], 8, 16, time_limit_s=250) == pytest.approx(optimum)
    problem = Problem(np.array([README[layer]], float), 8, 16)
    refined = float(solve(problem, "refine").rank_loads(problem.newest, problem).max())
    assert optimum <= refined + 1e-9 <= greedy + 1e-6


@pytest.mark.parametrize(
    ("layer", "row", "largest"),
    [
        (0, [1, 7, 4, 3, 10, 2, 10, 6, 0, 8, 11, 8, 5, 9, 5, 3], 138.5),
        (1, [1, 3, 2, 11, 5, 0, 5, 4, 6, 7, 6, 7, 9, 8, 8, 10], 172),
    ],
)
def test_flashlbs_published_placements_are_no_better_than_refine(layer: int, row: list[int], largest: float) -> None:
    assert max(rank_loads(README[layer], row, 8)) == largest
    problem = Problem(np.array([README[layer]], float), 8, 16)
    theirs = Solution("flashlb", np.array([row], np.int32), 0.0).rank_loads(problem.newest, problem)
    assert float(theirs.max()) == largest
    assert float(solve(problem, "refine").rank_loads(problem.newest, problem).max()) <= largest


def test_flashlbs_showcase_is_beaten() -> None:
    """Theirs is 205 where DeepSeek's is 232; the optimum is 196.667."""
    problem = Problem(np.array([SHOWCASE], float), 8, 16)
    refined = float(solve(problem, "refine").rank_loads(problem.newest, problem).max())
    assert refined < 205
    assert refined == pytest.approx(196.667, abs=1e-3)


@pytest.mark.parametrize(
    ("ranks", "old", "new", "kept", "changed"),
    [
        (2, "01234567", "15046273", "01542367", (8, 4)),
        (2, "0102345612", "0540162321", "0105432612", (9, 4)),
        (3, "012301230123", "000000001230", "000000000123", (10, 6)),
    ],
)
def test_slots_within_a_rank_are_kept(ranks: int, old: str, new: str, kept: str, changed: tuple[int, int]) -> None:
    there, wanted, best = (np.array([int(one) for one in text], np.int32) for text in (old, new, kept))
    found = keep_slots(there, wanted, ranks)
    assert found.tolist() == best.tolist()
    assert (int((wanted != there).sum()), int((found != there).sum())) == changed
    for rank in range(ranks):
        part = slice(rank * len(there) // ranks, (rank + 1) * len(there) // ranks)
        assert sorted(found[part].tolist()) == sorted(wanted[part].tolist())


def test_exchanges_keep_every_expert_that_stays_in_its_slot() -> None:
    """The sizes and the seed of vllm-ascend's test, from a map in order."""
    torch.manual_seed(27)
    loads = torch.randint(1, 1000, (10, 256)).numpy().astype(float)
    there = np.tile((np.arange(288) % 256).astype(np.int32), (10, 1))
    problem = Problem(loads, 32, 288, current=there)
    answer = solve(problem, "incremental").slots
    assert np.array_equal(answer, solve(problem, "incremental").slots)
    for now, before in zip(answer.reshape(10, 32, 9), there.reshape(10, 32, 9), strict=True):
        assert set(now.reshape(-1).tolist()) == set(range(256))
        for mine, mine_before in zip(now.tolist(), before.tolist(), strict=True):
            assert len(set(mine)) == 9
            for slot, expert in enumerate(mine_before):
                assert expert not in mine or mine[slot] == expert


def test_the_metric_goes_over_ranks_and_not_over_layers() -> None:
    tokens = np.array([[100.0, 200.0], [100.0, 200.0]])
    assert balancedness(tokens).tolist() == [0.75, 0.75]
    assert mean_over_max(tokens) == 0.75
    assert balancedness(tokens.T).tolist() == [1.0, 1.0]  # what the wrong axis gives
    problem = Problem(tokens, 2, 2)
    plan = certify(problem, solve(problem, "static"))
    assert (plan.balancedness, [row.balancedness for row in plan.layers]) == (0.75, [0.75, 0.75])


@pytest.mark.parametrize(
    ("count", "theirs"),
    [(2, [512] * 2), (4, [256] * 4), (8, [128] * 8), (3, [345, 339, 340]), (5, [206, 206, 202, 206, 204])],
)
def test_replicas_are_chosen_at_least_as_evenly_as_by_vllms_hash(count: int, theirs: list[int]) -> None:
    hashed = np.bincount((np.arange(1024) * 2654435769 % (1 << 32)) % count).tolist()
    assert hashed == theirs
    slots = np.zeros(count, np.int32)
    ours = expected_slot_counts(np.zeros((1024, 1), np.int32), slots, rank=0, ranks=1, local_first=False).tolist()
    assert sum(ours) == 1024
    assert max(ours) - min(ours) <= max(theirs) - min(theirs)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_a_thousand_random_cases_are_balanced_as_by_the_oracle(nodes: int) -> None:
    """Flat, and on nodes; with and without a group size that divides. Loads without ties."""
    rng = np.random.default_rng(nodes)
    for _ in range(334):
        ranks = nodes * int(rng.integers(1, 5))
        groups = int(rng.choice([nodes, 2 * nodes, 3]))
        experts = groups * nodes * int(rng.integers(1, 4))
        slots = ranks * (-(-experts // ranks) + int(rng.integers(0, 4)))
        load = np.round(np.exp(rng.normal(0, 1.5, experts)) * 1e6)
        load += np.arange(experts) / 64
        case = Case(load.tolist(), (slots, groups, nodes, ranks), None, None)
        expected = sorted(rank_loads(case.load, _oracle(case), ranks))
        for place in (_greedy, _hierarchical):
            row = place(case)
            assert np.allclose(sorted(rank_loads(case.load, row, ranks)), expected, rtol=1e-12), (place, case)
            assert sorted(np.bincount(row, minlength=experts).tolist()) == sorted(
                np.bincount(_oracle(case), minlength=experts).tolist()
            )

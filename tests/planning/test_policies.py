"""The policies: legal placements, as good as said, with as few moves as said, the same every time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core import planner
from moe_eplb.core.errors import UsageError
from moe_eplb.core.hierarchical import rebalance_experts
from moe_eplb.planning import kernels
from moe_eplb.planning.policies import POLICIES, estimate, solve
from moe_eplb.planning.problem import EMPTY, Problem, Solution

EXAMPLE = [600, 560, 120, 120, 20, 10, 10, 10]
_FEW = settings(max_examples=40, deadline=None)


def _tops(solution: Solution, problem: Problem, load: Any = None) -> np.ndarray:
    return solution.rank_loads(problem.newest if load is None else np.asarray(load, float), problem).max(axis=1)


def _require_legal(solution: Solution, problem: Problem) -> None:
    assert solution.slots.shape == (problem.layers, problem.slots)
    for row in solution.slots:
        held = row[row != EMPTY]
        assert set(held.tolist()) == set(range(problem.experts))
        assert len(held) == int(problem.room.sum())
        for rank in range(problem.ranks):
            mine = row[problem.first_slot[rank] : problem.first_slot[rank + 1]].tolist()
            if rank in problem.masked_ranks:
                assert set(mine) <= {EMPTY}
            elif not problem.allow_duplicates:
                assert len(set(mine)) == len(mine), mine


@st.composite
def problems(draw: st.DrawFn, **more: Any) -> Problem:
    """Small problems of every shape."""
    ranks = draw(st.integers(1, 6))
    experts = draw(st.integers(1, 24))
    least = -(-experts // ranks)
    per_rank = draw(st.integers(least, min(least + 4, experts)))
    layers = draw(st.integers(1, 2))
    numbers = st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)
    loads = [[draw(numbers) for _ in range(layers)] for _ in range(draw(st.integers(1, 3)))]
    return Problem(np.array(loads, float), ranks, ranks * per_rank, seed=draw(st.integers(0, 9)), **more)


@_FEW
@given(problems(), st.sampled_from(sorted(POLICIES)))
def test_every_answer_is_a_legal_placement_and_the_same_again(problem: Problem, policy: str) -> None:
    start = solve(problem, "greedy")
    _require_legal(start, problem)
    there = Problem(problem.loads[::-1], problem.ranks, problem.slots, current=start.slots, seed=problem.seed)
    answer = solve(there, policy)
    _require_legal(answer, there)
    assert np.array_equal(answer.slots, solve(there, policy).slots)


@_FEW
@given(problems())
def test_refined_is_never_worse_and_never_below_the_bound(problem: Problem) -> None:
    greedy, refined = _tops(solve(problem, "greedy"), problem), _tops(solve(problem, "refine"), problem)
    assert (refined <= greedy * (1 + 1e-9)).all()
    for layer, load in enumerate(problem.newest):
        floor = kernels.floor_of(load, problem.slots, problem.ranks)
        assert refined[layer] >= max(load.sum() / problem.ranks, floor) * (1 - 1e-9)


@_FEW
@given(problems(), st.integers(0, 12))
def test_moves_keep_to_their_budget(problem: Problem, budget: int) -> None:
    start = solve(problem, "greedy").slots
    for policy in ("incremental", "robust"):
        there = Problem(problem.loads[::-1], problem.ranks, problem.slots, current=start, max_moves=budget)
        answer = solve(there, policy)
        assert int((answer.slots != start).sum()) <= budget
        before = Solution("static", start, 0.0)
        load = there.newest if policy == "incremental" else estimate(there.loads)
        assert (_tops(answer, there, load) <= _tops(before, there, load) * (1 + 1e-9)).all()


@settings(max_examples=150, deadline=None)
@given(problems(allow_duplicates=True))
def test_greedy_with_duplicates_is_the_published_algorithm(problem: Problem) -> None:
    loads = problem.newest + np.random.default_rng(problem.seed).random(problem.newest.shape)  # ties have no order
    fixed = Problem(loads, problem.ranks, problem.slots, allow_duplicates=True)
    slots, _, counts = rebalance_experts(loads, problem.slots, 1, 1, problem.ranks)
    mine = solve(fixed, "greedy")
    for layer in range(problem.layers):
        assert np.array_equal(np.bincount(mine.slots[layer], minlength=problem.experts), counts[layer])
        assert np.array_equal(counts[layer], planner.replicate(loads[layer], problem.slots))
    theirs = Solution("published", slots.astype(np.int32), 0.0)
    for one, other in zip(mine.rank_loads(loads, fixed), theirs.rank_loads(loads, fixed), strict=True):
        assert np.allclose(np.sort(one), np.sort(other))


def _greedy_by_scanning(load: np.ndarray, ranks: int, size: int) -> list[list[int]] | None:
    """Without duplicates, with lists and scans: what each rank holds; None where two experts would change places."""
    counts = [1] * len(load)
    for _ in range(ranks * size - len(load)):
        open_to_more = [e for e in range(len(load)) if counts[e] < ranks]
        counts[max(open_to_more, key=lambda e: load[e] / counts[e])] += 1
    held, loads = [list[int]() for _ in range(ranks)], [0.0] * ranks
    for expert in sorted(range(len(load)), key=lambda e: -load[e] / counts[e]):
        for _ in range(counts[expert]):
            fits = [r for r in range(ranks) if len(held[r]) < size and expert not in held[r]]
            if not fits:
                return None
            best = min(fits, key=lambda r: loads[r])
            held[best].append(expert)
            loads[best] += load[expert] / counts[expert]
    return held


def test_greedy_with_heaps_is_that_of_scanning_all() -> None:
    rng, same = np.random.default_rng(4), 0
    for case in range(400):
        ranks, experts = int(rng.integers(1, 9)), int(rng.integers(4, 33))
        size = min(-(-experts // ranks) + int(rng.integers(0, 4)), experts)
        load = rng.integers(0, 9, experts).astype(float) if case % 2 else rng.random(experts)
        expected = _greedy_by_scanning(load, ranks, size)
        if expected is not None:
            mine = solve(Problem(load[np.newaxis], ranks, ranks * size), "greedy").slots.reshape(ranks, size)
            assert mine.tolist() == expected
            same += 1
    assert same > 200


def test_a_thousand_random_loads_are_balanced_as_published() -> None:
    rng = np.random.default_rng(1)
    for _ in range(1000):
        ranks, experts = int(rng.integers(1, 9)), int(rng.integers(1, 33))
        slots = ranks * int(rng.integers(-(-experts // ranks), -(-experts // ranks) + 4))
        loads = rng.random((1, experts)) * 1000
        problem = Problem(loads, ranks, slots, allow_duplicates=True)
        published = Solution("published", rebalance_experts(loads, slots, 1, 1, ranks)[0].astype(np.int32), 0.0)
        mine = solve(problem, "greedy")
        assert np.allclose(*(np.sort(one.rank_loads(loads, problem)) for one in (mine, published)))


@pytest.mark.parametrize("groups", [4, 8])
def test_greedy_on_nodes_is_the_published_hierarchical_one(groups: int) -> None:
    loads = np.random.default_rng(groups).random((5, 32))
    problem = Problem(loads, 8, 40, nodes=4, groups=groups, allow_duplicates=True)
    slots, _, _ = rebalance_experts(loads, 40, groups, 4, 8)
    theirs = Solution("published", slots.astype(np.int32), 0.0).rank_loads(loads, problem)
    assert np.allclose(np.sort(solve(problem, "greedy").rank_loads(loads, problem)), np.sort(theirs))


def test_the_known_example_is_solved_to_the_optimum() -> None:
    problem = Problem(np.array([EXAMPLE], float), 8, 16)
    assert _tops(solve(problem, "greedy"), problem)[0] == pytest.approx(232)
    assert _tops(solve(problem, "refine"), problem)[0] == pytest.approx(196.667, abs=1e-3)


@pytest.mark.parametrize(("ranks", "slots", "least"), [(32, 288, 0.998), (8, 288, 0.998), (72, 288, 0.985)])
def test_quality_on_many_experts(ranks: int, slots: int, least: float) -> None:
    loads = np.exp(np.random.default_rng(ranks).normal(0, 1, (4, 256)))
    problem = Problem(loads, ranks, slots)
    bounds = [max(load.sum() / ranks, kernels.floor_of(load, slots, ranks)) for load in loads]
    assert float((bounds / _tops(solve(problem, "refine"), problem)).mean()) >= least


@pytest.mark.parametrize("ranks", [8, 32])
def test_little_moves_where_loads_drift(ranks: int) -> None:
    """Against greedy with slots kept within ranks, at greedy's balance or better."""
    rng = np.random.default_rng(ranks)
    logits = rng.normal(0, 1, (4, 256))
    current = solve(Problem(np.exp(logits), ranks, 288), "refine").slots
    loads = np.exp(logits + rng.normal(0, 0.03, logits.shape))
    problem = Problem(loads, ranks, 288, current=current)
    answer, greedy = solve(problem, "incremental"), solve(Problem(loads, ranks, 288), "greedy")
    kept = np.stack([planner.keep_slots(a, b, ranks) for a, b in zip(current, greedy.slots, strict=True)])
    assert _tops(answer, problem).sum() <= _tops(greedy, problem).sum() * (1 + 1e-9)
    assert int((answer.slots != current).sum()) <= 0.1 * int((kept != current).sum())


def test_many_ranks_keep_what_is_theirs() -> None:
    """Beyond what is matched exactly: the same placement with its ranks in another order comes back as it was."""
    slots = np.arange(400, dtype=np.int32)[np.newaxis]
    out = np.empty_like(slots)
    kernels.relabel_layers(slots.reshape(200, 2)[::-1].reshape(1, -1).copy(), slots, np.arange(0, 402, 2), 400, out)
    assert np.array_equal(out, slots)


def test_loads_that_drift_far_do_not_leave_incremental_behind() -> None:
    """Experts that become hot need replicas of others, which no single step can take away."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 0.5, (2, 64))
    current, moved = solve(Problem(np.exp(logits), 8, 80), "refine").slots, 0
    for _ in range(60):
        logits = logits + rng.normal(0, 0.15, logits.shape)
        problem = Problem(np.exp(logits), 8, 80, current=current)
        answer = solve(problem, "incremental")
        _require_legal(answer, problem)
        assert _tops(answer, problem).sum() <= 1.002 * _tops(solve(problem, "greedy"), problem).sum()
        moved += int((answer.slots != current).sum())
        current = answer.slots
    assert moved < 0.25 * 60 * current.size


def test_labels_change_so_that_slots_stay() -> None:
    rng = np.random.default_rng(5)
    slots = solve(Problem(rng.random((1, 32)), 4, 40), "greedy").slots
    shuffled = slots.reshape(4, 10)[::-1, ::-1].reshape(1, 40).astype(np.int32)
    out = np.empty_like(slots)
    kernels.relabel_layers(shuffled, slots, np.arange(0, 50, 10), 32, out)
    assert np.array_equal(out, slots)


@_FEW
@given(problems())
def test_a_relabelled_placement_has_the_same_loads_and_keeps_as_much_as_possible(problem: Problem) -> None:
    from itertools import permutations

    there = solve(problem, "greedy").slots
    new = solve(Problem(problem.loads[:, :, ::-1], problem.ranks, problem.slots), "greedy").slots
    out = np.empty_like(new)
    kernels.relabel_layers(new, there, problem.first_slot, problem.experts, out)
    one, other = (Solution("x", s, 0.0).rank_loads(problem.newest, problem) for s in (new, out))
    assert np.allclose(np.sort(one), np.sort(other))
    if problem.ranks <= 4:
        size = problem.slots // problem.ranks
        for layer in range(problem.layers):
            ours, home = new[layer].reshape(-1, size).tolist(), there[layer].reshape(-1, size).tolist()
            common = [[len(set(a) & set(b)) for b in home] for a in ours]
            best = max(sum(common[a][b] for a, b in enumerate(p)) for p in permutations(range(problem.ranks)))
            assert int((out[layer] == there[layer]).sum()) == best


def test_ranks_of_other_sizes_and_without_experts() -> None:
    loads = np.random.default_rng(3).random((2, 20))
    uneven = Problem(loads, 4, 28, slots_per_rank=(10, 8, 6, 4))
    masked = Problem(loads, 4, 32, masked_ranks=(2,), current=solve(Problem(loads, 4, 32), "refine").slots)
    for problem in (uneven, masked):
        for policy in ("greedy", "refine", *(("incremental",) if problem.current is not None else ())):
            _require_legal(solve(problem, policy), problem)
    assert any("had to change" in note for note in solve(masked, "incremental").notes)


def test_what_is_there_may_be_wrong() -> None:
    """A placement with duplicates and without some expert is repaired before it is improved."""
    problem = Problem(np.ones((1, 6)), 2, 8, current=np.array([[0, 0, 1, 2, 3, 3, 4, 4]], np.int32))
    _require_legal(solve(problem, "incremental"), problem)


@pytest.mark.parametrize("policy", POLICIES)
def test_loading_and_compiling_are_no_time_of_a_plan(policy: str) -> None:
    program = (
        "import numpy as np\nfrom moe_eplb.planning.policies import solve\n"
        "from moe_eplb.planning.problem import Problem\n"
        "there = np.array([[0, 1, 2, 3, 0, 1]])\n"
        "problem = Problem(np.array([[5.0, 1, 1, 1]]), 2, 6, current=there, time_budget_ms=100)\n"
        f"answer = solve(problem, {policy!r})\nprint(answer.finished, answer.milliseconds)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=110, cwd=root, check=True
    )
    assert done.stdout.startswith("True "), done.stdout


def test_time_budgets_are_kept_and_said() -> None:
    loads = np.exp(np.random.default_rng(0).normal(0, 1, (58, 256)))
    solve(Problem(loads[:1], 72, 288), "refine")  # compiled
    answer = solve(Problem(loads, 72, 288, time_budget_ms=3), "refine")
    _require_legal(answer, Problem(loads, 72, 288))
    assert answer.milliseconds < 60
    assert not answer.finished
    assert "best so far" in answer.notes[-1]


def test_estimates_follow_drift_and_average_noise() -> None:
    rng = np.random.default_rng(1)
    base = rng.random((1, 16)) + 0.1
    noisy = rng.poisson(base * 60, (12, 1, 16)).astype(float)
    error = np.abs(estimate(noisy) / estimate(noisy).sum() - base / base.sum()).sum()
    assert error < 0.6 * np.abs(noisy[-1] / noisy[-1].sum() - base / base.sum()).sum()
    drifting = np.exp(np.cumsum(rng.normal(0, 0.5, (12, 1, 16)), axis=0))
    assert np.allclose(estimate(drifting), drifting[-1])
    assert np.allclose(estimate(np.zeros((3, 1, 4))), 0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"slots": 9}, "do not divide"), ({"slots": 5}, "do not fit"), ({"loads": np.full((1, 8), -1.0)}, "not usable"),
        ({"loads": np.full((1, 8), np.nan)}, "not usable"), ({"loads": np.zeros((1, 0))}, "loads must be"),
        ({"ranks": 0}, "at least 1"), ({"masked_ranks": (7,)}, "does not exist"), ({"nodes": 3}, "nodes"),
        ({"slots": 45}, "allow_duplicates"), ({"slots_per_rank": (4, 4)}, "slots_per_rank"),
        ({"current": np.zeros((2, 10), np.int32)}, "does not fit"),
        ({"current": np.full((1, 10), 9, np.int32)}, "do not exist"), ({"masked_ranks": (0, 1, 2)}, "do not fit"),
    ],
)  # fmt: skip
def test_what_is_no_problem(change: dict[str, Any], what: str) -> None:
    good: dict[str, Any] = {"loads": np.ones((1, 8)), "ranks": 5, "slots": 10}
    with pytest.raises(UsageError, match=what) as caught:
        Problem(**(good | change))
    assert caught.value.code == "E190"


def test_policies_that_cannot_answer() -> None:
    problem = Problem(np.ones((1, 8)), 2, 8)
    for policy in ("nothing", "incremental"):
        with pytest.raises(UsageError) as caught:
            solve(problem, policy)
        assert caught.value.code == "E191"


def test_kernels_are_the_same_compiled_and_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs the same text; where it and the compiler differ, numbers overflow or wrap."""
    rng = np.random.default_rng(8)
    loads = np.exp(rng.normal(0, 1, (2, 12)))
    problem = Problem(loads, 3, 18)
    compiled = solve(problem, "refine").slots
    drifted = Problem(loads * np.exp(rng.normal(0, 0.2, loads.shape)), 3, 18, current=compiled)
    moved = solve(drifted, "incremental").slots
    modules = (
        kernels, kernels.greedy, kernels.search, kernels.steps, kernels.fixes, kernels.state, kernels.restarts,
        kernels.labels, kernels.rounds,
    )  # fmt: skip
    plain = {
        (module, name): getattr(module, name).py_func
        for module in modules
        for name in dir(module)
        if hasattr(getattr(module, name), "py_func")
    }
    assert len(plain) > 20
    for (module, name), function in plain.items():
        monkeypatch.setattr(module, name, function)
    with np.errstate(over="ignore"):
        assert np.array_equal(solve(problem, "refine").slots, compiled)
        assert np.array_equal(solve(drifted, "incremental").slots, moved)

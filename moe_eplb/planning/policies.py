"""The policies: from a problem to a placement of every layer. Pure and deterministic.

``greedy`` is DeepSeek's published algorithm (github.com/deepseek-ai/EPLB), flat or hierarchical. ``refine`` improves it
by exchanges and changes of replicas. ``incremental`` starts from what is there and moves as little as it takes;
``robust`` does so for a load estimated from all windows. ``static`` leaves everything where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np

from moe_eplb.core.errors import UsageError
from moe_eplb.core.planner import initial_slots
from moe_eplb.planning.from_current import from_current
from moe_eplb.planning.greedy import CHUNK, Clock, greedy_of
from moe_eplb.planning.problem import Loads, Problem, Slots, Solution

__all__ = ["POLICIES", "estimate", "solve"]

TOLERANCE = 0.0005
"""How close to its bound a layer is good enough."""
_FAR_BEYOND = 0.9
"""Share of greedy's largest loads that a budget is spent for."""
_STEPS = 4000
_KICKS_OF_SMALL, _KICKS = 400, 3
_SMALL = 64
_DECAYS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97)
"""Weights of a window against the one after it, among which an estimate chooses."""


def solve(problem: Problem, policy: str) -> Solution:
    """The placement of a policy.

    Raises:
        UsageError: E191 there is no such policy, or it needs a current placement and there is none.
    """
    make = POLICIES.get(policy)
    if make is None:
        raise UsageError("E191", f"there is no policy {policy!r}", hint=f"one of {', '.join(POLICIES)}")
    _make_ready(policy)  # takes half a second in a new process, which is no time of the planner's
    begun = time.perf_counter()
    budget = problem.time_budget_ms
    clock = Clock(np.inf if budget is None else begun + budget / 1e3)
    slots, notes = make(problem, clock)
    if problem.current is not None:
        held = list(problem.held)
        slots[held] = problem.current[held]
    finished = not clock.over
    if not finished:
        notes = (*notes, f"the time budget of {budget:g} ms ended it: this is the best so far")
    return Solution(policy, slots, (time.perf_counter() - begun) * 1e3, finished, notes)


@cache
def _make_ready(policy: str) -> None:
    """Load what a policy runs, and compile it where it is new, by the least problem that calls all of it."""
    windows, there = np.array([[[4.0, 1.0, 1.0]], [[1.0, 4.0, 1.0]]]), np.array([[0, 1, 2, 0]], np.int32)
    POLICIES[policy](Problem(windows, 2, 4, current=there), Clock(np.inf))


def estimate(loads: Loads) -> Loads:
    """What the next window's load [L, E] will be, from windows [W, L, E], in the newest one's units.

    A mean of the windows' shares in which each weighs less than the one after it, by the factor that would have told
    the windows so far best: the newest alone where loads drift, nearly all of them where they only scatter.
    """
    sums = loads.sum(axis=2, keepdims=True)
    shares = np.divide(loads, sums, out=np.zeros_like(loads), where=sums > 0)
    errors = [_error(shares, decay) for decay in _DECAYS]
    told: Loads = _mean(shares, _DECAYS[int(np.argmin(errors))]) * sums[-1]
    return told


def _mean(shares: Loads, decay: float) -> Loads:
    weights = decay ** np.arange(len(shares) - 1, -1, -1.0)
    mean: Loads = np.asarray(np.tensordot(weights / weights.sum(), shares, axes=1), np.float64)
    return mean


def _error(shares: Loads, decay: float) -> float:
    """How far the windows were from what those before them would have told, with this factor."""
    told, weight, error = shares[0].copy(), 1.0, 0.0
    for window in shares[1:]:
        error += float(np.square(window - told).sum())
        weight = weight * decay + 1.0
        told += (window - told) / weight
    return error


def _static(problem: Problem, clock: Clock) -> tuple[Slots, tuple[str, ...]]:
    if problem.current is not None:
        return problem.current.astype(np.int32), ()
    if not problem.plain:
        return greedy_of(problem, np.ones_like(problem.newest)), ("nothing is there yet: evenly spread",)
    row = initial_slots(problem.experts, problem.ranks, problem.slots // problem.ranks)
    return np.tile(row, (problem.layers, 1)), ("nothing is there yet: the initial placement",)


def _greedy(problem: Problem, clock: Clock) -> tuple[Slots, tuple[str, ...]]:
    return _kept(problem, greedy_of(problem, problem.newest)), ()


def _refine(problem: Problem, clock: Clock) -> tuple[Slots, tuple[str, ...]]:
    return _kept(problem, _refined(problem, problem.newest, clock)), ()


def _incremental(problem: Problem, clock: Clock) -> tuple[Slots, tuple[str, ...]]:
    return from_current(problem, problem.newest, clock)


def _robust(problem: Problem, clock: Clock) -> tuple[Slots, tuple[str, ...]]:
    load = estimate(problem.loads)
    if problem.current is None:
        return _refined(problem, load, clock), ()
    # What a budget leaves is worth spending: a better balance than greedy's also bears more of what nobody foresees.
    return from_current(problem, load, clock, beyond=1.0 if problem.max_moves is None else _FAR_BEYOND)


POLICIES: Mapping[str, Callable[[Problem, Clock], tuple[Slots, tuple[str, ...]]]] = {
    "static": _static, "greedy": _greedy, "refine": _refine, "incremental": _incremental, "robust": _robust,
}  # fmt: skip
"""Every policy by its name."""


def _refined(problem: Problem, load: Loads, clock: Clock) -> Slots:
    """Greedy, improved layer by layer for as long as there is time; with nodes, each node's ranks for themselves."""
    from moe_eplb.planning import kernels

    flat = greedy_of(problem if problem.nodes == 1 else _flat(problem), load)
    kicks = _KICKS_OF_SMALL if problem.slots <= _SMALL else _KICKS
    step = problem.layers if clock.end == np.inf else CHUNK
    for first in range(0, problem.layers, step):
        if clock.over:
            break
        kernels.refine_layers(
            load[first : first + step], problem.first_slot, problem.room, problem.allow_duplicates, TOLERANCE, _STEPS,
            kicks, problem.seed + first, flat[first : first + step],
        )  # fmt: skip
    return flat


def _flat(problem: Problem) -> Problem:
    return Problem(
        problem.loads, problem.ranks, problem.slots, allow_duplicates=problem.allow_duplicates,
        slots_per_rank=problem.slots_per_rank, masked_ranks=problem.masked_ranks,
    )  # fmt: skip


def _kept(problem: Problem, slots: Slots) -> Slots:
    """The same placement with ranks and slots renumbered so that as much as possible lies where it lay."""
    from moe_eplb.planning import kernels

    if problem.current is None or not problem.plain or problem.nodes > 1:
        return slots
    out = np.empty_like(slots)
    kernels.relabel_layers(slots, problem.current.astype(np.int32), problem.first_slot, problem.experts, out)
    return out

"""The policies: from a problem to a placement of every layer. Pure and deterministic.

``greedy`` is DeepSeek's published algorithm (github.com/deepseek-ai/EPLB), flat or hierarchical. ``refine`` improves it
by exchanges and changes of replicas. ``incremental`` starts from what is there and moves as little as it takes;
``robust`` does so for a load estimated from all windows. ``static`` leaves everything where it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import UsageError
from moe_eplb.core.planner import initial_slots
from moe_eplb.planning.problem import EMPTY, Loads, Problem, Slots, Solution

__all__ = ["POLICIES", "estimate", "solve"]

TOLERANCE = 0.0005
"""How close to its bound a layer is good enough."""
_BEYOND = 0.9993
"""How much further than greedy a layer is followed, so that it can make up for others."""
_FAR_BEYOND = 0.9
_STEPS = 4000
_KICKS_OF_SMALL, _KICKS = 400, 3
_SMALL = 64
_CHUNK = 4
_DECAYS = (0.0, 0.3, 0.6, 0.8, 0.9, 0.97)
"""Weights of a window against the one after it, among which an estimate chooses."""


@dataclass
class _Clock:
    """When to answer."""

    end: float

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self.end


def solve(problem: Problem, policy: str) -> Solution:
    """The placement of a policy.

    Raises:
        UsageError: E191 there is no such policy, or it needs a current placement and there is none.
    """
    make = POLICIES.get(policy)
    if make is None:
        raise UsageError("E191", f"there is no policy {policy!r}", hint=f"one of {', '.join(POLICIES)}")
    from moe_eplb.planning import kernels  # loaded, and where they are new compiled, before the clock runs

    assert kernels
    begun = time.perf_counter()
    budget = problem.time_budget_ms
    clock = _Clock(np.inf if budget is None else begun + budget / 1e3)
    slots, notes = make(problem, clock)
    finished = not clock.over
    if not finished:
        notes = (*notes, f"the time budget of {budget:g} ms ended it: this is the best so far")
    return Solution(policy, slots, (time.perf_counter() - begun) * 1e3, finished, notes)


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


def _static(problem: Problem, clock: _Clock) -> tuple[Slots, tuple[str, ...]]:
    if problem.current is not None:
        return problem.current.astype(np.int32), ()
    if not problem.plain:
        return _greedy_of(problem, np.ones_like(problem.newest)), ("nothing is there yet: evenly spread",)
    row = initial_slots(problem.experts, problem.ranks, problem.slots // problem.ranks)
    return np.tile(row, (problem.layers, 1)), ("nothing is there yet: the initial placement",)


def _greedy(problem: Problem, clock: _Clock) -> tuple[Slots, tuple[str, ...]]:
    return _kept(problem, _greedy_of(problem, problem.newest)), ()


def _refine(problem: Problem, clock: _Clock) -> tuple[Slots, tuple[str, ...]]:
    return _kept(problem, _refined(problem, problem.newest, clock)), ()


def _incremental(problem: Problem, clock: _Clock) -> tuple[Slots, tuple[str, ...]]:
    return _from_current(problem, problem.newest, clock)


def _robust(problem: Problem, clock: _Clock) -> tuple[Slots, tuple[str, ...]]:
    load = estimate(problem.loads)
    if problem.current is None:
        return _refined(problem, load, clock), ()
    # What a budget leaves is worth spending: a better balance than greedy's also bears more of what nobody foresees.
    return _from_current(problem, load, clock, beyond=_BEYOND if problem.max_moves is None else _FAR_BEYOND)


POLICIES: Mapping[str, Callable[[Problem, _Clock], tuple[Slots, tuple[str, ...]]]] = {
    "static": _static, "greedy": _greedy, "refine": _refine, "incremental": _incremental, "robust": _robust,
}  # fmt: skip
"""Every policy by its name."""


def _greedy_of(problem: Problem, load: Loads) -> Slots:
    from moe_eplb.planning import kernels

    slots = np.empty((problem.layers, problem.slots), np.int32)
    nodes, groups = problem.nodes, problem.groups
    if groups % nodes or problem.experts % groups or not problem.plain:
        nodes = groups = 1  # as published: what does not divide is one flat group
    kernels.greedy_layers(load, problem.first_slot, problem.room, nodes, groups, problem.allow_duplicates, slots)
    return slots


def _refined(problem: Problem, load: Loads, clock: _Clock) -> Slots:
    """Greedy, improved layer by layer for as long as there is time; with nodes, each node's ranks for themselves."""
    from moe_eplb.planning import kernels

    flat = _greedy_of(problem if problem.nodes == 1 else _flat(problem), load)
    kicks = _KICKS_OF_SMALL if problem.slots <= _SMALL else _KICKS
    step = problem.layers if clock.end == np.inf else _CHUNK
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


def _from_current(
    problem: Problem, load: Loads, clock: _Clock, beyond: float = _BEYOND
) -> tuple[Slots, tuple[str, ...]]:
    """From what is there to what greedy would reach, with as few moves as that takes, or as the budget allows."""
    from moe_eplb.planning import kernels
    from moe_eplb.planning.kernels import labels

    if problem.current is None:
        raise UsageError("E191", "this policy needs the placement that is there", hint="give it, or use refine")
    home, note = _usable(problem)
    targets = _targets(problem, load)
    forced = int((home != problem.current).sum())
    left = problem.slots * problem.layers if problem.max_moves is None else max(problem.max_moves - forced, 0)
    tops, moves, logs, steps = _steps_from(problem, load, home, targets * beyond, clock)
    enough = float(targets.sum()) * (1.0 if beyond >= _BEYOND else beyond)
    taken = _shared(tops, moves, steps, left, enough)
    slots = home.copy()
    kernels.replay_steps(logs, taken, slots)
    labels.settle_layers(slots, problem.current.astype(np.int32), problem.first_slot)
    if problem.max_moves is not None and forced > problem.max_moves:
        note = (*note, f"{forced} slots had to change, beyond the budget of {problem.max_moves}")
    return slots, note


def _steps_from(
    problem: Problem, load: Loads, home: Slots, targets: Loads, clock: _Clock
) -> tuple[Loads, NDArray[np.int64], Slots, NDArray[np.int64]]:
    """For each layer what each step did, and the largest load and the moved slots after it."""
    from moe_eplb.planning import kernels

    layers, most = problem.layers, 2 * problem.slots
    tops, moves = np.zeros((layers, most + 1)), np.zeros((layers, most + 1), np.int64)
    logs, steps = np.zeros((layers, most, 6), np.int32), np.zeros(layers, np.int64)
    budgets = np.full(layers, problem.slots, np.int64)
    step = layers if clock.end == np.inf else _CHUNK
    for first in range(0, layers, step):
        if clock.over:
            break
        part = slice(first, first + step)
        kernels.step_layers(
            load[part], home[part], problem.first_slot, problem.room, problem.allow_duplicates, targets[part],
            budgets[part], tops[part], moves[part], logs[part], steps[part],
        )  # fmt: skip
    return tops, moves, logs, steps


def _targets(problem: Problem, load: Loads) -> Loads:
    """The largest rank load that greedy reaches in each layer [L]."""
    greedy = _greedy_of(problem, load)
    loads: Loads = Solution("greedy", greedy, 0.0).rank_loads(load, problem).max(axis=1)
    return loads


def _shared(
    tops: Loads, moves: NDArray[np.int64], steps: NDArray[np.int64], budget: int, enough: float
) -> NDArray[np.int64]:
    """How many of its steps each layer makes, best first by what they lower its largest load for each moved slot.

    Steps of a layer come in order, so several are weighed together where later ones are worth more. It ends when the
    budget is spent, or the largest loads' sum is `enough`; without moves steps are free.
    """
    offers: list[tuple[float, int, int, int]] = []
    for layer, count in enumerate(steps.tolist()):
        top, moved, at = tops[layer, : count + 1], moves[layer, : count + 1], 0
        while at < count:
            worth = (top[at] - top[at + 1 :]) / np.maximum(moved[at + 1 :] - moved[at], 0.5)
            best = int(np.argmax(worth))
            if worth[best] <= 0:
                break
            offers.append((-float(worth[best]), layer, at, at + 1 + best))
            at += 1 + best
    taken = np.zeros(len(tops), np.int64)
    whole = float(tops[:, 0].sum())
    for _, layer, begin, end in sorted(offers):
        price = int(moves[layer, end] - moves[layer, begin])
        if whole <= enough or taken[layer] != begin or price > budget:
            continue
        taken[layer] = end
        budget -= price
        whole += float(tops[layer, end] - tops[layer, begin])
    _trim(tops, moves, taken, enough - whole)
    return taken


def _trim(tops: Loads, moves: NDArray[np.int64], taken: NDArray[np.int64], spare: float) -> None:
    """Take back last steps for as long as the largest loads' sum stays enough: the most moved slots first."""
    while True:
        best, where, back = 0, -1, 0
        for layer, end in enumerate(taken.tolist()):
            more, saved = tops[layer, :end] - tops[layer, end], moves[layer, end] - moves[layer, :end]
            saved = np.where(more <= spare, saved, 0)
            if end and int(saved.max()) > best:
                best, where, back = int(saved.max()), layer, int(np.argmax(saved))
        if where < 0:
            return
        spare -= float(tops[where, back] - tops[where, taken[where]])
        taken[where] = back


def _usable(problem: Problem) -> tuple[Slots, tuple[str, ...]]:
    """The current placement without what must not be: experts on masked ranks, missing experts, duplicates."""
    current = problem.current
    assert current is not None
    home = current.astype(np.int32)
    for rank in problem.masked_ranks:
        home[:, problem.first_slot[rank] : problem.first_slot[rank + 1]] = EMPTY
    repaired = sum(_repair(home[layer], problem) for layer in range(problem.layers))
    return home, (f"{repaired} slots of the current placement had to change first",) if repaired else ()


def _repair(slots: Slots, problem: Problem) -> int:
    """Give slots that duplicate an expert on their rank, and as many as needed, to experts that have none."""
    counts = np.bincount(slots[slots >= 0], minlength=problem.experts)
    missing = list(np.flatnonzero(counts == 0))
    free = _duplicates(slots, problem) if not problem.allow_duplicates else []
    changed = 0
    for slot in free:
        rank = int(np.searchsorted(problem.first_slot, slot, side="right")) - 1
        mine = slots[problem.first_slot[rank] : problem.first_slot[rank + 1]]
        expert = missing.pop(0) if missing else int(next(e for e in np.argsort(counts, kind="stable") if e not in mine))
        counts[slots[slot]] -= 1
        counts[expert] += 1
        slots[slot] = expert
        changed += 1
    for expert in missing:
        slot = int(np.argmax(np.where(slots >= 0, counts[np.maximum(slots, 0)], 0)))
        counts[slots[slot]] -= 1
        counts[expert] += 1
        slots[slot] = expert
        changed += 1
    return changed


def _duplicates(slots: Slots, problem: Problem) -> list[int]:
    """Slots whose expert lies in an earlier slot of the same rank."""
    held = np.flatnonzero(slots >= 0)
    ranks = np.searchsorted(problem.first_slot, held, side="right")
    _, first = np.unique(ranks * problem.experts + slots[held], return_index=True)
    again: list[int] = np.delete(held, first).tolist()
    return again


def _kept(problem: Problem, slots: Slots) -> Slots:
    """The same placement with ranks and slots renumbered so that as much as possible lies where it lay."""
    from moe_eplb.planning import kernels

    if problem.current is None or not problem.plain or problem.nodes > 1:
        return slots
    out = np.empty_like(slots)
    kernels.relabel_layers(slots, problem.current.astype(np.int32), problem.first_slot, problem.experts, out)
    return out

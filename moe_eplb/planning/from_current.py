"""From the placement that is there to one as balanced as greedy's, with as few moved slots as that takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.greedy import CHUNK, Clock, greedy_of
from moe_eplb.planning.problem import Loads, Problem, Slots, Solution
from moe_eplb.planning.usable import usable

__all__ = ["from_current"]


def from_current(problem: Problem, load: Loads, clock: Clock, beyond: float = 1.0) -> tuple[Slots, tuple[str, ...]]:
    """From what is there to what greedy would reach, with as few moves as that takes, or as the budget allows.

    Args:
        beyond: The share of greedy's largest loads at which to stop.

    Returns:
        Slots [L, P], and what is to be said of them.

    Raises:
        UsageError: E191 there is no current placement.
    """
    from moe_eplb.planning import kernels
    from moe_eplb.planning.kernels import labels

    if problem.current is None:
        raise UsageError("E191", "this policy needs the placement that is there", hint="give it, or use refine")
    home, note = usable(problem)
    targets = _targets(problem, load)
    forced = int((home != problem.current).sum())
    left = problem.slots * problem.layers if problem.max_moves is None else max(problem.max_moves - forced, 0)
    tops, moves, logs, steps = _steps_from(problem, load, home, _levelled(problem, load, targets) * beyond, clock)
    enough = float(targets.sum()) * beyond
    taken = _shared(tops, moves, steps, left, enough)
    slots = home.copy()
    kernels.replay_steps(logs, taken, slots)
    labels.settle_layers(slots, problem.current.astype(np.int32), problem.first_slot)
    if problem.max_moves is not None and forced > problem.max_moves:
        note = (*note, f"{forced} slots had to change, beyond the budget of {problem.max_moves}")
    return slots, note


def _steps_from(
    problem: Problem, load: Loads, home: Slots, targets: Loads, clock: Clock
) -> tuple[Loads, NDArray[np.int64], Slots, NDArray[np.int64]]:
    """For each layer what each step did, and the largest load and the moved slots after it."""
    from moe_eplb.planning import kernels

    layers, most = problem.layers, 2 * problem.slots
    tops, moves = np.zeros((layers, most + 1)), np.zeros((layers, most + 1), np.int64)
    logs, steps = np.zeros((layers, most, 2 * kernels.LONGEST), np.int32), np.zeros(layers, np.int64)
    budgets = np.full(layers, problem.slots, np.int64)
    budgets[list(problem.held)] = 0
    step = layers if clock.end == np.inf else CHUNK
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
    greedy = greedy_of(problem, load)
    loads: Loads = Solution("greedy", greedy, 0.0).rank_loads(load, problem).max(axis=1)
    return loads


def _levelled(problem: Problem, load: Loads, targets: Loads) -> Loads:
    """The same sum of targets [L], each as far above its layer's bound as the others.

    Where a target is close to its bound there is little room to make it with, and each slot that moves brings less.
    """
    from moe_eplb.planning import kernels

    total, ranks = int(problem.room.sum()), int((problem.room > 0).sum())
    floors = [kernels.floor_of(row, total, total if problem.allow_duplicates else ranks) for row in load]
    bounds = np.maximum(np.array(floors), load.sum(axis=1) / ranks)
    whole = float(bounds.sum())
    return bounds * (float(targets.sum()) / whole) if whole > 0 else targets


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

"""What there is, made usable before it is improved: masked ranks are empty, no expert is missing or twice on a rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moe_eplb.planning.problem import EMPTY, Problem, Slots

__all__ = ["usable"]


def usable(problem: Problem) -> tuple[Slots, tuple[str, ...]]:
    """The current placement without what must not be: experts on masked ranks, missing experts, duplicates.

    Layers that are held keep it as it is.
    """
    current = problem.current
    assert current is not None
    home = current.astype(np.int32)
    for rank in problem.masked_ranks:
        home[:, problem.first_slot[rank] : problem.first_slot[rank + 1]] = EMPTY
    held = list(problem.held)
    home[held] = current[held]
    broken = np.setdiff1d(np.flatnonzero(_unusable(home, problem)), held)
    repaired = sum(_repair(home[layer], problem) for layer in broken)
    return home, (f"{repaired} slots of the current placement had to change first",) if repaired else ()


def _unusable(home: Slots, problem: Problem) -> NDArray[np.bool_]:
    """Which layers [L] lack an expert, or hold one twice on a rank that must not."""
    layers, experts = np.arange(len(home))[:, np.newaxis], problem.experts
    flat = np.where(home >= 0, home + layers * experts, len(home) * experts)
    counts = np.bincount(flat.reshape(-1), minlength=len(home) * experts + 1)[:-1].reshape(len(home), experts)
    wrong: NDArray[np.bool_] = (counts == 0).any(axis=1)
    if problem.allow_duplicates:
        return wrong
    ranks = np.searchsorted(problem.first_slot, np.arange(problem.slots), side="right")
    keys = np.sort(np.where(home >= 0, home + ranks * experts, -1), axis=1)
    twice: NDArray[np.bool_] = ((keys[:, 1:] == keys[:, :-1]) & (keys[:, 1:] >= 0)).any(axis=1)
    return wrong | twice


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

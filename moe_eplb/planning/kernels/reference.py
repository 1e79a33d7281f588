"""TensorRT-LLM's rules for a single layer, compiled; `moe_eplb.core.planner` is the slow exact twin."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from moe_eplb.planning.kernels.compiled import compiled

__all__ = ["reference_slots"]

_SHORT = 50_000
"""Steps that take less time than it takes two threads to change places twice."""


def reference_slots(load: NDArray[np.float64], current: NDArray[np.int32], ranks: int, keep: bool) -> NDArray[np.int32]:
    """See `_slots`. The interpreter's lock is given away where that pays: who gives it has to wait to get it back."""
    slots, experts = len(current), len(load)
    steps = (slots - experts) * experts + slots * (ranks + slots // ranks)
    found: NDArray[np.int32] = (_slots_at_once if steps < _SHORT else _slots)(load, current, ranks, keep)
    return found


@compiled
def _slots(load: NDArray[np.float64], current: NDArray[np.int32], ranks: int, keep: bool) -> NDArray[np.int32]:
    """The expert of each slot int32 [P] for a load float64 [E], finite and >= 0, on the slots of `current` [P].

    With `keep` an expert that stays on a rank stays in its slot.
    """
    counts = _replicas(load, len(current))
    slots = _place(load / counts, counts, len(current), ranks)
    return _keep(current, slots, len(current) // ranks) if keep else slots


_slots_at_once = njit(cache=True)(_slots.py_func)


@compiled
def _replicas(load: NDArray[np.float64], slots: int) -> NDArray[np.int64]:
    """The next replica goes to the largest load per replica, the higher expert on a tie; evenly without any load."""
    experts = len(load)
    counts = np.ones(experts, np.int64)
    if not load.any():
        for extra in range(slots - experts):
            counts[extra % experts] += 1
        return counts
    share = load.copy()
    for _ in range(slots - experts):
        best = 0
        for expert in range(1, experts):
            if share[expert] >= share[best]:
                best = expert
        counts[best] += 1
        share[best] = load[best] / counts[best]
    return counts


@compiled
def _place(size: NDArray[np.float64], counts: NDArray[np.int64], slots: int, ranks: int) -> NDArray[np.int32]:
    """Replicas by falling size go to the rank with the least load that has a slot left, the lower rank on a tie."""
    per_rank = slots // ranks
    placed = np.empty(slots, np.int32)
    total, used = np.zeros(ranks), np.zeros(ranks, np.int64)
    for expert in np.argsort(-size, kind="mergesort"):
        for _ in range(counts[expert]):
            best = -1
            for rank in range(ranks):
                if used[rank] < per_rank and (best < 0 or total[rank] < total[best]):
                    best = rank
            placed[best * per_rank + used[best]] = expert
            used[best] += 1
            total[best] += size[expert]
    return placed


@compiled
def _keep(current: NDArray[np.int32], new: NDArray[np.int32], per_rank: int) -> NDArray[np.int32]:
    """Each rank's experts reordered so that those that it holds already stay in their slots."""
    kept = np.full(len(new), -1, np.int32)
    for first in range(0, len(new), per_rank):
        arrived = np.zeros(per_rank, np.bool_)
        for slot in range(first, first + per_rank):
            for other in range(per_rank):
                if not arrived[other] and new[first + other] == current[slot]:
                    kept[slot], arrived[other] = current[slot], True
                    break
        slot = first
        for other in range(per_rank):
            if not arrived[other]:
                while kept[slot] >= 0:
                    slot += 1
                kept[slot] = new[first + other]
    return kept

"""The local search, begun again from near its best end where that is not good enough."""

from __future__ import annotations

import numpy as np

from moe_eplb.planning.kernels.compiled import compiled
from moe_eplb.planning.kernels.greedy import floor_of
from moe_eplb.planning.kernels.search import improve, measure

__all__ = ["kick", "refine_layers"]


@compiled
def _draw(state, below):
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.int64((x >> np.uint64(11)) % np.uint64(below))


@compiled
def kick(load, slots, first, duplicates, state, strength):
    """Exchange and replace some slots at random; `state` is one uint64 of a xorshift generator, changed in place."""
    ranks, experts = len(first) - 1, len(load)
    counts, held = np.empty(experts, np.int64), np.empty(ranks)
    lies = np.empty((experts, ranks), np.int16)
    measure(load, slots, first, counts, held, lies)
    total = len(slots)
    rank_of = np.empty(total, np.int64)
    for rank in range(ranks):
        rank_of[first[rank] : first[rank + 1]] = rank
    for _ in range(strength):
        one, two = _draw(state, total), _draw(state, total)
        x, y, a, b = slots[one], slots[two], rank_of[one], rank_of[two]
        if x < 0 or y < 0 or a == b or x == y:
            continue
        if _draw(state, 2) == 0 and counts[x] > 1 and (duplicates or lies[y, a] == 0):
            slots[one] = y
            counts[x] -= 1
            counts[y] += 1
            lies[x, a] -= 1
            lies[y, a] += 1
        elif duplicates or (lies[x, b] == 0 and lies[y, a] == 0):
            slots[one], slots[two] = y, x
            lies[x, a] -= 1
            lies[x, b] += 1
            lies[y, a] += 1
            lies[y, b] -= 1


@compiled
def _nothing():
    return np.empty(0, np.int32), np.empty(0), np.empty(0, np.int64), np.empty((0, 4), np.int32)


@compiled
def refine_layers(loads, first, room, duplicates, tolerance, most_steps, kicks, seed, slots):
    """Improve placements [L, P] in place until each is within `tolerance` of its bound or nothing helps.

    From a local optimum that is not good enough it is left by chance `kicks` times; the best one found is kept.
    """
    ranks, experts = len(room), loads.shape[1]
    total, open_ranks = 0, 0
    for rank in range(ranks):
        total += room[rank]
        open_ranks += room[rank] > 0
    none, no_tops, no_moves, no_log = _nothing()
    state = np.array([seed * 2654435761 + 88172645463325252], np.uint64)
    for layer in range(len(loads)):
        load = loads[layer]
        mean = load.sum() / max(open_ranks, 1)
        bound = max(mean, floor_of(load, total, total if duplicates else open_ranks))
        target = bound * (1.0 + tolerance)
        top, _ = improve(load, slots[layer], first, duplicates, target, none, 0, most_steps, no_tops, no_moves, no_log)
        best = slots[layer].copy()
        trial = np.empty(len(best), np.int32)
        for turn in range(kicks):
            if top <= target:
                break
            trial[:] = best
            kick(load, trial, first, duplicates, state, 2 + turn % 4)
            found, _ = improve(load, trial, first, duplicates, target, none, 0, most_steps, no_tops, no_moves, no_log)
            if found < top:
                top = found
                best[:] = trial
        slots[layer] = best
    return experts

"""The local search, begun again from near its best end where that is not good enough."""

from __future__ import annotations

import numpy as np

from moe_eplb.planning.kernels.compiled import compiled
from moe_eplb.planning.kernels.greedy import floor_of
from moe_eplb.planning.kernels.search import improve
from moe_eplb.planning.kernels.state import exchange, new_state, replace, set_layer

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
def kick(state, duplicates, random, strength):
    """Exchange and replace some slots at random; `random` is one uint64 of a xorshift generator, changed in place."""
    slots, lies, total = state.slots, state.lies, len(state.slots)
    for _ in range(strength):
        one, two = _draw(random, total), _draw(random, total)
        x, y, a, b = slots[one], slots[two], state.rank_of[one], state.rank_of[two]
        if x < 0 or y < 0 or a == b or x == y:
            continue
        if _draw(random, 2) == 0 and state.counts[x] > 1 and (duplicates or lies[y, a] == 0):
            replace(state, one, y)
        elif duplicates or (lies[x, b] == 0 and lies[y, a] == 0):
            exchange(state, one, two)


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
    random = np.array([seed * 2654435761 + 88172645463325252], np.uint64)
    state = new_state(experts, first)
    for layer in range(len(loads)):
        load = loads[layer]
        mean = load.sum() / max(open_ranks, 1)
        bound = max(mean, floor_of(load, total, total if duplicates else open_ranks))
        target = bound * (1.0 + tolerance)
        set_layer(state, load, slots[layer])
        best = improve(state, duplicates, target, most_steps)
        slots[layer] = state.slots
        for turn in range(kicks):
            if best <= target:
                break
            kick(state, duplicates, random, 2 + turn % 4)
            found = improve(state, duplicates, target, most_steps)
            if found < best:
                best = found
                slots[layer] = state.slots
            else:
                set_layer(state, load, slots[layer])

"""The least largest rank load of a placement whose experts' tokens may be divided among their replicas freely."""

from __future__ import annotations

import numpy as np

from moe_eplb.planning.kernels.compiled import compiled
from moe_eplb.planning.kernels.state import new_state, set_layer

__all__ = ["free_split_layers"]

_SLIGHT = 1e-12
"""Share of the whole load that counts as nothing."""


@compiled
def _widen(state, flow, room, expert, slight, seen, via, source, queue):
    """A rank with room that an expert's tokens can reach by moving others' tokens on, -1 for none.

    A rank that is full passes tokens of an expert on to another rank that holds the expert: `via` [R] is the slot where
    they arrive and `source` [R] the one that they leave, -1 for where the expert itself begins. What was `seen` [R] and
    has no room is all that its tokens can reach.
    """
    seen[:] = False
    count, at = 0, 0
    slot = state.head[expert]
    while slot >= 0:
        rank = state.rank_of[slot]
        if not seen[rank]:
            seen[rank], via[rank], source[rank] = True, slot, -1
            queue[count] = rank
            count += 1
        slot = state.follow[slot]
    while at < count:
        rank = queue[at]
        at += 1
        if room[rank] > slight:
            return rank
        for leaves in range(state.first[rank], state.first[rank + 1]):
            if state.slots[leaves] < 0 or flow[leaves] <= slight:
                continue
            slot = state.head[state.slots[leaves]]
            while slot >= 0:
                other = state.rank_of[slot]
                if not seen[other]:
                    seen[other], via[other], source[other] = True, slot, leaves
                    queue[count] = other
                    count += 1
                slot = state.follow[slot]
    return -1


@compiled
def _push(state, flow, room, rank, most, via, source):
    """Move as many tokens along the way that `_widen` found, and at most so many; how many."""
    amount, at = min(most, room[rank]), rank
    while source[at] >= 0:
        amount = min(amount, flow[source[at]])
        at = state.rank_of[source[at]]
    room[rank] -= amount
    at = rank
    while True:
        flow[via[at]] += amount
        if source[at] < 0:
            return amount
        flow[source[at]] -= amount
        at = state.rank_of[source[at]]


@compiled
def _inside(state, seen):
    """The load per rank of the experts all of whose replicas lie on the ranks seen."""
    whole, ranks = 0.0, 0
    for rank in range(len(seen)):
        ranks += seen[rank]
    for expert in range(len(state.load)):
        slot, inside = state.head[expert], True
        while slot >= 0:
            inside &= seen[state.rank_of[slot]]
            slot = state.follow[slot]
        whole += state.load[expert] if inside else 0.0
    return whole / ranks


@compiled
def _fits(state, top, slight, flow, room, seen, via, source, queue):
    """Whether no rank needs more than `top`; if not, `seen` are ranks whose own experts are too much for them."""
    flow[:], room[:] = 0.0, top
    for expert in range(len(state.load)):
        left = state.load[expert]
        while left > slight:
            rank = _widen(state, flow, room, expert, slight, seen, via, source, queue)
            if rank < 0:
                return False
            left -= _push(state, flow, room, rank, left, via, source)
    return True


@compiled
def free_split_layers(loads, slots, first, least):
    """For loads [L, E] and placements [L, P] the least largest rank load into `least` [L].

    By the theorem of maximum flow and minimum cut it is the largest load per rank of any set of ranks, of the experts
    that lie nowhere else; found by Newton's method from the mean, each cut that is too full being the next guess.
    """
    ranks = len(first) - 1
    state = new_state(loads.shape[1], first)
    flow, room, seen = np.empty(first[-1]), np.empty(ranks), np.empty(ranks, np.bool_)
    via, source, queue = np.empty(ranks, np.int64), np.empty(ranks, np.int64), np.empty(ranks, np.int64)
    for layer in range(len(loads)):
        set_layer(state, loads[layer], slots[layer])
        whole = state.load.sum()
        slight, top = whole * _SLIGHT, whole / ranks
        while not _fits(state, top, slight, flow, room, seen, via, source, queue):
            found = _inside(state, seen)
            if found <= top * (1.0 + 1e-9):
                break
            top = found
        least[layer] = top

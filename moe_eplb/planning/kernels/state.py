"""A layer's placement while it is searched: who holds what, and what that weighs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_eplb.planning.kernels.compiled import compiled

__all__ = ["State", "exchange", "new_state", "replace", "set_layer", "weigh"]


class State(NamedTuple):
    """Buffers of one layer, used again for the next.

    Attributes:
        load: What each expert carries [E].
        slots: The expert of each slot [P], -1 for none.
        first: Where each rank's slots begin [R + 1].
        rank_of: The rank of each slot [P].
        counts: Replicas of each expert [E].
        held: Load of each rank [R].
        lies: Replicas of each expert on each rank [E, R].
        share, up, down: What a replica of an expert carries [E], and would with one replica fewer and one more.
        head, follow: A slot of each expert [E] and the next slot of the same expert after each [P], -1 for none.
    """

    load: NDArray[np.float64]
    slots: NDArray[np.int32]
    first: NDArray[np.int64]
    rank_of: NDArray[np.int32]
    counts: NDArray[np.int64]
    held: NDArray[np.float64]
    lies: NDArray[np.int16]
    share: NDArray[np.float64]
    up: NDArray[np.float64]
    down: NDArray[np.float64]
    head: NDArray[np.int32]
    follow: NDArray[np.int32]


@compiled
def new_state(experts, first):
    """Buffers for layers of so many experts on ranks whose slots begin at `first` [R + 1]."""
    ranks, total = len(first) - 1, first[-1]
    rank_of = np.empty(total, np.int32)
    for rank in range(ranks):
        rank_of[first[rank] : first[rank + 1]] = rank
    return State(
        np.zeros(experts), np.full(total, -1, np.int32), first, rank_of, np.zeros(experts, np.int64), np.zeros(ranks),
        np.zeros((experts, ranks), np.int16), np.empty(experts), np.empty(experts), np.empty(experts),
        np.full(experts, -1, np.int32), np.full(total, -1, np.int32),
    )  # fmt: skip


@compiled
def _shares(state, expert):
    """What a replica of an expert carries, and what it would with one replica fewer and one more."""
    load, count = state.load[expert], max(state.counts[expert], 1)
    state.share[expert] = load / count
    state.up[expert] = load / (count - 1) if count > 1 else np.inf
    state.down[expert] = load / (count + 1)


@compiled
def set_layer(state, load, slots):
    """Begin with a layer's load [E] and slots [P]; the largest rank load."""
    for slot in range(len(slots)):
        if state.slots[slot] >= 0:
            state.lies[state.slots[slot], state.rank_of[slot]] = 0
    state.load[:], state.slots[:] = load, slots
    state.counts[:], state.head[:] = 0, -1
    for slot in range(len(slots) - 1, -1, -1):
        expert = slots[slot]
        if expert >= 0:
            state.counts[expert] += 1
            state.lies[expert, state.rank_of[slot]] += 1
            state.follow[slot] = state.head[expert]
            state.head[expert] = slot
    for expert in range(len(load)):
        _shares(state, expert)
    return weigh(state)


@compiled
def weigh(state):
    """The load of each rank anew, without what many steps' rounding left; the largest."""
    top = 0.0
    for rank in range(len(state.held)):
        whole = 0.0
        for slot in range(state.first[rank], state.first[rank + 1]):
            if state.slots[slot] >= 0:
                whole += state.share[state.slots[slot]]
        state.held[rank] = whole
        top = max(top, whole)
    return top


@compiled
def _leave(state, slot):
    """Take a slot from its expert."""
    expert = state.slots[slot]
    state.lies[expert, state.rank_of[slot]] -= 1
    if state.head[expert] == slot:
        state.head[expert] = state.follow[slot]
        return
    before = state.head[expert]
    while state.follow[before] != slot:
        before = state.follow[before]
    state.follow[before] = state.follow[slot]


@compiled
def _join(state, slot, expert):
    """Give a slot that nobody has to an expert."""
    state.slots[slot] = expert
    state.lies[expert, state.rank_of[slot]] += 1
    state.follow[slot] = state.head[expert]
    state.head[expert] = slot


@compiled
def _add_to_holders(state, expert, more):
    """So much more on the rank of each of an expert's replicas."""
    slot = state.head[expert]
    while slot >= 0:
        state.held[state.rank_of[slot]] += more
        slot = state.follow[slot]


@compiled
def exchange(state, one, two):
    """Two slots change their experts."""
    x, y, a, b = state.slots[one], state.slots[two], state.rank_of[one], state.rank_of[two]
    state.held[a] += state.share[y] - state.share[x]
    state.held[b] += state.share[x] - state.share[y]
    _leave(state, one)
    _leave(state, two)
    _join(state, one, y)
    _join(state, two, x)


@compiled
def replace(state, slot, new):
    """A slot's replica becomes one of another expert; the other replicas of both change what they carry."""
    old, rank = state.slots[slot], state.rank_of[slot]
    _leave(state, slot)
    state.held[rank] += state.down[new] - state.share[old]
    _add_to_holders(state, old, state.up[old] - state.share[old])
    _add_to_holders(state, new, state.down[new] - state.share[new])
    _join(state, slot, new)
    state.counts[old] -= 1
    state.counts[new] += 1
    _shares(state, old)
    _shares(state, new)

"""Rounds of exchanges: several ranks each pass one expert on, and none of them is above a target afterwards.

A rank that is too heavy has to change one slot at least, and one that makes room for it too. A round changes one slot
of each of its ranks, so the fewest slots move where few ranks with room serve many that are too heavy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_eplb.planning.kernels.compiled import compiled, inlined
from moe_eplb.planning.kernels.steps import cost

__all__ = ["LONGEST", "Ways", "find_round", "new_ways", "set_ways"]

LONGEST = 6
"""Ranks of a round at most."""
_WIDTH = 16
"""Beginnings of a round that are followed."""
_ENDS = 12
"""Ranks where a round may end: so many of the heaviest, and so many of those with the most room."""
_LIGHT = 4
"""Ranks with the most room that a round may pass before its end: with less room they save no move."""


class Ways(NamedTuple):
    """Beginnings of rounds, two sets in turn.

    Attributes:
        slots: The slots so far [2, W, LONGEST]; the last one's expert looks for a place.
        waste: By how much ranks got lighter than they had to [2, W].
        excess: By how much the round's ranks were too heavy [2, W].
        price, heavy: Slots that differ from what was there more than before, and ranks that were too heavy [2, W].
        order: All slots by `bears` [P], as it was the last time.
        bears: The largest replica that each slot's rank may take in its place and not be above the target [P], minus
            infinity where a round is not to pass.
    """

    slots: NDArray[np.int64]
    waste: NDArray[np.float64]
    excess: NDArray[np.float64]
    price: NDArray[np.int64]
    heavy: NDArray[np.int64]
    order: NDArray[np.int64]
    bears: NDArray[np.float64]


@compiled
def new_ways(total):
    """Buffers for layers of so many slots."""
    return Ways(
        np.empty((2, _WIDTH, LONGEST), np.int64), np.empty((2, _WIDTH)), np.empty((2, _WIDTH)),
        np.empty((2, _WIDTH), np.int64), np.empty((2, _WIDTH), np.int64), np.arange(total), np.empty(total),
    )  # fmt: skip


@compiled
def _weigh_slots(state, target, ranks, bears):
    slots, share, held, first = state.slots, state.share, state.held, state.first
    light = held[ranks[min(_LIGHT, len(ranks)) - 1]]
    for rank in range(len(ranks)):
        tried, room = held[rank] > target or held[rank] <= light, target - held[rank]
        for slot in range(first[rank], first[rank + 1]):
            bears[slot] = share[slots[slot]] + room if tried and slots[slot] >= 0 else -np.inf


@compiled
def set_ways(state, target, ways):
    """Begin with a layer, whose `state` is set."""
    _weigh_slots(state, target, np.argsort(state.held), ways.bears)
    ways.order[:] = np.argsort(ways.bears)


@compiled
def _sort(order, bears):
    """Slots by what they bear, which few of them have changed."""
    for index in range(1, len(order)):
        slot, at = order[index], index
        weight = bears[slot]
        while at > 0 and bears[order[at - 1]] > weight:
            order[at] = order[at - 1]
            at -= 1
        order[at] = slot


@inlined
def _first_that_bears(order, bears, weight):
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if bears[order[middle]] < weight:
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _on_the_way(rank_of, way, length, rank):
    found = False
    for index in range(length):
        found |= rank_of[way[index]] == rank
    return found


@inlined
def _most_wasteful(waste):
    worst = 0
    for index in range(1, _WIDTH):
        if waste[index] > waste[worst]:
            worst = index
    return worst


@compiled
def _follow(state, target, side, kept, length, duplicates, home, budget, ways):
    """What can come after each beginning, the least wasteful into the other set; how many."""
    slots, share, held, lies, rank_of = state.slots, state.share, state.held, state.lies, state.rank_of
    ways_of, waste_of, excess_of, price_of, heavy_of = ways.slots, ways.waste, ways.excess, ways.price, ways.heavy
    order, bears, other, more, worst = ways.order, ways.bears, 1 - side, 0, -1
    for at in range(kept):
        way = ways_of[side, at]
        hand, spent, paid = slots[way[length - 1]], waste_of[side, at], price_of[side, at]
        weight = share[hand]
        for index in range(_first_that_bears(order, bears, weight), len(order)):
            slot = order[index]
            rank, y, waste = rank_of[slot], slots[slot], spent + bears[slot] - weight
            if worst >= 0 and waste >= waste_of[other, worst]:
                break
            if not duplicates and lies[hand, rank] > 0:
                continue
            price = paid + cost(slot, y, hand, home)
            if price >= budget or _on_the_way(rank_of, way, length, rank):
                continue
            to, over = worst if worst >= 0 else more, held[rank] - target
            for step in range(length):
                ways_of[other, to, step] = way[step]
            ways_of[other, to, length], waste_of[other, to] = slot, waste
            excess_of[other, to] = excess_of[side, at] + max(over, 0.0)
            price_of[other, to], heavy_of[other, to] = price, heavy_of[side, at] + int(over > 0.0)
            more += int(worst < 0)
            if more == _WIDTH:
                worst = _most_wasteful(waste_of[other])
    return more


@compiled
def _close(state, target, side, kept, length, ranks, duplicates, home, budget, ways, best, chosen):
    """End a round if that is worth more than `best`; what it is worth."""
    slots, share, held, lies, rank_of, first = (
        state.slots,
        state.share,
        state.held,
        state.lies,
        state.rank_of,
        state.first,
    )
    ways_of, excess_of, price_of, heavy_of = ways.slots, ways.excess, ways.price, ways.heavy
    count = len(ranks)
    for at in range(kept):
        way = ways_of[side, at]
        begun, hand = way[0], slots[way[length - 1]]
        x, a = slots[begun], rank_of[begun]
        most, carried = share[x] - held[a] + target, share[hand]
        for index in range(min(2 * _ENDS, count)):
            rank = ranks[index // 2] if index % 2 == 0 else ranks[count - 1 - index // 2]
            over = held[rank] - target
            least = carried + over
            if least > most:
                continue
            excess, heavy = excess_of[side, at] + max(over, 0.0), heavy_of[side, at] + int(over > 0.0)
            if excess <= best * max(length - heavy, 0.5) or (not duplicates and lies[hand, rank] > 0):
                continue
            if _on_the_way(rank_of, way, length, rank):
                continue
            for slot in range(first[rank], first[rank + 1]):
                y = slots[slot]
                if y < 0 or share[y] < least or share[y] > most or (not duplicates and lies[y, a] > 0):
                    continue
                price = price_of[side, at] + cost(slot, y, hand, home) + cost(begun, x, y, home)
                worth = excess / max(price - heavy, 0.5)
                if worth > best and price <= budget:
                    best = worth
                    for step in range(length):
                        chosen[step] = way[step]
                    chosen[length] = slot
    return best


@compiled
def find_round(state, a, target, order, duplicates, home, budget, ways, chosen):
    """Slots into `chosen` [LONGEST], each of which takes the expert of the one before it; how many, 0 for none.

    Of the rounds that a beam search finds, the one that takes away the most of what is too much for each slot that it
    moves beyond one of each rank that is too heavy. Rank `a` is the heaviest; `order` is that of `order_ranks`.
    """
    _weigh_slots(state, target, order, ways.bears)
    _sort(ways.order, ways.bears)
    kept, side, best, found = 0, 0, 0.0, 0
    for slot in range(state.first[a], state.first[a + 1]):
        if state.slots[slot] >= 0 and kept < _WIDTH:
            ways.slots[0, kept, 0], ways.waste[0, kept], ways.excess[0, kept] = slot, 0.0, state.held[a] - target
            ways.price[0, kept], ways.heavy[0, kept] = 0, 1
            kept += 1
    for length in range(1, LONGEST):
        worth = _close(state, target, side, kept, length, order, duplicates, home, budget, ways, best, chosen)
        if worth > best:
            best, found = worth, length + 1
        if length + 1 < LONGEST:
            kept, side = _follow(state, target, side, kept, length, duplicates, home, budget, ways), 1 - side
    return found

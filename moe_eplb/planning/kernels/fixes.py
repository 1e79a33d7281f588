"""Exchanges that bring the heaviest rank below a target at once, of two ranks or round three; the first one found.

Two ranks cost two moved slots for one rank that was too heavy. Round three, two ranks that are too heavy give to one
that has room for both, three moves for two; or one gives to two, where no rank has room enough.
"""

from __future__ import annotations

from moe_eplb.planning.kernels.compiled import compiled
from moe_eplb.planning.kernels.steps import cost

__all__ = ["find_fix"]

_TRIES = 30
"""Sets of three ranks that are tried at most."""
_SLACK = 0.001
"""Share of the target that three ranks must have room beyond what they need: with less, slots that fit are rare."""


@compiled
def find_fix(state, a, target, order, duplicates, home, budget, chosen):
    """Slots into `chosen` [3], each of which takes the expert of the one before it; how many, 0 for none.

    No rank of them is above `target` afterwards, and `a` was the heaviest. `order` is that of `order_ranks`.
    """
    if budget >= 3 and _share_room(state, a, target, order, duplicates, home, chosen):
        return 3
    if budget >= 2 and _of_two(state, a, target, order, duplicates, home, chosen):
        return 2
    if budget >= 3 and _split(state, a, target, order, duplicates, home, chosen):
        return 3
    return 0


@compiled
def _of_two(state, a, target, order, duplicates, home, chosen):
    """With the fullest rank that has room for what `a` has too much."""
    slots, first, held, share, lies = state.slots, state.first, state.held, state.share, state.lies
    need, wide = held[a] - target, 0
    while wide < len(order) and target - held[order[wide]] >= need:
        wide += 1
    for index in range(wide - 1, -1, -1):
        b = order[index]
        room = target - held[b]
        for one in range(first[a], first[a + 1]):
            x = slots[one]
            if x < 0 or (not duplicates and lies[x, b] > 0):
                continue
            for two in range(first[b], first[b + 1]):
                y = slots[two]
                if y < 0 or not need <= share[x] - share[y] <= room or (not duplicates and lies[y, a] > 0):
                    continue
                if cost(one, x, y, home) + cost(two, y, x, home) <= 2:
                    chosen[0], chosen[1] = one, two
                    return True
    return False


@compiled
def _share_room(state, a, target, order, duplicates, home, chosen):
    """Rank `a` and another heavy one, the heaviest that it can be, with the fullest rank that has room for both."""
    held, ranks, tries = state.held, len(order), 0
    for back in range(2, ranks + 1):
        c = order[ranks - back]
        if held[c] <= target:
            return False
        wide = 0
        while wide < ranks and 3.0 * target - held[order[wide]] - held[a] - held[c] >= _SLACK * target:
            wide += 1
        for index in range(wide - 1, -1, -1):
            if _round(state, a, order[index], c, target, duplicates, home, chosen):
                return True
            if _round(state, a, c, order[index], target, duplicates, home, chosen):
                return True
            tries += 1
            if tries == _TRIES:
                return False
    return False


@compiled
def _split(state, a, target, order, duplicates, home, chosen):
    """Rank `a` with two that have room, one as much as possible and the other no more than it takes."""
    held, ranks, tries = state.held, len(order), 0
    for lightest in range(ranks):
        c = order[lightest]
        wide = lightest + 1
        while (
            wide < ranks
            and held[order[wide]] < target
            and 3.0 * target - held[order[wide]] - held[a] - held[c] >= _SLACK * target
        ):
            wide += 1
        if wide == lightest + 1:
            return False
        for index in range(wide - 1, lightest, -1):
            if _round(state, a, order[index], c, target, duplicates, home, chosen):
                return True
            if _round(state, a, c, order[index], target, duplicates, home, chosen):
                return True
            tries += 1
            if tries == _TRIES:
                return False
    return False


@compiled
def _round(state, p, q, r, target, duplicates, home, chosen):
    """A slot of each rank, so that p's expert goes to q, q's to r and r's to p, and none is above the target."""
    slots, first, held, share, lies = state.slots, state.first, state.held, state.share, state.lies
    room_p, room_q, room_r = target - held[p], target - held[q], target - held[r]
    for one in range(first[p], first[p + 1]):
        x = slots[one]
        if x < 0 or (not duplicates and lies[x, q] > 0):
            continue
        for two in range(first[q], first[q + 1]):
            y = slots[two]
            if y < 0 or not share[x] - room_q <= share[y] <= share[x] + room_p + room_r:
                continue
            if not duplicates and lies[y, r] > 0:
                continue
            for three in range(first[r], first[r + 1]):
                z = slots[three]
                if z < 0 or not share[y] - room_r <= share[z] <= share[x] + room_p:
                    continue
                if not duplicates and lies[z, p] > 0:
                    continue
                if cost(one, x, z, home) + cost(two, y, x, home) + cost(three, z, y, home) <= 3:
                    chosen[0], chosen[1], chosen[2] = one, two, three
                    return True
    return False

"""Single steps of the local search: the exchange or the change of a replica that lowers a rank most for each move.

Moves are counted against `home`, the slots [P] that were there; with an empty `home` they are free.
"""

from __future__ import annotations

from moe_eplb.planning.kernels.compiled import compiled, inlined

__all__ = ["best_free_swap", "best_replace", "best_swap", "cost", "order_ranks"]

_MANY = 64
"""Slots that are looked at at once."""


@compiled
def order_ranks(held, order):
    """Ranks by their load, lightest first, into `order` [R], which already is nearly so."""
    for index in range(1, len(order)):
        rank, at = order[index], index
        while at > 0 and held[order[at - 1]] > held[rank]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = rank


@inlined
def cost(slot, old, new, home):
    """How many more slots than before differ from `home` when a slot's expert changes."""
    if len(home) == 0:
        return 1
    return int(home[slot] != new) - int(home[slot] != old)


@inlined
def worth(gain, need):
    """What lowers a rank further than it has to be is worth little more than what lowers it that far."""
    return gain if gain <= need else need + (gain - need) * 0.01


@inlined
def wanted(value, need):
    """What must be gained for so much worth, the inverse of `worth`."""
    return value if value <= need else need + (value - need) * 100.0


@compiled
def best_swap(state, a, order, duplicates, home, budget, need):
    """The exchange of a slot of rank `a` that lowers the larger of both ranks most for each moved slot.

    `order` is that of `order_ranks`: no exchange with a rank brings more than half its distance to `a`, and those after
    it are nearer.

    Returns:
        Its worth, and both slots; -1 for none.
    """
    slots, first, held, share, free = state.slots, state.first, state.held, state.share, len(home) == 0
    best, best_one, best_two = 0.0, -1, -1
    for b in order:
        gap = held[a] - held[b]
        if gap <= 0.0 or worth(gap * 0.5, need) * (1.0 if free else 2.0) <= best:
            break
        for one in range(first[a], first[a + 1]):
            x = slots[one]
            if x < 0 or (not duplicates and state.lies[x, b] > 0):
                continue
            for two in range(first[b], first[b + 1]):
                y = slots[two]
                if y < 0:
                    continue
                difference = share[x] - share[y]
                gain = min(difference, gap - difference)
                if free:
                    if gain <= best:
                        continue
                else:
                    value = worth(gain, need)
                    if value * 2.0 <= best:
                        continue
                    price = cost(one, x, y, home) + cost(two, y, x, home)
                    gain = value / price if price > 0 else value * 2.0
                    if price > budget or gain <= best:
                        continue
                if not duplicates and state.lies[y, a] > 0:
                    continue
                best, best_one, best_two = gain, one, two
    return best, best_one, best_two


@inlined
def _better(carried, beside, mine, top, best):
    """How many of some slots would gain more than `best` in an exchange with what carries `mine` on a rank of `top`."""
    count = 0
    for two in range(len(carried)):
        less = mine - carried[two]
        count += (less > best) & (top - beside[two] - less > best)
    return count


@compiled
def best_free_swap(state, a, duplicates, carried, beside):
    """The exchange of a slot of rank `a` that lowers the larger of both ranks most, where moves cost nothing.

    That of `best_swap` without `home`, but for equals. It looks at many slots at once, without a branch that could not
    be foreseen, and at single ones only where some would do; faster where ranks have few slots each. `carried` and
    `beside` [P] are what each slot carries, infinite where it is empty, and what its rank does.

    Returns:
        Its worth, and both slots; -1 for none.
    """
    slots, rank_of, lies, first, total = state.slots, state.rank_of, state.lies, state.first, len(carried)
    best, best_one, best_two, top = 0.0, -1, -1, state.held[a]
    for one in range(first[a], first[a + 1]):
        mine = carried[one]
        for begin in range(0, total, _MANY):
            end = min(begin + _MANY, total)
            if _better(carried[begin:end], beside[begin:end], mine, top, best) == 0:
                continue
            for two in range(begin, end):
                less = mine - carried[two]
                rest = top - beside[two] - less
                gain = less if less < rest else rest
                if gain > best and (
                    duplicates or (lies[slots[one], rank_of[two]] == 0 and lies[slots[two], rank_of[one]] == 0)
                ):
                    best, best_one, best_two = gain, one, two
    return best, best_one, best_two


@inlined
def _heavier(old, new, here, most, held, lies, share, up, down, head, follow, rank_of):
    """The largest load of an expert's other ranks than `here` when a replica of it there becomes one of another."""
    more, less, largest = up[old] - share[old], down[new] - share[new], 0.0
    other = head[old]
    while other >= 0 and largest < most:
        there = rank_of[other]
        if there != here:
            largest = max(largest, held[there] + lies[old, there] * more + lies[new, there] * less)
        other = follow[other]
    return largest


@inlined
def _worst_of(old, here, a, held, lies, share, up, head, follow, rank_of):
    """The heaviest of an expert's other ranks, but for `a`, when its replica `here` has gone, and its load."""
    more, worst, where = up[old] - share[old], -1.0, -1
    other = head[old]
    while other >= 0:
        there = rank_of[other]
        if there != here and there != a and held[there] + lies[old, there] * more > worst:
            worst, where = held[there] + lies[old, there] * more, there
        other = follow[other]
    return worst, where


@compiled
def best_replace(state, a, duplicates, home, budget, need, least):
    """The change of one slot's expert that lowers rank `a` most for each moved slot, and is worth more than `least`.

    Either a slot of `a` takes a lighter replica, or a slot elsewhere takes a replica of an expert that lies on `a`.
    Other replicas of the expert that goes get heavier; where one of them would be too heavy, only experts that lie
    there too, and get lighter there, can make up for it.

    Returns:
        Its worth, the slot and its new expert; -1 for none.
    """
    best, best_slot, best_new = _lighter_here(state, a, duplicates, home, budget, need, least)
    more, slot, new = _more_elsewhere(state, a, duplicates, home, budget, need, best)
    return (more, slot, new) if slot >= 0 else (best, best_slot, best_new)


@compiled
def _lighter_here(state, a, duplicates, home, budget, need, least):
    slots, first, counts, held, lies = state.slots, state.first, state.counts, state.held, state.lies
    share, up, down, head, follow, rank_of = state.share, state.up, state.down, state.head, state.follow, state.rank_of
    best, best_slot, best_new, top = least, -1, -1, held[a]
    for slot in range(first[a], first[a + 1]):
        old = slots[slot]
        if old < 0 or counts[old] < 2:
            continue
        worst, where = _worst_of(old, a, a, held, lies, share, up, head, follow, rank_of)
        crowded = worst >= top - wanted(best * 0.5, need)
        begin, end = (first[where], first[where + 1]) if crowded else (0, len(share))
        again = top - share[old] + (lies[old, a] - 1) * (up[old] - share[old])
        for index in range(begin, end):
            new = slots[index] if crowded else index
            if new < 0 or new == old or share[old] - down[new] <= best * 0.5 or (not duplicates and lies[new, a] > 0):
                continue
            price = cost(slot, old, new, home)
            gain = wanted(best * max(price, 0.5), need)
            after = again + down[new] + lies[new, a] * (down[new] - share[new])
            if price > budget or after >= top - gain:
                continue
            if worst > after:
                after = max(
                    after, _heavier(old, new, a, top - gain, held, lies, share, up, down, head, follow, rank_of)
                )
            if after < top - gain:
                best, best_slot, best_new = worth(top - after, need) / max(price, 0.5), slot, new
    return best, best_slot, best_new


@compiled
def _more_elsewhere(state, a, duplicates, home, budget, need, least):
    slots, first, counts, held, lies = state.slots, state.first, state.counts, state.held, state.lies
    share, up, down, head, follow, rank_of = state.share, state.up, state.down, state.head, state.follow, state.rank_of
    best, best_slot, best_new, top = least, -1, -1, held[a]
    most = 0.0
    for source in range(first[a], first[a + 1]):
        new = slots[source]
        if new >= 0:
            most = max(most, (share[new] - down[new]) * lies[new, a])
    for slot in range(len(slots)):
        old, b = slots[slot], rank_of[slot]
        if old < 0 or counts[old] < 2 or b == a or held[b] >= top or most <= wanted(best * 0.5, need):
            continue
        worst, where = _worst_of(old, b, a, held, lies, share, up, head, follow, rank_of)
        crowded = worst >= top - wanted(best * 0.5, need)
        again = held[b] - share[old] + (lies[old, b] - 1) * (up[old] - share[old])
        for source in range(first[a], first[a + 1]):
            new = slots[source]
            if new < 0 or old == new or (crowded and lies[new, where] == 0) or (not duplicates and lies[new, b] > 0):
                continue
            price = cost(slot, old, new, home)
            gain = wanted(best * max(price, 0.5), need)
            # Rank `a` gets lighter by its share of the new replica, and heavier if it holds what was replaced.
            here = top - (share[new] - down[new]) * lies[new, a] + lies[old, a] * (up[old] - share[old])
            after = max(here, again + down[new] + lies[new, b] * (down[new] - share[new]))
            if price > budget or after >= top - gain:
                continue
            if worst > after:
                after = max(
                    after, _heavier(old, new, b, top - gain, held, lies, share, up, down, head, follow, rank_of)
                )
            if after < top - gain:
                best, best_slot, best_new = worth(top - after, need) / max(price, 0.5), slot, new
    return best, best_slot, best_new

"""Exchanges that bring the heaviest rank below a target at once, of two ranks or round several."""

from __future__ import annotations

from moe_eplb.planning.kernels.compiled import compiled
from moe_eplb.planning.kernels.rounds import find_round
from moe_eplb.planning.kernels.steps import cost

__all__ = ["find_fix"]


@compiled
def find_fix(state, a, target, order, duplicates, home, budget, ways, chosen):
    """Slots into `chosen` [LONGEST], each of which takes the expert of the one before it; how many, 0 for none.

    No rank of them is above `target` afterwards, and `a` was the heaviest. `order` is that of `order_ranks`. Rounds are
    looked for first, among some ranks, then two slots among all.
    """
    count = find_round(state, a, target, order, duplicates, home, budget, ways, chosen)
    if count == 0 and budget >= 2 and _of_two(state, a, target, order, duplicates, home, chosen):
        return 2
    return count


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

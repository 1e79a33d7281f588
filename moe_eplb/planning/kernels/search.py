"""Local search on one layer: exchanges of slots and changes of replicas that lower the largest rank load.

A layer's state is its slots [P], the replicas of each expert [E], the load of each rank [R], how many replicas of each
expert lie on each rank [E, R], and what a replica of each expert carries [E].
"""

from __future__ import annotations

import numpy as np

from moe_eplb.planning.kernels.compiled import compiled

__all__ = ["improve", "measure", "replay_steps", "step_layers"]


@compiled
def measure(load, slots, first, counts, held, lies):
    """The state of a placement: replicas [E], rank loads [R], replicas on each rank [E, R]; the largest rank load."""
    counts[:] = 0
    lies[:] = 0
    for rank in range(len(held)):
        for slot in range(first[rank], first[rank + 1]):
            if slots[slot] >= 0:
                counts[slots[slot]] += 1
                lies[slots[slot], rank] += 1
    top = 0.0
    for rank in range(len(held)):
        held[rank] = 0.0
        for slot in range(first[rank], first[rank + 1]):
            if slots[slot] >= 0:
                held[rank] += load[slots[slot]] / counts[slots[slot]]
        top = max(top, held[rank])
    return top


@compiled
def _cost(slot, old, new, home):
    """How many more slots than before differ from `home` when a slot's expert changes."""
    if len(home) == 0:
        return 1
    return int(home[slot] != new) - int(home[slot] != old)


@compiled
def _worth(gain, need):
    """What lowers a rank further than it has to be is worth little more than what lowers it that far."""
    return gain if gain <= need else need + (gain - need) * 0.01


@compiled
def _wanted(worth, need):
    """What must be gained for so much worth, the inverse of `_worth`."""
    return worth if worth <= need else need + (worth - need) * 100.0


@compiled
def _best_swap(a, share, slots, first, held, lies, duplicates, home, budget, need):
    """The exchange of a slot of rank `a` that lowers the larger of both ranks most for each moved slot."""
    ranks = len(held)
    top = held[a]
    best_gain, best_one, best_two, best_rank = 0.0, -1, -1, -1
    for b in range(ranks):
        gap = top - held[b]
        if b == a or gap <= 0.0:
            continue
        # No exchange with `b` brings more than half the gap.
        if len(home) == 0 and gap * 0.5 <= best_gain:
            continue
        for one in range(first[a], first[a + 1]):
            x = slots[one]
            if x < 0 or (not duplicates and lies[x, b] > 0):
                continue
            for two in range(first[b], first[b + 1]):
                y = slots[two]
                if y < 0:
                    continue
                difference = share[x] - share[y]
                if difference <= 0.0 or difference >= gap:
                    continue
                gain = min(difference, gap - difference)
                if len(home) == 0:
                    if gain <= best_gain:
                        continue
                    price = 1
                else:
                    price = _cost(one, x, y, home) + _cost(two, y, x, home)
                    if price > budget:
                        continue
                    gain = _worth(gain, need) / price if price > 0 else gain * 2.0
                    if gain <= best_gain:
                        continue
                if not duplicates and lies[y, a] > 0:
                    continue
                best_gain, best_one, best_two, best_rank = gain, one, two, b
    return best_gain, best_one, best_two, best_rank


@compiled
def _after_replace(rank, old, new, share, up, down, held, lies, most):
    """The largest load of the ranks that an expert's replacement touches, or `most` as soon as one reaches it."""
    more, less = up[old] - share[old], down[new] - share[new]
    largest = held[rank] + lies[old, rank] * more + lies[new, rank] * less - up[old] + down[new]
    if largest >= most:
        return most
    for other in range(len(held)):
        if other != rank and lies[old, other] > 0:
            largest = max(largest, held[other] + lies[old, other] * more + lies[new, other] * less)
            if largest >= most:
                return most
    return largest


@compiled
def _best_replace(a, slots, first, counts, share, up, down, held, lies, duplicates, home, budget, from_gain, need):
    """The change of one slot's expert that lowers rank `a` most for each moved slot.

    Either a slot of `a` takes a lighter replica, or a slot elsewhere takes a replica of an expert that lies on `a`.
    """
    ranks, top = len(held), held[a]
    best_gain, best_slot, best_new = from_gain, -1, -1
    for slot in range(first[a], first[a + 1]):
        old = slots[slot]
        if old < 0 or counts[old] < 2:
            continue
        for new in range(len(share)):
            if share[old] - down[new] <= best_gain * 0.5 or new == old or (not duplicates and lies[new, a] > 0):
                continue
            price = _cost(slot, old, new, home)
            wanted = _wanted(best_gain * max(price, 0.5), need)
            if price > budget or share[old] - down[new] <= wanted:
                continue
            after = _after_replace(a, old, new, share, up, down, held, lies, top - wanted)
            if after >= top - wanted:
                continue
            gain = _worth(top - after, need) / max(price, 0.5)
            if gain > best_gain:
                best_gain, best_slot, best_new = gain, slot, new
    for source in range(first[a], first[a + 1]):
        new = slots[source]
        if new < 0 or (share[new] - down[new]) * lies[new, a] <= best_gain * 0.5:
            continue
        less = (share[new] - down[new]) * lies[new, a]
        for b in range(ranks):
            if b == a or held[b] >= top or (not duplicates and lies[new, b] > 0):
                continue
            for slot in range(first[b], first[b + 1]):
                old = slots[slot]
                if old < 0 or old == new or counts[old] < 2:
                    continue
                price = _cost(slot, old, new, home)
                wanted = _wanted(best_gain * max(price, 0.5), need)
                # Rank `a` gets lighter by its share of the new replica, and heavier if it holds what was replaced.
                after = held[a] - less + lies[old, a] * (up[old] - share[old])
                if price > budget or top - after <= wanted:
                    continue
                largest = max(after, _after_replace(b, old, new, share, up, down, held, lies, top - wanted))
                if largest >= top - wanted:
                    continue
                gain = _worth(top - largest, need) / max(price, 0.5)
                if gain > best_gain:
                    best_gain, best_slot, best_new = gain, slot, new
    return best_gain, best_slot, best_new


@compiled
def _shares(expert, load, counts, share, up, down):
    """What a replica of an expert carries, and what it would with one replica fewer and one more."""
    count = max(counts[expert], 1)
    share[expert] = load[expert] / count
    up[expert] = load[expert] / (count - 1) if count > 1 else np.inf
    down[expert] = load[expert] / (count + 1)


@compiled
def _exchange(one, two, a, b, slots, share, held, lies):
    """Slot `one` of rank `a` and slot `two` of rank `b` change their experts."""
    x, y = slots[one], slots[two]
    slots[one], slots[two] = y, x
    held[a] += share[y] - share[x]
    held[b] += share[x] - share[y]
    lies[x, a] -= 1
    lies[x, b] += 1
    lies[y, a] += 1
    lies[y, b] -= 1


@compiled
def _do_replace(slot, rank, new, load, slots, counts, share, up, down, held, lies):
    old = slots[slot]
    more, less = up[old] - share[old], down[new] - share[new]
    lies[old, rank] -= 1
    held[rank] -= share[old]
    for other in range(len(held)):
        held[other] += lies[old, other] * more + lies[new, other] * less
    counts[old] -= 1
    counts[new] += 1
    _shares(old, load, counts, share, up, down)
    _shares(new, load, counts, share, up, down)
    lies[new, rank] += 1
    held[rank] += share[new]
    slots[slot] = new


@compiled
def improve(load, slots, first, duplicates, target, home, budget, most_steps, tops, moves, log):
    """Lower the largest rank load by exchanges and changes of replicas until `target`, a local optimum, or the budget.

    Args:
        load: [E]. slots: [P], changed in place. first: [R + 1].
        target: Largest rank load at which to stop.
        home: Slots [P] that moves are counted against, empty when they are free.
        budget: Slots that may differ from `home`.
        most_steps: N, after which to stop.
        tops, moves, log: The largest load [N + 1] and the slots that differ [N + 1] after each step, and for each step
            two slots with their new experts [N, 4], -1 for none; or empty.

    Returns:
        The largest rank load and the steps made.
    """
    ranks, experts = len(first) - 1, len(load)
    counts, held = np.empty(experts, np.int64), np.empty(ranks)
    lies = np.empty((experts, ranks), np.int16)
    measure(load, slots, first, counts, held, lies)
    share, up, down = np.empty(experts), np.empty(experts), np.empty(experts)
    for expert in range(experts):
        _shares(expert, load, counts, share, up, down)
    bound = len(home) > 0
    moved = 0
    if bound:
        for slot in range(len(slots)):
            moved += home[slot] != slots[slot]
    steps = 0
    while True:
        a = 0
        for rank in range(1, ranks):
            if held[rank] > held[a]:
                a = rank
        top = held[a]
        if len(tops) > 0:
            tops[steps], moves[steps] = top, moved
        if top <= target or steps == most_steps:
            break
        left, need = (budget - moved, top - target) if bound else (2, np.inf)
        enough = top * 1e-6
        gain, one, two, b = _best_swap(a, share, slots, first, held, lies, duplicates, home, left, need)
        slot, new = -1, -1
        if bound or gain <= top * 2e-4:
            _, slot, new = _best_replace(
                a, slots, first, counts, share, up, down, held, lies, duplicates, home, left, max(gain, enough), need
            )
        if slot >= 0:
            moved += _cost(slot, slots[slot], new, home)
            rank = np.searchsorted(first, slot, side="right") - 1
            _do_replace(slot, rank, new, load, slots, counts, share, up, down, held, lies)
            one, two = slot, -1
        elif gain > enough:
            moved += _cost(one, slots[one], slots[two], home) + _cost(two, slots[two], slots[one], home)
            _exchange(one, two, a, b, slots, share, held, lies)
        else:
            break
        if len(tops) > 0:
            log[steps, 0], log[steps, 1], log[steps, 2], log[steps, 3] = one, slots[one], two, -1
            if two >= 0:
                log[steps, 3] = slots[two]
        steps += 1
    return measure(load, slots, first, counts, held, lies), steps


@compiled
def step_layers(loads, homes, first, duplicates, targets, budgets, tops, moves, logs, steps):
    """`improve` from `homes` [L, P] for every layer, N steps at most, written down; how many into `steps`."""
    most = tops.shape[1] - 1
    for layer in range(len(loads)):
        slots = homes[layer].copy()
        _, steps[layer] = improve(
            loads[layer], slots, first, duplicates, targets[layer], homes[layer], budgets[layer], most, tops[layer],
            moves[layer], logs[layer],
        )  # fmt: skip


@compiled
def replay_steps(logs, steps, slots):
    """Make the first so many steps of each layer's log on its slots [L, P]."""
    for layer in range(len(slots)):
        for step in range(steps[layer]):
            slots[layer, logs[layer, step, 0]] = logs[layer, step, 1]
            if logs[layer, step, 2] >= 0:
                slots[layer, logs[layer, step, 2]] = logs[layer, step, 3]

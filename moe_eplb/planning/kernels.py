"""Planning kernels, compiled without the interpreter's lock so that the thread that serves is not slowed.

Every kernel is plain Python too (``kernel.py_func``). A layer's state is its slots [P], the replicas of each expert
[E], the load of each rank [R], and how many replicas of each expert lie on each rank [E, R].
"""

from __future__ import annotations

import numpy as np
from numba import njit

__all__ = [
    "floor_of", "greedy_layer", "greedy_layers", "improve", "kick", "measure", "refine_layers", "relabel",
    "relabel_layers", "replay_steps", "replicate", "step_layers",
]  # fmt: skip

_compiled = njit(cache=True, nogil=True)


@_compiled
def replicate(load, total, most, counts):
    """Replicas of each expert into `counts` [E]: one each, the next to the largest load per replica, lower ids first.

    No expert gets more than `most`. Optimal for the largest load per replica.
    """
    experts = len(load)
    share = np.empty(experts)
    for expert in range(experts):
        counts[expert] = 1
        share[expert] = load[expert] if most > 1 else -1.0
    for _ in range(total - experts):
        chosen = 0
        for expert in range(1, experts):
            if share[expert] > share[chosen]:
                chosen = expert
        counts[chosen] += 1
        share[chosen] = load[chosen] / counts[chosen] if counts[chosen] < most else -1.0


@_compiled
def greedy_layer(load, first, room, duplicates, slots):
    """Replicate, then the largest replica to the least loaded rank that has room, into `slots` [P].

    Without `duplicates` a rank that holds the expert is left out; where no other one has room, two experts change
    places.
    """
    experts, ranks = len(load), len(room)
    total, open_ranks = 0, 0
    for rank in range(ranks):
        total += room[rank]
        open_ranks += room[rank] > 0
    counts = np.empty(experts, np.int64)
    replicate(load, total, total if duplicates else open_ranks, counts)
    share = load / counts
    order = np.argsort(-share, kind="mergesort")
    used = np.zeros(ranks, np.int64)
    held = np.zeros(ranks)
    last = np.full(ranks, -1, np.int64)
    slots[:] = -1
    for expert in order:
        for _ in range(counts[expert]):
            best = -1
            for rank in range(ranks):
                open_to_it = used[rank] < room[rank] and (duplicates or last[rank] != expert)
                if open_to_it and (best < 0 or held[rank] < held[best]):
                    best = rank
            if best < 0:
                _make_room(expert, share, first, room, used, held, slots, last)
                continue
            slots[first[best] + used[best]] = expert
            used[best] += 1
            held[best] += share[expert]
            last[best] = expert


@_compiled
def _make_room(expert, share, first, room, used, held, slots, last):
    """Put a replica where another expert lay, and that one into a rank that has room but holds the replica's expert."""
    ranks = len(room)
    best_slot, best_rank, best_open, best_top = -1, -1, -1, np.inf
    for free in range(ranks):
        if used[free] >= room[free]:
            continue
        for rank in range(ranks):
            if rank == free or _holds(expert, first[rank], used[rank], slots):
                continue
            for slot in range(first[rank], first[rank] + used[rank]):
                other = slots[slot]
                if _holds(other, first[free], used[free], slots):
                    continue
                top = max(held[free] + share[other], held[rank] - share[other] + share[expert])
                if top < best_top:
                    best_slot, best_rank, best_open, best_top = slot, rank, free, top
    other = slots[best_slot]
    slots[first[best_open] + used[best_open]] = other
    used[best_open] += 1
    held[best_open] += share[other]
    slots[best_slot] = expert
    held[best_rank] += share[expert] - share[other]
    last[best_rank] = expert


@_compiled
def _holds(expert, begin, count, slots):
    found = False
    for slot in range(begin, begin + count):
        found |= slots[slot] == expert
    return found


@_compiled
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


@_compiled
def _cost(slot, old, new, home):
    """How many more slots than before differ from `home` when a slot's expert changes."""
    if len(home) == 0:
        return 1
    return int(home[slot] != new) - int(home[slot] != old)


@_compiled
def _worth(gain, need):
    """What lowers a rank further than it has to be is worth little more than what lowers it that far."""
    return gain if gain <= need else need + (gain - need) * 0.01


@_compiled
def _wanted(worth, need):
    """What must be gained for so much worth, the inverse of `_worth`."""
    return worth if worth <= need else need + (worth - need) * 100.0


@_compiled
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


@_compiled
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


@_compiled
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


@_compiled
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
            x, y = slots[one], slots[two]
            moved += _cost(one, x, y, home) + _cost(two, y, x, home)
            slots[one], slots[two] = y, x
            held[a] += share[y] - share[x]
            held[b] += share[x] - share[y]
            lies[x, a] -= 1
            lies[x, b] += 1
            lies[y, a] += 1
            lies[y, b] -= 1
        else:
            break
        if len(tops) > 0:
            log[steps, 0], log[steps, 1], log[steps, 2], log[steps, 3] = one, slots[one], two, -1
            if two >= 0:
                log[steps, 3] = slots[two]
        steps += 1
    return measure(load, slots, first, counts, held, lies), steps


@_compiled
def _shares(expert, load, counts, share, up, down):
    """What a replica of an expert carries, and what it would with one replica fewer and one more."""
    count = max(counts[expert], 1)
    share[expert] = load[expert] / count
    up[expert] = load[expert] / (count - 1) if count > 1 else np.inf
    down[expert] = load[expert] / (count + 1)


@_compiled
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


@_compiled
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


@_compiled
def _draw(state, below):
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.int64((x >> np.uint64(11)) % np.uint64(below))


@_compiled
def relabel(slots, home, first, experts, out):
    """The same sets of experts on other ranks and slots, so that as many as possible lie where they lay in `home`.

    Ranks are matched by the largest sum of common experts (Kuhn-Munkres, shortest augmenting paths); within a rank an
    expert that lay there keeps its slot. All ranks must have as many slots.
    """
    ranks = len(first) - 1
    size = first[1] - first[0]
    there = np.zeros((ranks, experts), np.int16)
    for rank in range(ranks):
        for slot in range(first[rank], first[rank + 1]):
            if home[slot] >= 0:
                there[rank, home[slot]] += 1
    cost = np.zeros((ranks, ranks))
    seen = np.zeros(experts, np.int16)
    for new in range(ranks):
        for rank in range(ranks):
            common = 0
            for slot in range(first[new], first[new + 1]):
                seen[slots[slot]] = 0
            for slot in range(first[new], first[new + 1]):
                expert = slots[slot]
                seen[expert] += 1
                common += seen[expert] <= there[rank, expert]
            cost[new, rank] = -common
    match = _assign(cost)
    for new in range(ranks):
        rank = match[new]
        taken = np.zeros(size, np.uint8)
        for slot in range(first[rank], first[rank + 1]):
            out[slot] = -1
            for index in range(size):
                if taken[index] == 0 and slots[first[new] + index] == home[slot]:
                    out[slot] = home[slot]
                    taken[index] = 1
                    break
        index = 0
        for slot in range(first[rank], first[rank + 1]):
            if out[slot] < 0:
                while taken[index] == 1:
                    index += 1
                out[slot] = slots[first[new] + index]
                taken[index] = 1


@_compiled
def _assign(cost):
    """The column of each row with the least sum of costs [N, N]."""
    count = len(cost)
    u, v = np.zeros(count + 1), np.zeros(count + 1)
    row_of, way = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    for row in range(1, count + 1):
        row_of[0] = row
        column = 0
        least = np.full(count + 1, np.inf)
        done = np.zeros(count + 1, np.uint8)
        while True:
            done[column] = 1
            current, delta, following = row_of[column], np.inf, 0
            for other in range(1, count + 1):
                if done[other] == 0:
                    reduced = cost[current - 1, other - 1] - u[current] - v[other]
                    if reduced < least[other]:
                        least[other] = reduced
                        way[other] = column
                    if least[other] < delta:
                        delta = least[other]
                        following = other
            for other in range(count + 1):
                if done[other] == 1:
                    u[row_of[other]] += delta
                    v[other] -= delta
                else:
                    least[other] -= delta
            column = following
            if row_of[column] == 0:
                break
        while column != 0:
            before = way[column]
            row_of[column] = row_of[before]
            column = before
    match = np.empty(count, np.int64)
    for column in range(1, count + 1):
        match[row_of[column] - 1] = column - 1
    return match


@_compiled
def floor_of(load, total, most):
    """A bound of the largest rank load that no placement beats: the largest share after the best replication."""
    counts = np.empty(len(load), np.int64)
    replicate(load, total, most, counts)
    largest = 0.0
    for expert in range(len(load)):
        largest = max(largest, load[expert] / counts[expert])
    return largest


@_compiled
def _hierarchical(load, first, room, nodes, groups, duplicates, slots):
    """DeepSeek's order: groups onto nodes, replicas within each node, replicas onto the node's ranks."""
    experts, ranks = len(load), len(room)
    size, per_node = experts // groups, ranks // nodes
    group_load = np.zeros(groups)
    for expert in range(experts):
        group_load[expert // size] += load[expert]
    node_first, node_room = np.arange(nodes + 1) * (groups // nodes), np.full(nodes, groups // nodes)
    where = np.empty(groups, np.int32)
    _pack(group_load, node_first, node_room, where)
    for node in range(nodes):
        members = np.empty(experts // nodes, np.int64)
        for index in range(groups // nodes):
            group = where[node_first[node] + index]
            for inner in range(size):
                members[index * size + inner] = group * size + inner
        begin = first[node * per_node]
        local = np.empty(first[(node + 1) * per_node] - begin, np.int32)
        local_first = first[node * per_node : (node + 1) * per_node + 1] - begin
        greedy_layer(load[members], local_first, room[node * per_node : (node + 1) * per_node], duplicates, local)
        for slot in range(len(local)):
            slots[begin + slot] = members[local[slot]] if local[slot] >= 0 else -1


@_compiled
def _pack(weight, first, room, where):
    """Items onto bins of equal room, heaviest first, each to the lightest that has room; in their order if it is 1."""
    bins = len(room)
    used, held = np.zeros(bins, np.int64), np.zeros(bins)
    if room[0] == 1:
        for item in range(len(weight)):
            where[item] = item
        return
    for item in np.argsort(-weight, kind="mergesort"):
        best = -1
        for one in range(bins):
            if used[one] < room[one] and (best < 0 or held[one] < held[best]):
                best = one
        where[first[best] + used[best]] = item
        used[best] += 1
        held[best] += weight[item]


@_compiled
def greedy_layers(loads, first, room, nodes, groups, duplicates, slots):
    """`greedy_layer`, or DeepSeek's hierarchical form for several nodes, for every layer [L, E] into slots [L, P]."""
    for layer in range(len(loads)):
        if nodes > 1:
            _hierarchical(loads[layer], first, room, nodes, groups, duplicates, slots[layer])
        else:
            greedy_layer(loads[layer], first, room, duplicates, slots[layer])


@_compiled
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


@_compiled
def _nothing():
    return np.empty(0, np.int32), np.empty(0), np.empty(0, np.int64), np.empty((0, 4), np.int32)


@_compiled
def step_layers(loads, homes, first, duplicates, targets, budgets, tops, moves, logs, steps):
    """`improve` from `homes` [L, P] for every layer, N steps at most, written down; how many into `steps`."""
    most = tops.shape[1] - 1
    for layer in range(len(loads)):
        slots = homes[layer].copy()
        _, steps[layer] = improve(
            loads[layer], slots, first, duplicates, targets[layer], homes[layer], budgets[layer], most, tops[layer],
            moves[layer], logs[layer],
        )  # fmt: skip


@_compiled
def replay_steps(logs, steps, slots):
    """Make the first so many steps of each layer's log on its slots [L, P]."""
    for layer in range(len(slots)):
        for step in range(steps[layer]):
            slots[layer, logs[layer, step, 0]] = logs[layer, step, 1]
            if logs[layer, step, 2] >= 0:
                slots[layer, logs[layer, step, 2]] = logs[layer, step, 3]


@_compiled
def relabel_layers(slots, homes, first, experts, out):
    """`relabel` for every layer."""
    for layer in range(len(slots)):
        relabel(slots[layer], homes[layer], first, experts, out[layer])

"""Replicas by load, and the largest to the lightest rank: DeepSeek's published algorithm, flat and hierarchical."""

from __future__ import annotations

import numpy as np

from moe_eplb.planning.kernels.compiled import compiled

__all__ = ["floor_of", "greedy_layer", "greedy_layers", "replicate"]


@compiled
def _sink(keys, ids, at, size):
    """Let an entry of a heap sink to where it belongs: the least key on top, of equals the least id."""
    key, one = keys[at], ids[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and (
            keys[child + 1] < keys[child] or (keys[child + 1] == keys[child] and ids[child + 1] < ids[child])
        ):
            child += 1
        if keys[child] > key or (keys[child] == key and ids[child] > one):
            break
        keys[at], ids[at] = keys[child], ids[child]
        at = child
    keys[at], ids[at] = key, one


@compiled
def _rise(keys, ids, key, one, size):
    """Add an entry to a heap of so many; how many there are then."""
    at = size
    while at > 0:
        parent = (at - 1) // 2
        if keys[parent] < key or (keys[parent] == key and ids[parent] < one):
            break
        keys[at], ids[at] = keys[parent], ids[parent]
        at = parent
    keys[at], ids[at] = key, one
    return size + 1


@compiled
def replicate(load, total, most, counts):
    """Replicas of each expert into `counts` [E]: one each, the next to the largest load per replica, lower ids first.

    No expert gets more than `most`. Optimal for the largest load per replica.
    """
    experts = len(load)
    keys, ids = np.empty(experts), np.arange(experts)
    counts[:] = 1
    for expert in range(experts):
        keys[expert] = -load[expert] if most > 1 else 1.0
    for at in range(experts // 2 - 1, -1, -1):
        _sink(keys, ids, at, experts)
    for _ in range(total - experts):
        chosen = ids[0]
        counts[chosen] += 1
        keys[0] = -load[chosen] / counts[chosen] if counts[chosen] < most else 1.0
        _sink(keys, ids, 0, experts)


@compiled
def floor_of(load, total, most):
    """A bound of the largest rank load that no placement beats: the largest share after the best replication."""
    counts = np.empty(len(load), np.int64)
    replicate(load, total, most, counts)
    largest = 0.0
    for expert in range(len(load)):
        largest = max(largest, load[expert] / counts[expert])
    return largest


@compiled
def _holds(expert, begin, count, slots):
    found = False
    for slot in range(begin, begin + count):
        found |= slots[slot] == expert
    return found


@compiled
def _make_room(expert, share, first, room, used, held, slots):
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


@compiled
def _open_ranks(room, used, held, keys, ids):
    """A heap of the ranks that have room, the least loaded on top; how many."""
    count = 0
    for rank in range(len(room)):
        if used[rank] < room[rank]:
            count = _rise(keys, ids, held[rank], rank, count)
    return count


@compiled
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
    used, held = np.zeros(ranks, np.int64), np.zeros(ranks)
    keys, ids, aside = np.empty(ranks), np.empty(ranks, np.int64), np.empty(ranks, np.int64)
    count = _open_ranks(room, used, held, keys, ids)
    slots[:] = -1
    for expert in np.argsort(-share, kind="mergesort"):
        left_out, crowded = 0, False
        for _ in range(counts[expert]):
            if count == 0:
                _make_room(expert, share, first, room, used, held, slots)
                crowded = True
                continue
            best = ids[0]
            slots[first[best] + used[best]] = expert
            used[best] += 1
            held[best] += share[expert]
            if duplicates and used[best] < room[best]:
                keys[0] = held[best]
            else:
                count -= 1
                keys[0], ids[0] = keys[count], ids[count]
                if used[best] < room[best]:
                    aside[left_out] = best
                    left_out += 1
            if count > 0:
                _sink(keys, ids, 0, count)
        if crowded:
            count = _open_ranks(room, used, held, keys, ids)
        else:
            for index in range(left_out):
                count = _rise(keys, ids, held[aside[index]], aside[index], count)


@compiled
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


@compiled
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


@compiled
def greedy_layers(loads, first, room, nodes, groups, duplicates, slots):
    """`greedy_layer`, or DeepSeek's hierarchical form for several nodes, for every layer [L, E] into slots [L, P]."""
    for layer in range(len(loads)):
        if nodes > 1:
            _hierarchical(loads[layer], first, room, nodes, groups, duplicates, slots[layer])
        else:
            greedy_layer(loads[layer], first, room, duplicates, slots[layer])

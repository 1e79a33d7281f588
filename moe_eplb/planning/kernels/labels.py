"""Which rank a set of experts lies on: as many as possible stay where they lay."""

from __future__ import annotations

import numpy as np

from moe_eplb.planning.kernels.compiled import compiled

__all__ = ["relabel", "relabel_layers", "settle_layers"]

_MOST_EXACT = 128
"""Ranks beyond which they are matched one after the other: the best matching's time grows with their third power."""


@compiled
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


@compiled
def _settle(held, home, begin, out):
    """Put a rank's experts into its slots from `begin` on; those that lie there in `home` keep their slot."""
    size = len(held)
    taken, filled = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    for place in range(size):
        for index in range(size):
            if taken[index] == 0 and held[index] == home[begin + place]:
                out[begin + place] = held[index]
                taken[index] = filled[place] = 1
                break
    index = 0
    for place in range(size):
        if filled[place] == 0:
            while taken[index] == 1:
                index += 1
            out[begin + place] = held[index]
            taken[index] = 1


@compiled
def _assign_in_turn(cost):
    """For each row, in their order, the column with the least cost that is still free [N, N]."""
    count = len(cost)
    match, taken = np.empty(count, np.int64), np.zeros(count, np.uint8)
    for row in range(count):
        best = -1
        for column in range(count):
            if taken[column] == 0 and (best < 0 or cost[row, column] < cost[row, best]):
                best = column
        match[row] = best
        taken[best] = 1
    return match


@compiled
def relabel(slots, home, first, experts, out):
    """The same sets of experts on other ranks and slots, so that as many as possible lie where they lay in `home`.

    Ranks are matched by the largest sum of common experts (Kuhn-Munkres, shortest augmenting paths; in turn where
    there are more than 128); within a rank an
    expert that lay there keeps its slot. All ranks must have as many slots.
    """
    ranks = len(first) - 1
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
    match = _assign(cost) if ranks <= _MOST_EXACT else _assign_in_turn(cost)
    for new in range(ranks):
        rank = match[new]
        _settle(slots[first[new] : first[new + 1]], home, first[rank], out)


@compiled
def settle_layers(slots, homes, first):
    """Reorder the slots of each rank [L, P] in place, so that experts which stay on a rank stay in their slot."""
    for layer in range(len(slots)):
        for rank in range(len(first) - 1):
            same = True
            for slot in range(first[rank], first[rank + 1]):
                same &= slots[layer, slot] == homes[layer, slot]
            if same:
                continue
            _settle(slots[layer, first[rank] : first[rank + 1]].copy(), homes[layer], first[rank], slots[layer])


@compiled
def relabel_layers(slots, homes, first, experts, out):
    """`relabel` for every layer."""
    for layer in range(len(slots)):
        relabel(slots[layer], homes[layer], first, experts, out[layer])

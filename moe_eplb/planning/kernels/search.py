"""Local search on one layer: steps that lower the largest rank load, until it is low enough or none does."""

from __future__ import annotations

import numpy as np

from moe_eplb.planning.kernels.compiled import compiled
from moe_eplb.planning.kernels.fixes import find_fix
from moe_eplb.planning.kernels.greedy import replicate
from moe_eplb.planning.kernels.rounds import LONGEST, new_ways, set_ways
from moe_eplb.planning.kernels.state import exchange, new_state, replace, set_layer, weigh
from moe_eplb.planning.kernels.steps import best_free_swap, best_replace, best_swap, order_ranks

__all__ = ["improve", "recount", "replay_steps", "step_layers", "stepwise"]

_LITTLE = 2e-4
"""Share of the largest load: exchanges that bring no more than this are weighed against changes of replicas."""
_ENOUGH = 1e-6
"""Share of the largest load that a step must bring."""
_FEW = 4
"""Slots of a rank up to which all slots are looked at in turn."""
_WHOLE = 1.0 - 1e-9
"""Share of what is needed that is all of it, but for rounding."""


@compiled
def _note_ranks(state, carried, beside, expert):
    """Note anew what the slots of all ranks that hold an expert carry, and their ranks."""
    slot = state.head[expert]
    while slot >= 0:
        _note_rank(state, carried, beside, state.rank_of[slot])
        slot = state.follow[slot]


@compiled
def _note_rank(state, carried, beside, rank):
    for slot in range(state.first[rank], state.first[rank + 1]):
        carried[slot] = state.share[state.slots[slot]] if state.slots[slot] >= 0 else np.inf
        beside[slot] = state.held[rank]


@compiled
def improve(state, duplicates, target, most_steps):
    """Lower the largest rank load by exchanges and changes of replicas until `target` or a local optimum.

    Args:
        state: Of the layer, changed in place.
        target: Largest rank load at which to stop.
        most_steps: After which to stop.

    Returns:
        The largest rank load.
    """
    free, total, order = np.empty(0, np.int32), len(state.slots), np.argsort(state.held)
    carried, beside, few = np.empty(total), np.empty(total), total <= _FEW * len(state.held)
    for rank in range(len(state.held)):
        _note_rank(state, carried, beside, rank)
    for _ in range(most_steps):
        if not few:
            order_ranks(state.held, order)
        a = np.argmax(state.held) if few else order[-1]
        top = state.held[a]
        if top <= target:
            break
        if few:
            gain, one, two = best_free_swap(state, a, duplicates, carried, beside)
        else:
            gain, one, two = best_swap(state, a, order, duplicates, free, 2, np.inf)
        slot, new = -1, -1
        if gain <= top * _LITTLE:
            _, slot, new = best_replace(state, a, duplicates, free, 2, np.inf, max(gain, top * _ENOUGH))
        if slot >= 0:
            old = state.slots[slot]
            replace(state, slot, new)
            _note_rank(state, carried, beside, state.rank_of[slot])
            _note_ranks(state, carried, beside, old)
            _note_ranks(state, carried, beside, new)
        elif gain > top * _ENOUGH:
            exchange(state, one, two)
            _note_rank(state, carried, beside, state.rank_of[one])
            _note_rank(state, carried, beside, state.rank_of[two])
        else:
            break
    return weigh(state)


@compiled
def _find_step(state, a, target, order, duplicates, home, budget, ways, chosen):
    """The next step for rank `a`: its kind (0 none, 1 a change of a replica, more a round of so many) and a new expert.

    One moved slot that does it, then a round that does, then whatever brings most for each moved slot.
    """
    top = state.held[a]
    need = top - target
    _, slot, new = best_replace(state, a, duplicates, home, budget, need, max(need * _WHOLE, top * _ENOUGH))
    if slot >= 0:
        chosen[0] = slot
        return 1, new
    kind = find_fix(state, a, target, order, duplicates, home, budget, ways, chosen)
    if kind > 0:
        return kind, -1
    value, slot, new = best_replace(state, a, duplicates, home, budget, need, top * _ENOUGH)
    gain, one, two = best_swap(state, a, order, duplicates, home, budget, need)
    if slot >= 0 and value >= gain:
        chosen[0] = slot
        return 1, new
    if gain > top * _ENOUGH:
        chosen[0], chosen[1] = one, two
        return 2, -1
    return 0, -1


@compiled
def _do_step(state, kind, new, chosen):
    """Make a step; in a round each slot takes the expert of the one before it."""
    if kind == 1:
        replace(state, chosen[0], new)
    for index in range(1, kind):
        exchange(state, chosen[0], chosen[index])


@compiled
def _note(state, home, chosen, kind, steps, moved, tops, moves, log):
    """Write down a step of so many slots that was made; the slots that differ from `home` after it."""
    log[steps] = -1
    for index in range(kind):
        slot = chosen[index]
        moved += home[slot] != state.slots[slot]
        log[steps, 2 * index], log[steps, 2 * index + 1] = slot, state.slots[slot]
    tops[steps + 1], moves[steps + 1] = state.held.max(), moved
    return moved


@compiled
def stepwise(state, duplicates, target, home, budget, ways, steps, tops, moves, log):
    """Lower the largest rank load with few moved slots until `target`, a local optimum, or the budget.

    Args:
        state: Of the layer, changed in place.
        target: Largest rank load at which to stop.
        home: Slots [P] that moves are counted against.
        budget: Slots that may differ from `home`.
        ways: Buffers of `find_round`, set to the layer.
        steps: Steps that were made before.
        tops, moves, log: The largest load [N + 1] and the slots that differ [N + 1] after each step, and for each step
            up to LONGEST slots with their new experts [N, 2 * LONGEST], -1 for none; N is the most steps.
            Those of the steps before are there.

    Returns:
        The steps made, with those before.
    """
    order, chosen = np.argsort(state.held), np.empty(LONGEST, np.int64)
    moved = moves[steps]
    while True:
        order_ranks(state.held, order)
        a = order[-1]
        if state.held[a] <= target or steps == len(log):
            return steps
        kind, new = _find_step(state, a, target, order, duplicates, home, budget - moved, ways, chosen)
        if kind == 0:
            return steps
        for index in range(kind):
            moved -= home[chosen[index]] != state.slots[chosen[index]]
        _do_step(state, kind, new, chosen)
        moved = _note(state, home, chosen, kind, steps, moved, tops, moves, log)
        steps += 1


@compiled
def recount(state, duplicates, total, most, home, budget, steps, tops, moves, log):
    """Give each expert as many replicas as its load deserves (`replicate`), wherever that weighs least.

    For where no single step helps any more: an expert that has become hot needs another replica, but what makes room
    for it makes other ranks heavier than they may be. Steps from there lower the largest load again. Arguments are
    those of `stepwise`, and of `replicate`; returns the steps made, with those before.
    """
    counts, chosen, moved = np.empty(len(state.load), np.int64), np.empty(LONGEST, np.int64), moves[steps]
    replicate(state.load, total, most, counts)
    for new in range(len(counts)):
        while state.counts[new] < counts[new] and steps < len(log):
            best, best_top = -1, np.inf
            for slot in range(len(state.slots)):
                old, rank = state.slots[slot], state.rank_of[slot]
                if old < 0 or state.counts[old] <= counts[old] or (not duplicates and state.lies[new, rank] > 0):
                    continue
                if state.held[rank] - state.share[old] < best_top:
                    best, best_top = slot, state.held[rank] - state.share[old]
            if best < 0 or moved + 1 > budget:
                break
            moved -= home[best] != state.slots[best]
            replace(state, best, new)
            chosen[0] = best
            moved = _note(state, home, chosen, 1, steps, moved, tops, moves, log)
            steps += 1
    return steps


@compiled
def step_layers(loads, homes, first, room, duplicates, targets, budgets, tops, moves, logs, steps):
    """`stepwise` from `homes` [L, P] for every layer, and again with replicas counted anew where that is not enough."""
    state, ways, total, open_ranks = new_state(loads.shape[1], first), new_ways(first[-1]), 0, 0
    for rank in range(len(room)):
        total += room[rank]
        open_ranks += room[rank] > 0
    most = total if duplicates else open_ranks
    for layer in range(len(loads)):
        home, target, budget, log = homes[layer], targets[layer], budgets[layer], logs[layer]
        tops[layer, 0], moves[layer, 0] = set_layer(state, loads[layer], home), 0
        set_ways(state, target, ways)
        made = stepwise(state, duplicates, target, home, budget, ways, 0, tops[layer], moves[layer], log)
        if tops[layer, made] > target:
            made = recount(state, duplicates, total, most, home, budget, made, tops[layer], moves[layer], log)
            made = stepwise(state, duplicates, target, home, budget, ways, made, tops[layer], moves[layer], log)
        steps[layer] = made


@compiled
def replay_steps(logs, steps, slots):
    """Make the first so many steps of each layer's log on its slots [L, P]."""
    for layer in range(len(slots)):
        for step in range(steps[layer]):
            for at in range(0, logs.shape[2], 2):
                if logs[layer, step, at] >= 0:
                    slots[layer, logs[layer, step, at]] = logs[layer, step, at + 1]

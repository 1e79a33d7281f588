"""From a load to a placement: how often each expert is replicated, and where the replicas go.

`replicate` and `place` give what TensorRT-LLM's ``doReplication`` and ``doPlacement`` give; `keep_slots` then saves
moves without changing any rank's load.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.partial_plan import part_of
from moe_eplb.core.placement import Placement

__all__ = ["Plan", "check_load", "initial_slots", "keep_slots", "place", "plan", "replicate"]


@dataclass(frozen=True, slots=True)
class Plan:
    """A new placement, the global slots int64 that it changes, and the rank loads float64 [R] it predicts."""

    placement: Placement
    changed: np.ndarray
    predicted: np.ndarray


def plan(load: np.ndarray, current: Placement, *, preserve_slots: bool = True, most_changes: int | None = None) -> Plan:
    """The placement for a load [E] on the slots of `current`.

    With `preserve_slots` an expert that stays on a rank stays in its slot. With `most_changes` it is what can be
    reached by changing so many slots of each rank.
    """
    counts = replicate(load, current.slots)
    slots = place(load, counts, current.ranks)
    if preserve_slots:
        slots = keep_slots(current.slot_to_expert, slots, current.ranks)
    placement = Placement(current.ranks, current.experts, slots)
    if most_changes is not None:
        placement = part_of(current, placement, load, most_changes)
    return Plan(placement, placement.changed_slots(current), placement.rank_load(load))


def check_load(load: np.ndarray, num_slots: int) -> None:
    """Raise BalancerError E131 where the experts do not fit the slots, E149 where a load is not finite or below 0."""
    load, experts = np.asarray(load, dtype=np.float64), len(load)
    if num_slots < experts:
        raise BalancerError("E131", f"{num_slots} slots cannot hold {experts} experts", hint=f"use at least {experts}")
    if experts and not (load.min() >= 0 and load.max() < np.inf):  # no number is neither
        worst = int(np.flatnonzero(~np.isfinite(load) | (load < 0))[0])
        raise BalancerError(
            "E149", f"the load of expert {worst} is not usable", why=f"it is {load[worst]}, loads are finite and >= 0"
        )


def replicate(load: np.ndarray, num_slots: int) -> np.ndarray:
    """int64 [E]: replicas of each expert, `num_slots` in total, at least one each.

    The next replica always goes to the expert with the largest load per replica, the higher id on a tie. Without any
    load the replicas are spread evenly, lower ids first. Optimal for the largest load per replica.
    """
    load = np.asarray(load, dtype=np.float64)
    experts = len(load)
    check_load(load, num_slots)
    if not load.any():
        counts = np.full(experts, num_slots // experts, dtype=np.int64)
        counts[: num_slots % experts] += 1
        return counts
    values = load.tolist()
    replicas = [1] * experts
    heap = [(-value, -expert) for expert, value in enumerate(values)]
    heapq.heapify(heap)
    for _ in range(num_slots - experts):
        expert = -heap[0][1]
        replicas[expert] += 1
        heapq.heapreplace(heap, (-values[expert] / replicas[expert], -expert))
    return np.array(replicas, dtype=np.int64)


def place(load: np.ndarray, counts: np.ndarray, ranks: int) -> np.ndarray:
    """int32 [P]: the expert of each slot.

    Replicas in order of falling size (ties: lower expert first) go to the rank with the least load that has a slot left
    (ties: lower rank), each into that rank's next slot. Two replicas of an expert may meet on a rank.
    """
    size = (np.asarray(load, dtype=np.float64) / counts).tolist()
    order = sorted(range(len(size)), key=lambda expert: (-size[expert], expert))
    per_rank = int(np.sum(counts)) // ranks
    slots = np.empty(per_rank * ranks, dtype=np.int32)
    heap = [(0.0, rank, 0) for rank in range(ranks)]
    for expert in order:
        for _ in range(int(counts[expert])):
            total, rank, used = heapq.heappop(heap)
            slots[rank * per_rank + used] = expert
            if used + 1 < per_rank:
                heapq.heappush(heap, (total + size[expert], rank, used + 1))
    return slots


def keep_slots(current: np.ndarray, new: np.ndarray, ranks: int) -> np.ndarray:
    """`new` int32 [P] with each rank's experts reordered so that those it already holds stay in their slots."""
    kept = np.empty_like(new)
    per_rank = len(new) // ranks
    for first in range(0, len(new), per_rank):
        arriving = new[first : first + per_rank].tolist()
        holes = []
        for slot in range(first, first + per_rank):
            expert = int(current[slot])
            if expert in arriving:
                arriving.remove(expert)
                kept[slot] = expert
            else:
                holes.append(slot)
        kept[holes] = arriving
    return kept


def initial_slots(experts: int, ranks: int, slots_per_rank: int) -> np.ndarray:
    """int32 [P]: where the experts begin: slot j of rank r holds expert (r * E // R + j) mod E (TensorRT-LLM)."""
    rank, slot = np.divmod(np.arange(ranks * slots_per_rank), slots_per_rank)
    slots: np.ndarray = ((rank * experts // ranks + slot) % experts).astype(np.int32)
    return slots

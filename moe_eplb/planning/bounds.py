"""What no placement beats: lower bounds of the largest rank load, to print next to every plan."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_eplb.planning.problem import Loads, Problem, Slots

__all__ = ["Bounds", "free_split", "lower_bounds"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower bounds of a layer's largest rank load, in tokens.

    Attributes:
        mean: The load divided by the ranks that hold experts.
        replica: The largest share of an expert after the best replication.
        beside: The largest share that some rank must hold, plus the least that can lie beside it.
        optimum: What the best placement reaches, where that was proved.
    """

    mean: float
    replica: float
    beside: float
    optimum: float | None = None

    @property
    def best(self) -> float:
        """The optimum, else the largest of the others."""
        return max(self.mean, self.replica, self.beside) if self.optimum is None else self.optimum


def lower_bounds(problem: Problem, load: Loads) -> list[Bounds]:
    """Bounds of every layer [L, E] on this problem's ranks and slots, with shares as equal as they can be.

    `beside`: some rank holds a replica of the expert with the largest share, and its other slots hold replicas too,
    none of which can be smaller than the expert's load / the most replicas that it may get.
    """
    from moe_eplb.planning import kernels

    total, ranks = int(problem.room.sum()), int((problem.room > 0).sum())
    most = total - problem.experts + 1 if problem.allow_duplicates else min(ranks, total - problem.experts + 1)
    least_room = int(problem.room[problem.room > 0].min())
    found = []
    for row in load:
        replica = float(kernels.floor_of(row, total, total if problem.allow_duplicates else ranks))
        smallest = np.sort(row / max(most, 1))[: least_room - 1]
        found.append(Bounds(float(row.sum()) / ranks, replica, replica + float(smallest.sum())))
    return found


def free_split(problem: Problem, slots: Slots, load: Loads) -> Loads:
    """What a dispatch that divides an expert's tokens among its replicas as it likes could bring a placement to.

    The least largest rank load [L] of placements [L, P]: no choice of replicas beats it, equal shares are above it.
    """
    from moe_eplb.planning import kernels

    least: Loads = np.empty(len(load))
    kernels.free_split_layers(load, slots, problem.first_slot, least)
    return least

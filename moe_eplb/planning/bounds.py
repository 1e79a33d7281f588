"""What no placement beats: lower bounds of the largest rank load, to print next to every plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.problem import Loads, Problem, Slots

__all__ = ["Bounds", "exact_optimum", "free_split", "lower_bounds"]

_MOST_EXACT = 64
"""Slots beyond which the exact optimum is not looked for."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lower bounds of a layer's largest rank load, in tokens.

    Attributes:
        mean: The load divided by the ranks that hold experts.
        replica: The largest share of an expert after the best replication.
        beside: The largest share that some rank must hold, plus the least that can lie beside it.
    """

    mean: float
    replica: float
    beside: float

    @property
    def best(self) -> float:
        """The largest of them."""
        return max(self.mean, self.replica, self.beside)


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


def exact_optimum(load: Sequence[float], ranks: int, slots: int, *, time_limit_s: float = 10.0) -> float | None:
    """The least largest rank load of one layer [E], proved by HiGHS (scipy), or None when time ran out.

    Replicas of an expert lie on different ranks and share its load equally. A program of whole numbers: y[e, k] chooses
    k replicas of e, x[e, k, r] puts one of them on rank r.

    Raises:
        UsageError: E192 scipy is not installed, or the case is too large.
    """
    try:
        from scipy.optimize import Bounds as Limits
        from scipy.optimize import LinearConstraint, milp
        from scipy.sparse import lil_matrix
    except ImportError as error:
        hint = "pip install 'moe-eplb[bound]'"
        raise UsageError("E192", "the exact optimum needs scipy, which is not installed", hint=hint) from error
    if slots > _MOST_EXACT:
        raise UsageError("E192", f"{slots} slots are too many for an exact optimum", why=f"at most {_MOST_EXACT}")
    experts, most = len(load), min(ranks, slots - len(load) + 1)
    kinds = [(e, k) for e in range(experts) for k in range(1, most + 1)]
    chosen = {kind: i for i, kind in enumerate(kinds)}
    first_x = len(kinds)

    def x(kind: tuple[int, int], rank: int) -> int:
        return first_x + chosen[kind] * ranks + rank

    columns = first_x + len(kinds) * ranks + 1
    rows = lil_matrix((experts + len(kinds) * (ranks + 1) + 2 * ranks, columns))
    low, high = list[float](), list[float]()

    def add(terms: dict[int, float], least: float, largest: float) -> None:
        for column, factor in terms.items():
            rows[len(low), column] = factor
        low.append(least)
        high.append(largest)

    for e in range(experts):
        add({chosen[e, k]: 1.0 for k in range(1, most + 1)}, 1, 1)
    for kind in kinds:
        add({x(kind, r): 1.0 for r in range(ranks)} | {chosen[kind]: -float(kind[1])}, 0, 0)
        for r in range(ranks):
            add({x(kind, r): 1.0, chosen[kind]: -1.0}, -np.inf, 0)
    for r in range(ranks):
        add({x(kind, r): 1.0 for kind in kinds}, slots // ranks, slots // ranks)
        add({x(kind, r): load[kind[0]] / kind[1] for kind in kinds} | {columns - 1: -1.0}, -np.inf, 0)
    goal, whole, top = np.zeros(columns), np.ones(columns), np.ones(columns)
    goal[-1], whole[-1], top[-1] = 1.0, 0.0, float(sum(load)) or 1.0
    answer = milp(
        goal, integrality=whole, bounds=Limits(np.zeros(columns), top),
        constraints=LinearConstraint(rows.tocsr(), low, high), options={"time_limit": time_limit_s},
    )  # fmt: skip
    return float(answer.fun) if answer.status == 0 else None

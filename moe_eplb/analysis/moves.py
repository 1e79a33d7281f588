"""What moved: commits, bytes, and how much of the movement remained at the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from moe_eplb.analysis.run_folder import EvidenceRow, Place, RunFolder
from moe_eplb.core.evidence import Row

__all__ = ["LayerMoves", "PlanWaits", "late_commits", "layer_moves", "plan_waits"]


@dataclass(frozen=True, slots=True)
class LayerMoves:
    """Moves of one layer. A slot that went to another expert and back counts in `moved_slots`, not in `net_slots`.

    `cross_rank_net_slots` compares what each rank holds, whatever the slot: replicas that a rank has at the end and not
    at the start.
    `idle_commits`: commits of plans that change no slot, since there is nothing to be gained, or too little.
    `by_source`: the bytes that came from the ``host``, from slots of the ``own`` rank and of a ``peer``.
    """

    layer: int
    slots: int
    commits: int
    moved_slots: int
    bytes: int
    net_slots: int
    cross_rank_net_slots: int
    by_source: dict[str, int] = field(default_factory=dict)
    idle_commits: int = 0


@dataclass(frozen=True, slots=True)
class PlanWaits:
    """For how many of the plans a rank waited more than `LONG_MS`, its device or its thread, and how long at most."""

    plans: int
    waited: int
    longest_ms: float


LONG_MS = 0.1
"""What is shorter is the look for a plan that is there, and no wait for one."""


def plan_waits(folder: RunFolder) -> PlanWaits:
    """Over all layers."""
    longest: dict[tuple[int, int], float] = defaultdict(float)
    for kind in (Row.PLAN, Row.DROPPED):
        for row in folder.evidence.rows(kind):
            wait = max(row["stall_us"], row.get("awaited_us", 0)) / 1e3
            longest[row["layer"], row["due"]] = max(longest[row["layer"], row["due"]], wait)
    waits = longest.values()
    return PlanWaits(len(waits), sum(wait > LONG_MS for wait in waits), max(waits, default=0.0))


def layer_moves(folder: RunFolder) -> list[LayerMoves]:
    """Moves of every layer; net numbers are 0 for a layer whose placement was never recorded."""
    placements: dict[int, list[EvidenceRow]] = defaultdict(list)
    for place, rows in folder.placements.items():
        placements[place.layer].append(rows[min(rows)])
    commits: dict[int, list[dict[int, EvidenceRow]]] = defaultdict(list)
    for place, rows in folder.evidence.by_place(Row.COMMIT).items():
        commits[place.layer].append(rows)
    return [
        _of_layer(layer, commits[layer], placements[layer], len(folder.ranks))
        for layer in range(folder.scenario.model.layers)
    ]


def _of_layer(
    layer: int, commits: list[dict[int, EvidenceRow]], placements: list[EvidenceRow], ranks: int
) -> LayerMoves:
    first, last = (placements[0]["slots"], placements[-1]["slots"]) if placements else ([], [])
    return LayerMoves(
        layer=layer,
        slots=len(first),
        commits=len(commits),
        moved_slots=sum(len(rows[min(rows)]["changed"]) for rows in commits),
        bytes=sum(row["bytes"] for rows in commits for row in rows.values()),
        net_slots=int(np.count_nonzero(np.not_equal(first, last))),
        cross_rank_net_slots=_gained(first, last, ranks),
        by_source=_by_source(commits),
        idle_commits=sum(not rows[min(rows)]["changed"] for rows in commits),
    )


def _by_source(commits: list[dict[int, EvidenceRow]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for rows in commits:
        for row in rows.values():
            total.update(row.get("sources", {}))
    return {source: total[source] for source in sorted(total) if total[source]}


def _gained(first: list[int], last: list[int], ranks: int) -> int:
    size = len(first) // ranks
    parts = [slice(rank * size, (rank + 1) * size) for rank in range(ranks)]
    return sum((Counter(last[part]) - Counter(first[part])).total() for part in parts)


def late_commits(folder: RunFolder) -> int:
    """Commits in another iteration than the one that their plan named."""
    due = {(row["layer"], row["digest"], row["due"]) for row in folder.evidence.rows(Row.PLAN)}
    commits: list[tuple[Place, EvidenceRow]] = [
        (place, rows[min(rows)]) for place, rows in folder.evidence.by_place(Row.COMMIT).items()
    ]
    return sum((place.layer, row["digest"], place.iteration) not in due for place, row in commits)

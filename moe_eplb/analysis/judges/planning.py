"""Was each plan made from the load that was counted: load and plan once more, from the reduced counts alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moe_eplb.analysis.judges.findings import Findings
from moe_eplb.analysis.run_folder import EvidenceRow, Place, RunFolder
from moe_eplb.core.evidence import Row
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import Plan
from moe_eplb.core.scenario_parts import Balancer
from moe_eplb.planning.online import Planning

__all__ = ["Due", "judge_plan_contents", "planned_anew"]


class Due(NamedTuple):
    """An update that the schedule demands."""

    layer: int
    taken: int
    due: int


class _Load:
    """The decayed load of a layer in float32, as `moe_eplb.balancer.statistics.LoadWindow` defines it."""

    def __init__(self, experts: int, options: Balancer) -> None:
        self._load = np.zeros(experts, dtype=np.float32)
        self._decay = np.float32(options.decay)
        self._recent: deque[np.ndarray] = deque(maxlen=options.window)

    def fold(self, counts: Sequence[int]) -> None:
        self._recent.append(np.asarray(counts, dtype=np.int64))
        sample = np.sum(self._recent, axis=0).astype(np.float32) / np.float32(len(self._recent))
        decayed = self._load * self._decay
        self._load = decayed + sample

    def take(self) -> np.ndarray:
        taken = self._load.astype(np.float64)
        self._load = np.zeros_like(self._load)
        return taken


def planned_anew(folder: RunFolder, updates: Collection[Due], findings: Findings) -> dict[Due, Plan]:
    """What the planner makes of the counts since the layer's plan before, for each update whose counts are known."""
    plans: dict[Due, Plan] = {}
    for layer in range(folder.scenario.model.layers):
        of_layer = {update.taken: update for update in updates if update.layer == layer}
        plans.update(_replanned(folder, layer, of_layer, findings))
    return plans


def judge_plan_contents(folder: RunFolder, plans: Mapping[Due, Plan], findings: Findings) -> None:
    """Every rank's plans are those that are made `planned_anew`."""
    rows: dict[Due, dict[int, EvidenceRow]] = {}
    for row in folder.evidence.rows(Row.PLAN):
        rows.setdefault(Due(row["layer"], row["taken"], row["due"]), {})[row["rank"]] = row
    for update, expected in plans.items():
        for rank, row in sorted(rows.get(update, {}).items()):
            _compare(expected, rank, row, Place(update.layer, update.taken), findings)


def _replanned(
    folder: RunFolder, layer: int, updates: dict[int, Due], findings: Findings
) -> Iterator[tuple[Due, Plan]]:
    """The layer's updates and what they must have planned, up to the first iteration whose counts are not known."""
    options, reduced = folder.scenario.balancer, folder.evidence.by_place(Row.REDUCED)
    assert options is not None
    load = _Load(folder.scenario.model.experts, options)
    planning = Planning(
        options.policy, options.preserve_slots, options.spare_slots, options.moves_per_update, min_gain=options.min_gain
    )
    plan = planning.planner()
    for iteration in range(max(updates, default=-1) + 1):
        place = Place(layer, iteration)
        counts = next((row["counts"] for row in reduced.get(place, {}).values()), None)
        if counts is None or len(counts) != folder.scenario.model.experts:
            findings.missing("the load that plans are made from is not known", place)
            return
        load.fold(counts)
        if iteration in updates:
            taken, current = load.take(), _placement(folder, place)
            if current is not None:
                yield updates[iteration], plan(taken, current)


def _placement(folder: RunFolder, place: Place) -> Placement | None:
    """The placement that the layer routed by; one that is missing or spoilt is the tables' finding."""
    rows = folder.placements.get(place)
    if not rows:
        return None
    slots = np.array(rows[min(rows)]["slots"], dtype=np.int32)
    return Placement(ranks=len(folder.ranks), experts=folder.scenario.model.experts, slot_to_expert=slots)


def _compare(expected: Plan, rank: int, row: EvidenceRow, place: Place, findings: Findings) -> None:
    if row["digest"] != expected.placement.digest():
        findings.wrong(f"rank {rank} planned {row['digest']}, the counts lead to {expected.placement.digest()}", place)
    elif not np.allclose(row["predicted"], expected.predicted, rtol=1e-6):
        findings.wrong(f"rank {rank} predicted rank loads {row['predicted']}, not {expected.predicted.tolist()}", place)

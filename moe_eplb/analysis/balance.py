"""Rank loads and balancedness, computed anew from what was recorded, apart from the balancer's own code.

Balancedness = mean rank load / max rank load of a layer, over ranks and never over layers; 1 when there is no load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.run_folder import EvidenceRow, Place, RunFolder
from moe_eplb.core.evidence import Row

__all__ = ["Loads", "first_placements", "mean_over_max", "measured_loads", "predicted_rank_loads", "routed_counts"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Loads:
    """Rank loads of the places at which every rank's load is known: `ranks` float64 [N, R] for N places in order."""

    places: list[Place]
    ranks: FloatArray

    def by_layer(self) -> dict[int, FloatArray]:
        """Rank loads [iterations, R] of each layer, in the layers' order."""
        return self._grouped([place.layer for place in self.places])

    def by_iteration(self) -> dict[int, FloatArray]:
        """Rank loads [layers, R] of each iteration, in the iterations' order."""
        return self._grouped([place.iteration for place in self.places])

    def _grouped(self, keys: list[int]) -> dict[int, FloatArray]:
        rows: dict[int, list[int]] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, []).append(row)
        return {key: self.ranks[rows[key]] for key in sorted(rows)}


def mean_over_max(rank_loads: FloatArray) -> float:
    """Sum over rows of the mean / sum over rows of the maximum of rank loads [N, R]."""
    top = float(rank_loads.max(axis=1).sum()) if len(rank_loads) else 0.0
    return float(rank_loads.mean(axis=1).sum()) / top if top else 1.0


def predicted_rank_loads(counts: Sequence[int] | NDArray[np.int64], slots: Sequence[int], ranks: int) -> FloatArray:
    """Rank loads [R] for counts [E] under a placement [P], if the replicas of an expert share its load equally."""
    experts = np.asarray(slots, dtype=np.int64)
    load = np.asarray(counts, dtype=np.float64)
    replicas = np.bincount(experts, minlength=len(load))
    return np.asarray((load[experts] / replicas[experts]).reshape(ranks, -1).sum(axis=1), dtype=np.float64)


def measured_loads(folder: RunFolder) -> Loads:
    """Entries that each rank's experts really processed."""
    received = folder.evidence.by_place(Row.RECEIVED)
    places = [place for place, rows in received.items() if len(rows) == len(folder.ranks)]
    loads = [[sum(received[place][rank]["slots"]) for rank in folder.ranks] for place in places]
    return Loads(places, np.array(loads, dtype=np.float64).reshape(len(places), len(folder.ranks)))


def routed_counts(folder: RunFolder) -> dict[Place, NDArray[np.int64]]:
    """Entries per expert [E] over all ranks, for the places at which every rank's are known."""
    routed = folder.evidence.by_place(Row.ROUTED)
    return {
        place: np.sum([row["counts"] for row in rows.values()], axis=0, dtype=np.int64)
        for place, rows in routed.items()
        if len(rows) == len(folder.ranks)
    }


def first_placements(folder: RunFolder) -> dict[int, EvidenceRow]:
    """The placement row of each layer's first recorded iteration, of the lowest rank that has one."""
    first: dict[int, EvidenceRow] = {}
    for place, rows in folder.placements.items():
        first.setdefault(place.layer, rows[min(rows)])
    return first

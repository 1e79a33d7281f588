"""Whether a second run of a scenario chose the same placements as the first."""

from __future__ import annotations

from dataclasses import dataclass

from moe_eplb.analysis.run_folder import Place, RunFolder
from moe_eplb.core.evidence import Row

__all__ = ["Reproduction", "compare_placements"]


@dataclass(frozen=True, slots=True)
class Reproduction:
    """`places`: layers and iterations that either run recorded; `first_difference`: the first that is not the same."""

    places: int
    first_difference: Place | None


def compare_placements(first: RunFolder, second: RunFolder) -> Reproduction:
    """Compare the placement digests of all ranks; a place that only one of the runs recorded is a difference."""
    ours, theirs = _digests(first), _digests(second)
    places = sorted(ours.keys() | theirs.keys(), key=lambda place: (place.iteration, place.layer))
    different = (place for place in places if ours.get(place) != theirs.get(place))
    return Reproduction(len(places), next(different, None))


def _digests(folder: RunFolder) -> dict[Place, dict[int, int]]:
    placements = folder.evidence.by_place(Row.PLACEMENT)
    return {place: {rank: row["digest"] for rank, row in rows.items()} for place, rows in placements.items()}

"""Placements of several layers, in the terms of this project and of no other's files."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.loads import LoadSet, LossReport, layers_text, require_numbers, slots_counted

__all__ = ["PlacementSet", "require_fit"]


@dataclass(frozen=True, eq=False)
class PlacementSet:
    """The expert of each slot int32 [L, P] of the layers `layer_ids`; slot s lies on rank s // (P / R).

    `numbered` and `read` are as in `LoadSet`.
    """

    slots: NDArray[np.int32]
    ranks: int
    experts: int
    layer_ids: tuple[int, ...]
    source: str = ""
    numbered: bool = True
    read: LossReport = field(default_factory=LossReport)

    def numbered_as(self, layer_ids: tuple[int, ...]) -> PlacementSet:
        """As `LoadSet.numbered_as`."""
        require_numbers(self, layer_ids)
        return replace(self, layer_ids=layer_ids, numbered=True)


def require_fit(loads: LoadSet, placement: PlacementSet) -> PlacementSet:
    """A placement of the layers of loads, in their order; where one of the two has no numbers, rows go by their order.

    Raises:
        UsageError: E195 it is of other layers or experts. E198 the loads are counts of its slots.
    """
    if loads.read.form == "tensorrt_llm" and placement.experts < loads.counts.shape[2] == placement.slots.shape[1]:
        raise slots_counted(loads.source, loads.counts.shape[2], placement.experts)
    if len(placement.layer_ids) == len(loads.layer_ids) and not (loads.numbered and placement.numbered):
        order = np.argsort(placement.layer_ids)
        of_loads = np.argsort(np.argsort(loads.layer_ids))
        placement = replace(placement, layer_ids=loads.layer_ids, slots=placement.slots[order][of_loads])
    rows = dict(zip(placement.layer_ids, placement.slots, strict=True))
    if set(loads.layer_ids) <= set(rows):  # dense layers have rows in some forms
        slots = np.stack([rows[layer] for layer in loads.layer_ids])
        placement = replace(placement, layer_ids=loads.layer_ids, slots=slots)
    if placement.layer_ids != loads.layer_ids or placement.experts != loads.counts.shape[2]:
        why = (
            f"layers {layers_text(placement.layer_ids)} of {placement.experts} experts there, "
            f"{layers_text(loads.layer_ids)} of {loads.counts.shape[2]} in the loads"
        )
        raise UsageError("E195", "the placement is not one of these layers and experts", why=why)
    return placement

"""What formats can hold beside counts and slots, so that each one's losses follow from one table."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import numpy as np

from moe_eplb.planning.loads import LoadSet, LossReport
from moe_eplb.planning.placements import PlacementSet

__all__ = ["BY_POSITION", "NEVER_KEPT", "Held", "HeldSlots", "after_reading", "of_loads", "of_placement"]


class Held(Enum):
    """What a file of loads may hold."""

    WINDOWS = "more than one window"
    ORDER = "the order of the windows in time"
    ITERATIONS = "the iteration of each window"
    LAYER_IDS = "the model's own numbers of its layers"
    RANKS = "how many ranks were summed"
    TOP_K = "how many experts a token goes to"
    PHASE = "whether it was prefill or decode"
    MODEL = "the model's name"
    EXACT = "counts above 16,777,216 to the last token"
    PER_RANK = "the counts of each rank alone"
    TOKENS = "the choices of each token"


NEVER_KEPT = frozenset({Held.PER_RANK, Held.TOKENS})
"""What a `LoadSet` has no place for."""


class HeldSlots(Enum):
    """What a file of placements may hold."""

    LAYER_IDS = "the model's own numbers of its layers"
    RANKS = "the number of ranks"
    SLOT_ORDER = "the order of a rank's slots"
    DUPLICATES = "two replicas of an expert on one rank"
    SOURCE = "what it was made from"


BY_POSITION = "the layers' own numbers are not known: they count the layers with experts from 0"
"""Said where a format wants the model's numbers and there are none."""


def after_reading(form: str, holds: frozenset[Held]) -> LossReport:
    """What is unknown of loads that were read from a form, and what was there and is not kept."""
    lost = tuple(one.value for one in Held if one not in holds | NEVER_KEPT)
    return LossReport(lost, form, tuple(one.value for one in Held if one in NEVER_KEPT & holds))


def of_loads(loads: LoadSet) -> Iterator[Held]:
    """What there is of these loads to be lost."""
    origin = loads.origin
    there = {
        Held.WINDOWS: loads.windows > 1,
        Held.ORDER: loads.windows > 1 and bool(origin.in_order),
        Held.ITERATIONS: origin.iterations is not None,
        Held.LAYER_IDS: loads.numbered,
        Held.RANKS: origin.ranks is not None,
        Held.TOP_K: origin.top_k is not None,
        Held.PHASE: bool(origin.phase),
        Held.MODEL: bool(origin.model),
        Held.EXACT: _rounded(loads),
    }
    yield from (one for one, held in there.items() if held)


def _rounded(loads: LoadSet) -> bool:
    """Whether any window's sum is no float32."""
    summed = loads.counts.sum(axis=0)
    return bool((summed.astype(np.float32).astype(np.float64) != summed.astype(np.float64)).any())


def of_placement(placement: PlacementSet) -> Iterator[HeldSlots]:
    """What there is of this placement to be lost."""
    held = np.sort(placement.slots.reshape(len(placement.slots), placement.ranks, -1), axis=2)
    ascending = np.array_equal(held.reshape(placement.slots.shape), placement.slots)
    there = {
        HeldSlots.LAYER_IDS: placement.numbered,
        HeldSlots.RANKS: True,
        HeldSlots.SLOT_ORDER: not ascending,
        HeldSlots.DUPLICATES: bool((np.diff(held, axis=2) == 0).any()),
        HeldSlots.SOURCE: bool(placement.source),
    }
    yield from (one for one, is_there in there.items() if is_there)

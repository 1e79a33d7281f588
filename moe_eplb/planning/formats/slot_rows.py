"""Rows of slots as several formats have them, and what every placement must be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import UsageError
from moe_eplb.planning.formats.files import brief
from moe_eplb.planning.loads import bad_content
from moe_eplb.planning.placements import PlacementSet

__all__ = ["checked", "given_ranks", "numbers_of_layers", "require_no_duplicates", "slot_table"]

_MOST = 1 << 20


def slot_table(path: Path, rows: Any) -> NDArray[np.int32]:
    """Rows [L][P] of equal length of whole numbers, as int32 [L, P]; E041 for anything else."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise bad_content(path, "a placement is a list of rows of experts", brief(rows))
    if len({len(row) for row in rows}) != 1:
        why = f"{sorted({len(row) for row in rows})}"[:80]
        raise bad_content(path, "layers have unequal numbers of slots", why)
    if any(type(value) is not int or not 0 <= value < _MOST for row in rows for value in row):
        raise bad_content(path, "slots hold whole numbers of experts", "at least one is something else")
    return np.array(rows, np.int32)


def numbers_of_layers(path: Path, numbers: Any) -> tuple[int, ...]:
    """Layers' numbers from a file; E041 if they are none."""
    if not isinstance(numbers, list) or any(type(one) is not int or not 0 <= one < _MOST for one in numbers):
        raise bad_content(path, "layers have whole numbers", brief(numbers))
    return tuple(numbers)


def given_ranks(ranks: int | None) -> int:
    """R for a format that does not state it; E196 if nobody does."""
    if ranks is None:
        raise UsageError("E196", "this form does not say how many ranks there are", hint="use --ranks")
    return ranks


def checked(path: Path, placement: PlacementSet) -> PlacementSet:
    """The placement, if slots divide by ranks, layers have numbers of their own and every expert has a slot."""
    slots, ranks, experts = placement.slots, placement.ranks, placement.experts
    if ranks < 1 or slots.shape[1] % ranks:
        why = f"{slots.shape[1]} slots, {ranks} ranks"
        raise bad_content(path, f"{slots.shape[1]} slots do not divide by {ranks} ranks", why)
    if not experts <= slots.shape[1]:
        why = f"{slots.shape[1]} slots, {experts} experts, of which each needs one"
        raise bad_content(path, "there are experts that have no slot", why)
    ids = placement.layer_ids
    if len(ids) != len(slots) or len(set(ids)) != len(ids):
        why = f"{len(set(ids))} for {len(slots)} layers"
        raise bad_content(path, "every layer needs a number of its own", why)
    for layer, row in zip(ids, slots, strict=True):
        missing = sorted(set(range(experts)) - set(row.tolist()))
        if missing or int(row.max()) >= experts:
            what = f"experts {missing[:8]} have no slot" if missing else f"expert {int(row.max())} does not exist"
            raise bad_content(path, f"layer {layer}: {what}", f"of {experts} experts")
    return placement


def require_no_duplicates(placement: PlacementSet) -> None:
    """E196 for two replicas of an expert on one rank, which some formats cannot hold."""
    held = np.sort(placement.slots.reshape(len(placement.slots), placement.ranks, -1), axis=2)
    twice = np.argwhere(np.diff(held, axis=2) == 0)
    if len(twice):
        layer, rank = placement.layer_ids[int(twice[0][0])], int(twice[0][1])
        what = "this form cannot hold two replicas of an expert on one rank"
        raise UsageError("E196", what, why=f"layer {layer}, rank {rank}", hint="plan without --allow-duplicates")

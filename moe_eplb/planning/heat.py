"""What the slots of a placement carry, in levels for a picture."""

from __future__ import annotations

import numpy as np

from moe_eplb.planning.problem import Problem, Solution

__all__ = ["LEVELS", "slot_levels"]

LEVELS = 16
"""Levels of load; the middle one begins at a slot's even share."""
_OCTAVES = 4.0
"""From a quarter of the even share to four times it."""


def slot_levels(problem: Problem, solution: Solution) -> list[bytes]:
    """For each layer a byte for each slot [P]: its load's level on a logarithmic scale, 0 to `LEVELS` - 1.

    An expert's replicas share its load in the newest window equally. A slot's even share is the layer's load / the
    slots that hold experts; an empty slot and one without load have level 0.
    """
    rows = []
    for load, slots in zip(problem.newest, solution.slots, strict=True):
        held = slots >= 0
        counts = np.bincount(slots[held], minlength=problem.experts)
        share = np.where(held, (load / np.maximum(counts, 1))[np.where(held, slots, 0)], 0.0)
        even = float(load.sum()) / max(int(held.sum()), 1)
        with np.errstate(divide="ignore"):
            octave = np.log2(share / even) if even > 0 else np.full(share.shape, -np.inf)
        level = np.floor((octave / _OCTAVES + 0.5) * LEVELS)
        rows.append(np.clip(level, 0, LEVELS - 1).astype(np.uint8).tobytes())
    return rows

"""omni-infer's placement patterns: an ``.npy`` of 0 and 1, [ranks, layers with experts, experts]."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from moe_eplb.core import recorded
from moe_eplb.core.input_file import read_input
from moe_eplb.planning.formats.files import MOST_BYTES, unreadable, whole_numbers
from moe_eplb.planning.formats.slot_rows import checked, require_no_duplicates
from moe_eplb.planning.loads import bad_content
from moe_eplb.planning.placements import PlacementSet

__all__ = ["placement_of", "write_placement"]


def placement_of(path: Path) -> PlacementSet:
    """A placement from a file; on each rank experts are in rising order, since the pattern has no other.

    Raises:
        ScenarioError: E040 it cannot be read, E041 it is no pattern, or ranks hold unequal numbers of experts.
    """
    try:
        data = read_input(path, MOST_BYTES)
        with recorded.quietly():
            found = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except recorded.UNREADABLE as error:
        raise unreadable(path, error) from error
    pattern = whole_numbers(path, "the pattern", found, 3)
    if int(pattern.max()) > 1:
        raise bad_content(path, "a pattern holds 0 and 1 alone", f"{int(pattern.max())}")
    held = pattern.sum(axis=2)
    if held.min() != held.max():
        raise bad_content(path, "ranks hold unequal numbers of experts", f"{held.min()} to {held.max()}")
    layers = pattern.transpose(1, 0, 2)
    slots = np.nonzero(layers)[2].reshape(len(layers), -1).astype(np.int32)
    made = PlacementSet(slots, len(pattern), pattern.shape[2], tuple(range(len(layers))), "omni-infer", False)
    return checked(path, made)


def write_placement(placement: PlacementSet) -> bytes:
    """The file's content; UsageError E196 with two replicas of an expert on one rank."""
    require_no_duplicates(placement)
    layers = len(placement.slots)
    made = np.zeros((placement.ranks, layers, placement.experts), np.int32)
    slots = placement.slots[np.argsort(placement.layer_ids)].reshape(layers, placement.ranks, -1)
    np.put_along_axis(made, slots.transpose(1, 0, 2), 1, axis=2)
    buffer = io.BytesIO()
    np.save(buffer, made)
    return buffer.getvalue()

"""Entries in order of the slots that process them, and the sum of what comes of them.

An entry is one (token, k): a row of hidden state that one slot has to process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_eplb.device import ops
from moe_eplb.device.ops import Parts
from moe_eplb.device.ops.plain import entry_at

__all__ = ["Grouped", "Grouping", "entries_of", "group_by_slot", "sum_over_k"]


class Grouping(NamedTuple):
    """N entries in order of their cell or slot, entries of one slot in order of arrival."""

    row: Tensor
    """int64 [N]: row of the hidden states."""
    k: Tensor
    """int64 [N]: position in the row's top-k."""
    slot: Tensor
    """int32 [N]: local slot."""
    offs: Tensor
    """int32 [S + X]: end of each cell's entries; or [S], of each slot's."""
    position: Tensor
    """int32 [M, K]: where an entry of a row stands among the N, -1 for none."""


class Grouped(NamedTuple):
    """Hidden states where `ExpertSlots.grouped_ffn` wants them; no size depends on what the slots are."""

    rows: Tensor
    """[N, D], rows after the last end hold anything."""
    position: Tensor
    """int32 [M, K]: the row of each entry, -1 for none."""
    offs: Tensor
    """int32 [S + X]: end of each cell's entries; or [S], of each slot's, where there are parts."""
    row_scale: Tensor | None = None
    """float32 [N], where the rows are fp8."""
    parts: Parts | None = None
    """Of the rows, where the products are those of few rows."""


def group_by_slot(slots: Tensor, entries: int, num_slots: int) -> Grouping:
    """Order the entries of `slots` int32 [M, K] (local slot, -1 for none; `entries` of them are not -1) by slot."""
    position, offs = ops.permute(slots, num_slots)
    source, top_k = entry_at(position, entries), slots.shape[1]
    row = source.div(top_k, rounding_mode="floor")
    return Grouping(row, source - row * top_k, slots.flatten()[source], offs, position)


def entries_of(slots: Tensor, position: Tensor, offs: Tensor) -> Grouping:
    """The entries of `slots` int [M, K] that were given a place, in order of their places. Waits for the device."""
    placed = (position >= 0).nonzero()
    row, k = placed[position[placed[:, 0], placed[:, 1]].argsort()].unbind(1)
    return Grouping(row, k, slots[row, k].to(torch.int32), offs, position)


def sum_over_k(output: Tensor, position: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weighted sum [M, D] of the entries' outputs [N, D] with `scales` float32 [M, K], zero without entries.

    `position` int32 [M, K] says where an entry's output is, -1 for none. The sum runs in float32 and in order of k
    whatever the order of the slots, so it does not depend on the device or the placement of the other experts; it is
    rounded once, to `dtype`.
    """
    return ops.combine(output, position, scales, dtype)

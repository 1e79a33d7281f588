"""Rows of all ranks in blocks of one size, so that no size depends on what the rows hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_eplb.moe.dispatch.collectives import Ranks
from moe_eplb.moe.dispatch.packing import RowFormat

__all__ = ["Gathered", "gather_block", "gather_riders"]


class Gathered(NamedTuple):
    """Rows [R * B, ...] of all ranks; those that fill up a block have integers -1, and anything else.

    `riders`: int64 [R, V] that rode with the rows, None where none did.
    """

    hidden: Tensor
    scales: Tensor
    integers: tuple[Tensor, ...]
    riders: Tensor | None = None


def gather_block(
    ranks: Ranks, row: RowFormat, block: int, x: Tensor, scales: Tensor, integers: Sequence[Tensor],
    riders: Tensor | None = None,
) -> Gathered:  # fmt: skip
    """Every rank's block of B >= T rows: hidden states [T, D], scales float32 [T, K], any columns int32 [T, K].

    Riders int64 [V] take the place of the hidden state in the last row, which then must be one that fills up.
    """
    if ranks.size == 1 and block == x.shape[0]:
        return Gathered(x, scales, tuple(integers))
    rows = row.pack_block(block, x, scales, *integers)
    if riders is not None:
        rows[-1, : 2 * riders.numel()] = riders.view(torch.int32)
    gathered = ranks.all_gather(rows)
    columns = row.unpack(gathered)
    parts = columns.integers.tensor_split(len(integers), dim=1)
    return Gathered(columns.hidden, columns.scales, parts, None if riders is None else _riders(gathered, block, riders))


def _riders(gathered: Tensor, block: int, mine: Tensor) -> Tensor:
    last = gathered[block - 1 :: block, : 2 * mine.numel()]
    return last.contiguous().view(torch.int64)


def gather_riders(ranks: Ranks, riders: Tensor | None) -> Tensor | None:
    """int64 [R, V] of all ranks' riders [V]; a rank on its own and a forward without riders send nothing."""
    return None if riders is None else ranks.all_gather(riders.unsqueeze(0))

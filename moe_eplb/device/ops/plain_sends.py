"""Rows that are sent only to the ranks that need them, in plain torch; no size depends on what a tensor holds.

Rank r is sent N_r rows, in order of their tokens, behind those of lower ranks. A row carries three words, its marks:
its token, its source rank and its place r * B + i, where it is the i-th for rank r and B is the most tokens of a rank.
No two rows that a rank sends in one exchange have the same place. What a reader finds elsewhere it does not use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["MARKS", "Arrived", "add_returned", "arrive", "needed_by", "order_sends", "send_rows"]

MARKS = 3


class Arrived(NamedTuple):
    """What M rows say, checked and copied.

    A row beyond those that were sent has slots and place -1. One that is not the row that was meant has slots 0, so
    that its scales, NaN, reach the sum of whatever token it stands for.
    """

    slots: Tensor
    """int32 [M, K]: local slots, outside [0, S) for those of other ranks."""
    scales: Tensor
    """float32 [M, K]; NaN where nothing was sent, too."""
    token: Tensor
    """int32 [M]: within the source rank."""
    marks: Tensor
    """int32 [M, 2]: source rank and place, to be sent back with the row's sum."""


def needed_by(slot_ids: Tensor, slots_per_rank: int, size: int) -> Tensor:
    """Bool [R, T]: whether rank r holds at least one slot of token t, out of global ids int [T, K]."""
    holder = slot_ids.div(slots_per_rank, rounding_mode="floor").long()
    # One column more takes what belongs to no rank.
    holder = torch.where((holder >= 0) & (holder < size), holder, size)
    sends = torch.zeros(slot_ids.shape[0], size + 1, dtype=torch.bool, device=slot_ids.device)
    return sends.scatter_(1, holder, True)[:, :size].t()


def order_sends(slot_ids: Tensor, counts: Tensor, *, slots_per_rank: int, block: int) -> tuple[Tensor, Tensor]:
    """The order in which rows are sent, and into `counts` int64 [R] how many go to each rank.

    Args:
        slot_ids: Global ids int32 [T, K].
        counts: Overwritten.
        slots_per_rank: S.
        block: B, at least T.

    Returns:
        The row of token t for rank r, int32 [R, T], -1 for none, and each row's token, int32 [R * B], anything beyond
        the sum of counts.
    """
    size, rows = counts.numel(), counts.numel() * block
    sends = needed_by(slot_ids, slots_per_rank, size)
    counts.copy_(sends.sum(dim=1))
    position = sends.cumsum(dim=1) - 1 + _begins(counts).unsqueeze(1)
    token = torch.arange(slot_ids.shape[0], device=slot_ids.device).repeat(size)
    token_at = torch.zeros(rows + 1, dtype=torch.int64, device=slot_ids.device)
    token_at.scatter_(0, torch.where(sends, position, rows).flatten(), token)
    return torch.where(sends, position, -1).int().contiguous(), token_at[:rows].int()


def send_rows(
    columns: Sequence[Tensor], token_at: Tensor, counts: Tensor, rows: Tensor, *, rank: int, block: int
) -> None:
    """Write the rows that are sent; of the others only the place, which becomes -1.

    Args:
        columns: Three of int32 [T, W_i], side by side in a row; the marks come behind them.
        token_at, counts: From `order_sends`.
        rows: int32 [R * B, W], W at least the sum of W_i and marks.
        rank: The source.
        block: B.
    """
    line = torch.arange(len(rows), device=rows.device)
    ends = counts.cumsum(0)
    receiver = torch.searchsorted(ends, line, right=True).clamp(max=len(ends) - 1)
    filled = line < ends[-1]
    begin = 0
    token = torch.where(filled, token_at, 0)
    place = torch.where(filled, receiver * block + line - _begins(counts)[receiver], -1)
    for column in (*columns, None):
        if column is None:
            content = torch.stack((token, torch.full_like(token, rank)), dim=1)
        else:
            content = column[token] if len(column) else column.new_zeros(len(rows), column.shape[1])
        end = begin + content.shape[1]
        rows[:, begin:end] = torch.where(filled.unsqueeze(1), content, rows[:, begin:end])
        begin = end
    rows[:, begin] = place.int()


def arrive(scales: Tensor, integers: Tensor, counts: Tensor, *, rank: int, block: int, slots_per_rank: int) -> Arrived:
    """Look at M = R * B received rows.

    Args:
        scales: float32 [M, K]; rows may be strided, here as in `integers`.
        integers: int32 [M, K + 3]: global slots and marks.
        counts: int64 [R], rows of each source rank, which stand in order of rank.
        rank: The receiver, whose slots are S = `slots_per_rank` from rank * S on.
        block: B.
    """
    token, source, place = integers[:, -MARKS:].clone().unbind(1)
    line = torch.arange(len(integers), device=integers.device)
    filled = (line < counts.sum()).unsqueeze(1)
    known = source.clamp(0, counts.numel() - 1)
    right = ((source == known) & (_begins(counts)[known] + place - rank * block == line)).unsqueeze(1)
    slots = integers[:, :-MARKS] - rank * slots_per_rank
    return Arrived(
        torch.where(filled, torch.where(right, slots, 0), -1),
        torch.where(right & filled, scales, torch.nan),
        token,
        torch.stack((source, torch.where(filled[:, 0], place, -1)), dim=1),
    )


def add_returned(hidden: Tensor, marks: Tensor, position: Tensor, counts: Tensor, *, rank: int, block: int) -> Tensor:
    """Sum [T, D] of a token's rows, in float32, in order of rank, rounded once; NaN where one is not the one meant.

    Args:
        hidden: [R * B, D], sums that stand where their rows were sent from; rows may be strided.
        marks: int32 [R * B, 2], source rank and place; rows may be strided.
        position, counts: From `order_sends`.
        rank: The source.
        block: B.
    """
    total = torch.zeros(position.shape[1], hidden.shape[1], device=hidden.device)
    for receiver, (at, begin) in enumerate(zip(position, _begins(counts), strict=True)):
        if not len(at):
            break
        row = at.clamp(min=0)
        right = (marks[row, 0] == rank) & (marks[row, 1] == receiver * block + at - begin)
        value = torch.where(right.unsqueeze(1), hidden[row].float(), torch.nan)
        total = total + torch.where((at >= 0).unsqueeze(1), value, 0.0)
    return total.to(hidden.dtype)


def _begins(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts

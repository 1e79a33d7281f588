"""Rows that are sent only to the ranks that need them, in plain torch; no size depends on what a tensor holds.

A rank has a block of B lines for each of R ranks. What it sends to rank r are the first lines of block r, in order of
token. A line carries three words, its marks: its token, its source rank and its number in the source's R * B lines. No
two lines of an exchange have the same marks, so a receiver, in whose block s stands what rank s sent, knows what each
of its lines must say. A line that is not used says -1 instead, slots included: rows of earlier forwards lie there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_eplb.device.ops.plain_rows import require_columns

__all__ = ["MARKS", "Arrived", "add_returned", "arrive", "needed_by", "order_sends", "send_rows"]

MARKS = 3


class Arrived(NamedTuple):
    """What R * B received lines say, checked and copied.

    Slots are -1 in a line that is not used, and 0 in one that is not the line that was meant, so that its scales, NaN,
    reach the sum of whatever token it stands for.
    """

    slots: Tensor
    """int32 [R * B, K]: local slots, outside [0, S) for those of other ranks."""
    scales: Tensor
    """float32 [R * B, K]; NaN where nothing was sent, too."""
    token: Tensor
    """int32 [R * B]: within the source rank."""
    marks: Tensor
    """int32 [R * B, 2]: source rank and line, to be sent back with the row's sum."""


def needed_by(slot_ids: Tensor, slots_per_rank: int, size: int) -> Tensor:
    """Bool [R, T]: whether rank r holds at least one slot of token t, out of global ids int [T, K]."""
    holder = slot_ids.div(slots_per_rank, rounding_mode="floor").long()
    # One column more takes what belongs to no rank.
    holder = torch.where((holder >= 0) & (holder < size), holder, size)
    sends = torch.zeros(slot_ids.shape[0], size + 1, dtype=torch.bool, device=slot_ids.device)
    return sends.scatter_(1, holder, True)[:, :size].t()


def order_sends(slot_ids: Tensor, *, ranks: int, slots_per_rank: int, block: int) -> tuple[Tensor, Tensor]:
    """Which token is sent in which line.

    Args:
        slot_ids: Global ids int32 [T, K].
        ranks: R.
        slots_per_rank: S.
        block: B, at least T.

    Returns:
        The number of token t among those for rank r, int32 [R, T], -1 where it does not go there, and each line's
        token, int32 [R * B], -1 for none.
    """
    sends = needed_by(slot_ids, slots_per_rank, ranks)
    place = torch.where(sends, sends.cumsum(dim=1) - 1, -1)
    token = torch.arange(slot_ids.shape[0], device=slot_ids.device).expand_as(place)
    token_at = torch.full((ranks, block + 1), -1, dtype=torch.int64, device=slot_ids.device)
    # One line more takes what is not sent.
    token_at.scatter_(1, torch.where(sends, place, block), torch.where(sends, token, -1))
    return place.int().contiguous(), token_at[:, :block].flatten().int()


def send_rows(columns: Sequence[Tensor], token_at: Tensor, rows: Tensor, *, rank: int) -> None:
    """Write the lines that are sent; of the others only slots and marks, which become -1.

    Args:
        columns: Three of int32 [T, W_i], the last one slots, side by side in a row; the marks come behind them.
        token_at: From `order_sends`.
        rows: int32 [R * B, W], W at least the sum of W_i and marks.
        rank: The source.

    Raises:
        ValueError: When they do not fit.
    """
    require_columns(columns, rows, MARKS)
    line = torch.arange(len(rows), device=rows.device)
    used = (token_at >= 0).unsqueeze(1)
    token, begin = token_at.clamp(min=0).long(), 0
    *wide, slots = (c[token] if len(c) else c.new_zeros(len(rows), c.shape[1]) for c in columns)
    for content in wide:
        end = begin + content.shape[1]
        rows[:, begin:end] = torch.where(used, content, rows[:, begin:end])
        begin = end
    integers = torch.cat((slots, torch.stack((token, torch.full_like(token, rank), line), dim=1)), dim=1)
    rows[:, begin : begin + integers.shape[1]] = torch.where(used, integers, -1)


def arrive(scales: Tensor, integers: Tensor, *, rank: int, block: int, slots_per_rank: int) -> Arrived:
    """Look at R * B received lines.

    Args:
        scales: float32 [R * B, K]; rows may be strided, here as in `integers`.
        integers: int32 [R * B, K + 3]: global slots and marks.
        rank: The receiver, whose slots are S = `slots_per_rank` from rank * S on.
        block: B.
    """
    token, source, line = integers[:, -MARKS:].clone().unbind(1)
    at = torch.arange(len(integers), device=integers.device)
    peer = at // max(block, 1)
    used = (line != -1).unsqueeze(1)
    right = ((source == peer) & (line == rank * block + at - peer * block)).unsqueeze(1)
    slots = integers[:, :-MARKS] - rank * slots_per_rank
    return Arrived(
        torch.where(used, torch.where(right, slots, 0), -1),
        torch.where(right, scales, torch.nan),
        token,
        torch.stack((source, line), dim=1),
    )


def add_returned(hidden: Tensor, marks: Tensor, place: Tensor, *, rank: int, block: int) -> Tensor:
    """Sum [T, D] of a token's rows, in float32, in order of rank, rounded once; NaN where one is not the one meant.

    Args:
        hidden: [R * B, D], sums in the lines from which their rows were sent; rows may be strided.
        marks: int32 [R * B, 2], source rank and line; rows may be strided.
        place: From `order_sends`.
        rank: The source.
        block: B.
    """
    total = torch.zeros(place.shape[1], hidden.shape[1], device=hidden.device)
    for receiver, at in enumerate(place):
        if not len(at):
            break
        line = receiver * block + at.clamp(min=0)
        right = (marks[line, 0] == rank) & (marks[line, 1] == line)
        value = torch.where(right.unsqueeze(1), hidden[line].float(), torch.nan)
        total = total + torch.where((at >= 0).unsqueeze(1), value, 0.0)
    return total.to(hidden.dtype)

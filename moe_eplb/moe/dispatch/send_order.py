"""Which rank needs which token, and in what order rows are sent; no size depends on what the tensors hold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["SendOrder", "needed_by", "send_order"]


def needed_by(slot_ids: Tensor, slots_per_rank: int, size: int) -> Tensor:
    """Bool [R, T]: whether rank r holds at least one slot of token t."""
    holder = slot_ids.div(slots_per_rank, rounding_mode="floor").long()
    # One column more takes what belongs to no rank.
    holder = torch.where((holder >= 0) & (holder < size), holder, size)
    sends = torch.zeros(slot_ids.shape[0], size + 1, dtype=torch.bool, device=slot_ids.device)
    return sends.scatter_(1, holder, True)[:, :size].t()


class SendOrder(NamedTuple):
    """Rows in order of the ranks that need them and, within a rank, in order of their tokens.

    A row's place is r * B + i where it is the i-th for rank r; no two rows of a rank have the same.
    """

    counts: Tensor
    """int64 [R]: rows for each rank."""
    position: Tensor
    """int64 [R, T]: the row of token t for rank r, R * B where there is none."""
    place: Tensor
    """int32 [R, T]: that row's place, anything where there is none."""
    token_at: Tensor
    """int64 [R * B]: the token of each row, 0 where there is none."""
    place_at: Tensor
    """int32 [R * B]: the place of each row, -1 where there is none."""


def send_order(sends: Tensor, block: int) -> SendOrder:
    """The order of rows that bool `sends` [R, T] asks for; no rank has more than B = `block` tokens."""
    size, tokens = sends.shape
    rows, device = size * block, sends.device
    counts = sends.sum(dim=1)
    index = sends.cumsum(dim=1) - 1
    begin = (counts.cumsum(0) - counts).unsqueeze(1)
    # What is not sent goes to one row behind the others.
    position = torch.where(sends, begin + index, rows)
    place = (torch.arange(size, device=device).unsqueeze(1) * block + index).int()
    flat, token = position.flatten(), torch.arange(tokens, device=device).expand(size, tokens)
    token_at = torch.zeros(rows + 1, dtype=torch.int64, device=device).scatter_(0, flat, token.reshape(-1))
    place_at = torch.full((rows + 1,), -1, dtype=torch.int32, device=device).scatter_(0, flat, place.flatten())
    return SendOrder(counts, position, place, token_at[:rows], place_at[:rows])

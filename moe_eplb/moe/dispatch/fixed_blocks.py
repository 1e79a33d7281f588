"""All-to-all with a fixed block for every pair of ranks, so that no size depends on where tokens go.

A block has as many rows as the fullest rank has tokens, and row t of it is token t. All blocks that a rank sends are
then alike, which makes the dispatch an all-gather; each rank takes the entries whose slots it holds. Partial sums
return in the model's dtype, a block to every rank, rows without a slot as zeros. Collectives of a forward: an
all-gather of riders where there are any, an all-gather of rows, an all-to-all of partial sums.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moe_eplb.device import ops
from moe_eplb.moe.dispatch.base import Received
from moe_eplb.moe.dispatch.blocks import gather_block
from moe_eplb.moe.dispatch.collectives import Ranks
from moe_eplb.moe.dispatch.packing import WIDE, RowFormat

__all__ = ["FixedBlocksExchange"]


class _Owner(Protocol):
    ranks: Ranks
    slots_per_rank: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype


class FixedBlocksExchange:
    """One forward's exchange, see `Exchange`.

    Args:
        owner: The dispatcher.
        slot_ids: Global slot ids int32 [T, K].
        counts: T of each rank.
        riders: int64 [R, V] of all ranks, or None.
    """

    def __init__(self, owner: _Owner, slot_ids: Tensor, counts: tuple[int, ...], riders: Tensor | None) -> None:
        self.riders = riders
        self._owner = owner
        self._slot_ids = slot_ids
        self._counts = counts
        self._block = max(counts)
        self._row = RowFormat(owner.hidden_size, owner.top_k, owner.top_k, owner.dtype, align=WIDE)

    @property
    def dispatch_bytes(self) -> int:
        """See `Exchange`."""
        return self._row.nbytes * self._block if self._owner.ranks.size > 1 else 0

    @property
    def combine_bytes(self) -> int:
        """See `Exchange`."""
        owner = self._owner
        rows = owner.ranks.size * self._block if owner.ranks.size > 1 else 0
        return rows * owner.hidden_size * owner.dtype.itemsize

    @property
    def partial_dtype(self) -> torch.dtype:
        """See `Exchange`: partial sums travel in the model's dtype."""
        return self._owner.dtype

    def dispatch(self, x: Tensor, scales: Tensor) -> Received:
        """See `Exchange`."""
        ranks = self._owner.ranks
        hidden, scales, (slots,), _ = gather_block(ranks, self._row, self._block, x, scales, (self._slot_ids,))
        if ranks.size > 1:
            slots = slots - ranks.rank * self._owner.slots_per_rank
        return Received(hidden, slots, scales, (self._block,) * ranks.size, entries=None)

    def combine(self, partial: Tensor) -> Tensor:
        """See `Exchange`. They are added in float32, in order of rank."""
        ranks, tokens = self._owner.ranks, self._counts[self._owner.ranks.rank]
        if ranks.size == 1:
            return partial
        blocks = (self._block,) * ranks.size
        returned = ranks.all_to_all(partial, blocks, blocks)
        return ops.add_blocks(
            returned.view(ranks.size, self._block, self._owner.hidden_size), tokens, self._owner.dtype
        )

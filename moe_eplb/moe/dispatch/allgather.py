"""All-gather dispatch: every rank sees every row; the partial sums come back through a reduce-scatter.

Collectives of a forward: an all-gather of token counts and riders, an all-gather of rows padded to the largest token
count, a reduce-scatter of float32 partial sums. The first is left out where all ranks' tokens are given and shapes are
static: riders then take a row of the second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.moe.dispatch.base import Received
from moe_eplb.moe.dispatch.blocks import gather_block, gather_riders
from moe_eplb.moe.dispatch.collectives import Ranks
from moe_eplb.moe.dispatch.packing import WIDE, RowFormat

__all__ = ["AllGather", "AllGatherExchange"]


class AllGather:
    """Makes all-gather exchanges over `group` (None: a single rank).

    A row carries the hidden state, K scales and the K slot ids that its source rank chose; `gather_ids` adds the K
    expert ids, for statistics over the ids of all ranks. Padding rows carry slot and expert -1.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        slots_per_rank: int,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        gather_ids: bool = False,
        static_shapes: bool = False,
    ) -> None:
        self.ranks = Ranks(group)
        self.static_shapes = static_shapes
        self.slots_per_rank = slots_per_rank
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.dtype = dtype
        self.gather_ids = gather_ids
        integers = 2 * top_k if gather_ids else top_k
        self._compact = RowFormat(hidden_size, top_k, integers, dtype)
        self._aligned = RowFormat(hidden_size, top_k, integers, dtype, align=WIDE)

    def row(self, *, static: bool) -> RowFormat:
        """How rows travel."""
        return self._aligned if static else self._compact

    def prepare_bytes(self, riders: Tensor | None, tokens: Sequence[int] | None = None) -> int:
        """See `Dispatcher`."""
        apart = riders is not None and not self._ride_with_rows(riders, tokens)
        words = (0 if self._is_static(tokens) else 1) + (riders.numel() if apart and riders is not None else 0)
        return 8 * words if self.ranks.size > 1 else 0

    def prepare(
        self, slot_ids: Tensor, expert_ids: Tensor, riders: Tensor | None, tokens: Sequence[int] | None = None
    ) -> AllGatherExchange:
        """See `Dispatcher`."""
        integers = (slot_ids, expert_ids) if self.gather_ids else (slot_ids,)
        if tokens is not None and self._is_static(tokens):
            if riders is not None and self._ride_with_rows(riders, tokens):
                return AllGatherExchange(self, integers, tuple(tokens), None, static=True, riding=riders)
            return AllGatherExchange(self, integers, tuple(tokens), gather_riders(self.ranks, riders), static=True)
        count = torch.tensor([slot_ids.shape[0]], device=slot_ids.device)
        told = count if riders is None else torch.cat((count, riders))
        gathered = self.ranks.all_gather(told.unsqueeze(0))
        counts = tuple(gathered[:, 0].tolist())
        return AllGatherExchange(self, integers, counts, None if riders is None else gathered[:, 1:], static=False)

    def _ride_with_rows(self, riders: Tensor, tokens: Sequence[int] | None) -> bool:
        room = self._aligned.hidden_words // 2
        return self._is_static(tokens) and self.ranks.size > 1 and riders.numel() <= room

    def _is_static(self, tokens: Sequence[int] | None) -> bool:
        return self.static_shapes and tokens is not None


class AllGatherExchange:
    """One forward's all-gather exchange, see `Exchange`."""

    def __init__(
        self,
        owner: AllGather,
        integers: tuple[Tensor, ...],
        counts: tuple[int, ...],
        riders: Tensor | None,
        *,
        static: bool,
        riding: Tensor | None = None,
    ) -> None:
        self.riders = riders
        self._riding = riding
        self._owner = owner
        self._row = owner.row(static=static)
        self._integers = integers
        self._counts = counts
        self._block = max(counts) + (riding is not None)
        self._static = static

    @property
    def dispatch_bytes(self) -> int:
        """See `Exchange`."""
        return self._row.nbytes * self._block if self._owner.ranks.size > 1 else 0

    @property
    def combine_bytes(self) -> int:
        """See `Exchange`."""
        size = self._owner.ranks.size
        return 4 * self._owner.hidden_size * self._block * size if size > 1 else 0

    @property
    def partial_dtype(self) -> torch.dtype:
        """See `Exchange`: float32 where ranks add to each other's sums."""
        return torch.float32 if self._owner.ranks.size > 1 else self._owner.dtype

    def dispatch(self, x: Tensor, scales: Tensor) -> Received:
        """See `Exchange`."""
        owner, ranks = self._owner, self._owner.ranks
        found = gather_block(ranks, self._row, self._block, x, scales, self._integers, self._riding)
        hidden, scales, integers, _ = found
        self.riders = self.riders if self._riding is None else found.riders
        slots, first = integers[0], ranks.rank * owner.slots_per_rank
        entries = None if self._static else int(((slots >= first) & (slots < first + owner.slots_per_rank)).sum())
        return Received(
            hidden=hidden,
            slots=slots,
            scales=scales,
            source_counts=(self._block,) * ranks.size,
            entries=entries,
            expert_ids=self._real_rows(integers[1]) if owner.gather_ids else None,
            first_slot=first,  # left to the grouping: a kernel of its own would only subtract it
        )

    def _real_rows(self, ids: Tensor) -> Tensor:
        blocks = ids.reshape(self._owner.ranks.size, self._block, ids.shape[1])
        return torch.cat([block[:count] for block, count in zip(blocks, self._counts, strict=True)])

    def combine(self, partial: Tensor) -> Tensor:
        """See `Exchange`."""
        total = self._owner.ranks.reduce_scatter(partial)
        return total[: self._counts[self._owner.ranks.rank]].to(self._owner.dtype)

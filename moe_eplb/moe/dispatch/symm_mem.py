"""One-sided dispatch: rows wait in symmetric buffers, from which the ranks that need them read.

A row travels once to every rank that holds at least one of its slots, and its partial sum back to the place from which
it came. Sizes live on the device. Collectives of a forward: an all-gather of token counts where they are not given and
one of riders where there are any, an exchange of rows, an exchange of partial sums.

Each row carries its source rank and its place there, and is used only where these are what the counts say. The
exchange's kernel writes over the offsets that it reads, from one block while others may not have begun; a row that was
read from a wrong place gives NaN in its token's output, never a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.device import ops
from moe_eplb.device.symmetric import Symmetric
from moe_eplb.moe.dispatch.base import Exchange, Received
from moe_eplb.moe.dispatch.blocks import gather_riders
from moe_eplb.moe.dispatch.collectives import Ranks
from moe_eplb.moe.dispatch.fixed_blocks import FixedBlocksExchange
from moe_eplb.moe.dispatch.packing import RowFormat
from moe_eplb.moe.dispatch.send_order import needed_by, send_order

__all__ = ["SymmMem", "SymmMemExchange"]

_MARKS = 2
"""A row's source rank and its place."""


class SymmMem:
    """Makes exchanges over `group` (None: a single rank), in the buffers of `symmetric`, which several ranks need.

    A row carries the hidden state, K scales, the K slot ids that its source rank chose, the token's index, and marks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        symmetric: Symmetric | None,
        slots_per_rank: int,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        static_shapes: bool = False,
    ) -> None:
        self.ranks = Ranks(group)
        self.symmetric = symmetric
        self.static_shapes = static_shapes
        self.slots_per_rank = slots_per_rank
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.dtype = dtype
        align = 1 if symmetric is None else symmetric.align
        self.row = RowFormat(hidden_size, top_k, top_k + 1 + _MARKS, dtype, align=align)
        # Of rows like these alone: what earlier exchanges left behind must be rows of the same columns.
        self.purpose = f"dispatch of {hidden_size} {dtype}, top {top_k}"
        self.returned = RowFormat(hidden_size, 0, _MARKS, dtype, align=align)

    def prepare_bytes(self, riders: Tensor | None, tokens: Sequence[int] | None = None) -> int:
        """See `Dispatcher`."""
        words = (tokens is None) + (0 if riders is None else riders.numel())
        return 8 * words if self.ranks.size > 1 else 0

    def prepare(
        self, slot_ids: Tensor, expert_ids: Tensor, riders: Tensor | None, tokens: Sequence[int] | None = None
    ) -> Exchange:
        """See `Dispatcher`; `expert_ids` stay on this rank."""
        gathered = gather_riders(self.ranks, riders)
        if self.symmetric is None:
            return FixedBlocksExchange(self, slot_ids, (slot_ids.shape[0],), gathered)
        return SymmMemExchange(self, self.symmetric, slot_ids, max(tokens or self._gathered(slot_ids)), gathered)

    def _gathered(self, slot_ids: Tensor) -> Sequence[int]:
        count = torch.full((1, 1), slot_ids.shape[0], device=slot_ids.device)
        counts: list[int] = self.ranks.all_gather(count).flatten().tolist()
        return counts


class SymmMemExchange:
    """One forward's exchange, see `Exchange`.

    Args:
        owner: The dispatcher.
        symmetric: Its buffers.
        slot_ids: Global slot ids int32 [T, K].
        block: The most tokens of a rank.
        riders: int64 [R, V] of all ranks, or None.
    """

    def __init__(
        self, owner: SymmMem, symmetric: Symmetric, slot_ids: Tensor, block: int, riders: Tensor | None
    ) -> None:
        self.riders = riders
        self._owner, self._symmetric = owner, symmetric
        self._slot_ids, self._block = slot_ids, block
        self._rows = owner.ranks.size * block
        self._sends = needed_by(slot_ids, owner.slots_per_rank, owner.ranks.size)
        self._order = send_order(self._sends, block)

    @property
    def dispatch_bytes(self) -> int:
        """See `Exchange`; the most, since the device alone knows how many rows have a receiver."""
        return self._owner.row.nbytes * self._rows

    @property
    def combine_bytes(self) -> int:
        """See `Exchange`; the most, as above."""
        return self._owner.returned.nbytes * self._rows

    @property
    def partial_dtype(self) -> torch.dtype:
        """See `Exchange`: partial sums travel in the model's dtype."""
        return self._owner.dtype

    def dispatch(self, x: Tensor, scales: Tensor) -> Received:
        """See `Exchange`."""
        row, rows, order = self._owner.row, self._rows, self._order
        window = self._symmetric.window(self._owner.purpose, rows, row.words)
        torch.index_select(self._packed(x, scales), 0, order.token_at, out=window.send[:rows])
        row.unpack(window.send[:rows]).integers[:, -1] = order.place_at
        window.send_counts.copy_(order.counts)
        self._symmetric.exchange(window)
        # Copies of all but the hidden states, which are read before the combine: peers and later layers write here.
        self._counts = window.received_counts.clone()
        return self._received(window.received[:rows])

    def _packed(self, x: Tensor, scales: Tensor) -> Tensor:
        """Rows int32 [max(T, 1), W] of this rank's tokens, without their places."""
        tokens, rank = x.shape[0], self._owner.ranks.rank
        marks = torch.full((tokens, 1 + _MARKS), rank, dtype=torch.int32, device=x.device)
        marks[:, 0] = torch.arange(tokens, device=x.device)
        return self._owner.row.pack_block(max(tokens, 1), x, scales, self._slot_ids, marks)

    def _received(self, rows: Tensor) -> Received:
        owner = self._owner
        hidden, scales, integers = owner.row.unpack(rows)
        token, source, place = integers[:, owner.top_k :].clone().unbind(1)
        line = torch.arange(self._rows, device=rows.device)
        filled = line < self._counts.sum()
        begin = self._counts.cumsum(0) - self._counts - owner.ranks.rank * self._block
        right = begin[source] + place == line
        self._marks = torch.where(filled.unsqueeze(1), torch.stack((source, place), dim=1), -1)
        # A wrong row stands for a token of which nothing is known: NaN for any slot makes its sum NaN.
        slots = integers[:, : owner.top_k] - owner.ranks.rank * owner.slots_per_rank
        slots = torch.where(filled.unsqueeze(1), torch.where(right.unsqueeze(1), slots, 0), -1)
        scales = torch.where(right.unsqueeze(1), scales, torch.nan)
        entries = None if owner.static_shapes else int(((slots >= 0) & (slots < owner.slots_per_rank)).sum())
        return Received(hidden, slots, scales, None, entries, sent_token=token, sent_rank=source)

    def combine(self, partial: Tensor) -> Tensor:
        """See `Exchange`. They are added in float32, in order of rank."""
        owner, rows = self._owner, self._rows
        window = self._symmetric.window("combine", rows, owner.returned.words)
        ops.pack_rows((partial.to(owner.dtype).contiguous().view(torch.int32), self._marks), window.send[:rows])
        window.send_counts.copy_(self._counts)
        self._symmetric.exchange(window)
        hidden, _, marks = owner.returned.unpack(window.received[:rows])
        at = self._order.position.clamp(max=max(rows - 1, 0))
        source, place = marks[at].unbind(-1)
        right = self._sends & (source == owner.ranks.rank) & (place == self._order.place)
        other = torch.where(self._sends, torch.nan, 0.0).to(owner.dtype).unsqueeze(-1)
        blocks = torch.where(right.unsqueeze(-1), hidden[at], other)
        return ops.add_blocks(blocks, self._slot_ids.shape[0], owner.dtype)

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

__all__ = ["SymmMem", "SymmMemExchange"]


class SymmMem:
    """Makes exchanges over `group` (None: a single rank), in the buffers of `symmetric`, which several ranks need.

    A row carries the hidden state, K scales, the K slot ids that its source rank chose, and marks, see
    `moe_eplb.device.ops.plain_sends`; a partial sum carries its row's source rank and place.
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
        self.row = RowFormat(hidden_size, top_k, top_k + ops.MARKS, dtype, align=align)
        self.returned = RowFormat(hidden_size, 0, 2, dtype, align=align)

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
        owner, there = self._owner, self._symmetric.window("dispatch", self._rows, self._owner.row.words)
        back = self._symmetric.window("combine", self._rows, owner.returned.words)
        self._position, token_at = ops.order_sends(
            self._slot_ids, there.send_counts, slots_per_rank=owner.slots_per_rank, block=self._block
        )
        columns = (x.contiguous().view(torch.int32), scales.contiguous().view(torch.int32), self._slot_ids)
        rows, rank = there.send[: self._rows], owner.ranks.rank
        ops.send_rows(columns, token_at, there.send_counts, rows, rank=rank, block=self._block)
        self._symmetric.exchange(there)
        # As many go back as came; peers write new numbers there only behind the combine's barrier.
        back.send_counts.copy_(there.received_counts)
        hidden, sent_scales, integers = owner.row.unpack(there.received[: self._rows])
        arrived = ops.arrive(
            sent_scales, integers, back.send_counts, rank=rank, block=self._block, slots_per_rank=owner.slots_per_rank
        )
        self._there, self._back, self._marks = there, back, arrived.marks
        return self._received(hidden, arrived)

    def _received(self, hidden: Tensor, arrived: ops.Arrived) -> Received:
        """All but the hidden states are copies: peers and later layers write where they came from."""
        entries = None
        if not self._owner.static_shapes:
            entries = int(((arrived.slots >= 0) & (arrived.slots < self._owner.slots_per_rank)).sum())
        source = arrived.marks[:, 0]
        return Received(hidden, arrived.slots, arrived.scales, None, entries, arrived.token, source)

    def combine(self, partial: Tensor) -> Tensor:
        """See `Exchange`. They are added in float32, in order of rank."""
        owner, back = self._owner, self._back
        sums = partial.to(owner.dtype).contiguous().view(torch.int32)
        ops.pack_rows((sums, self._marks), back.send[: self._rows])
        self._symmetric.exchange(back)
        hidden, _, marks = owner.returned.unpack(back.received[: self._rows])
        return ops.add_returned(
            hidden, marks, self._position, self._there.send_counts, rank=owner.ranks.rank, block=self._block
        )

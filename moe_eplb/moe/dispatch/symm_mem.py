"""One-sided dispatch: rows go into symmetric buffers of fixed size, in blocks that are equal for all pairs of ranks.

A row travels once to every rank that holds at least one of its slots, and its partial sum back to the line from which
it came. A block has as many lines as the fullest rank has tokens; those that nobody needs travel too and say so, which
is why no size depends on where tokens go. Collectives of a forward: an all-gather of token counts where they are not
given and one of riders where there are any, an exchange of rows, an exchange of partial sums.

Each row carries its source rank and its line there, and is used only where these are what its place says; otherwise its
token's output is NaN, never a number.
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
from moe_eplb.moe.dispatch.packing import WIDE, RowFormat

__all__ = ["SymmMem", "SymmMemExchange"]


class SymmMem:
    """Makes exchanges over `group` (None: a single rank), in the buffers of `symmetric`, which several ranks need.

    A row carries the hidden state, K scales, the K slot ids that its source rank chose, and marks, see
    `moe_eplb.device.ops.plain_sends`; a partial sum carries its row's source rank and line.
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
        self.row = RowFormat(hidden_size, top_k, top_k + ops.MARKS, dtype, align=WIDE)
        self.returned = RowFormat(hidden_size, 0, 2, dtype, align=WIDE)

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
        """See `Exchange`."""
        return self._owner.row.nbytes * self._rows

    @property
    def combine_bytes(self) -> int:
        """See `Exchange`."""
        return self._owner.returned.nbytes * self._rows

    @property
    def partial_dtype(self) -> torch.dtype:
        """See `Exchange`: partial sums travel in the model's dtype."""
        return self._owner.dtype

    def dispatch(self, x: Tensor, scales: Tensor) -> Received:
        """See `Exchange`."""
        owner, rank, block = self._owner, self._owner.ranks.rank, self._block
        window = self._symmetric.window("dispatch", self._rows, owner.row.words)
        self._place, token_at = ops.order_sends(
            self._slot_ids, ranks=owner.ranks.size, slots_per_rank=owner.slots_per_rank, block=block
        )
        columns = (x.contiguous().view(torch.int32), scales.contiguous().view(torch.int32), self._slot_ids)
        ops.send_rows(columns, token_at, window.send[: self._rows], rank=rank)
        self._symmetric.exchange(window, self._rows)
        hidden, sent_scales, integers = owner.row.unpack(window.received[: self._rows])
        arrived = ops.arrive(sent_scales, integers, rank=rank, block=block, slots_per_rank=owner.slots_per_rank)
        self._marks = arrived.marks
        return self._received(hidden, arrived)

    def _received(self, hidden: Tensor, arrived: ops.Arrived) -> Received:
        """All but the hidden states are copies: peers and later layers write where they came from."""
        owner, entries = self._owner, None
        if not owner.static_shapes:
            entries = int(((arrived.slots >= 0) & (arrived.slots < owner.slots_per_rank)).sum())
        counts = (self._block,) * owner.ranks.size
        return Received(hidden, arrived.slots, arrived.scales, counts, entries, arrived.token)

    def combine(self, partial: Tensor) -> Tensor:
        """See `Exchange`. They are added in float32, in order of rank."""
        owner = self._owner
        window = self._symmetric.window("combine", self._rows, owner.returned.words)
        sums = partial.to(owner.dtype).contiguous().view(torch.int32)
        ops.pack_rows((sums, self._marks), window.send[: self._rows])
        self._symmetric.exchange(window, self._rows)
        hidden, _, marks = owner.returned.unpack(window.received[: self._rows])
        return ops.add_returned(hidden, marks, self._place, rank=owner.ranks.rank, block=self._block)

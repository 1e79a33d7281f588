"""All-to-all dispatch: a row travels once to every rank that holds at least one of its slots.

Collectives of a forward: an all-gather of counts and riders, an all-to-all of rows, an all-to-all of partial sums. With
static shapes, see `moe_eplb.moe.dispatch.fixed_blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.device import ops
from moe_eplb.moe.dispatch.base import Exchange, Received
from moe_eplb.moe.dispatch.blocks import gather_riders
from moe_eplb.moe.dispatch.collectives import Ranks
from moe_eplb.moe.dispatch.fixed_blocks import FixedBlocksExchange
from moe_eplb.moe.dispatch.packing import RowFormat

__all__ = ["AllToAll", "AllToAllExchange"]


class AllToAll:
    """Makes all-to-all exchanges over `group` (None: a single rank).

    A row carries the hidden state, K scales, K slot ids (-1 for those of other ranks) and the token's index.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        slots_per_rank: int,
        hidden_size: int,
        top_k: int,
        dtype: torch.dtype,
        static_shapes: bool = False,
    ) -> None:
        self.ranks = Ranks(group)
        self.static_shapes = static_shapes
        self.slots_per_rank = slots_per_rank
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.dtype = dtype
        self.row = RowFormat(hidden_size, top_k, top_k + 1, dtype)

    def prepare_bytes(self, riders: Tensor | None, tokens: Sequence[int] | None = None) -> int:
        """See `Dispatcher`."""
        known = self.static_shapes and tokens is not None
        words = (0 if known else self.ranks.size) + (0 if riders is None else riders.numel())
        return 8 * words if self.ranks.size > 1 else 0

    def prepare(
        self, slot_ids: Tensor, expert_ids: Tensor, riders: Tensor | None, tokens: Sequence[int] | None = None
    ) -> Exchange:
        """See `Dispatcher`; `expert_ids` stay on this rank."""
        if self.static_shapes and tokens is not None:
            return FixedBlocksExchange(self, slot_ids, tuple(tokens), gather_riders(self.ranks, riders))
        size = self.ranks.size
        sends = ops.needed_by(slot_ids, self.slots_per_rank, size)
        counts = sends.sum(dim=1)
        told = counts if riders is None else torch.cat((counts, riders))
        gathered = self.ranks.all_gather(told.unsqueeze(0))
        table = gathered[:, :size].tolist()
        rank = self.ranks.rank
        plan = _Plan(sends, tuple(table[rank]), tuple(row[rank] for row in table))
        return AllToAllExchange(self, slot_ids, plan, None if riders is None else gathered[:, size:])


class _Plan(NamedTuple):
    sends: Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]


class AllToAllExchange:
    """One forward's all-to-all exchange, see `Exchange`."""

    def __init__(self, owner: AllToAll, slot_ids: Tensor, plan: _Plan, riders: Tensor | None) -> None:
        self.riders = riders
        self._owner = owner
        self._slot_ids = slot_ids
        self._plan = plan
        self._destination, self._token = plan.sends.nonzero(as_tuple=True)

    @property
    def dispatch_bytes(self) -> int:
        """See `Exchange`."""
        return self._owner.row.nbytes * sum(self._plan.send_counts) if self._owner.ranks.size > 1 else 0

    @property
    def combine_bytes(self) -> int:
        """See `Exchange`."""
        sent = sum(self._plan.receive_counts) if self._owner.ranks.size > 1 else 0
        return sent * self._owner.hidden_size * self._owner.dtype.itemsize

    @property
    def partial_dtype(self) -> torch.dtype:
        """See `Exchange`: partial sums travel in the model's dtype."""
        return self._owner.dtype

    def dispatch(self, x: Tensor, scales: Tensor) -> Received:
        """See `Exchange`."""
        owner, token = self._owner, self._token
        local = self._local_slots()
        rows = owner.row.pack(x[token], scales[token], local, token.int().unsqueeze(1))
        rows = owner.ranks.all_to_all(rows, self._plan.send_counts, self._plan.receive_counts)
        hidden, scales, integers = owner.row.unpack(rows)
        slots = integers[:, :-1]
        entries = int((slots >= 0).sum())
        return Received(hidden, slots, scales, self._plan.receive_counts, entries, integers[:, -1])

    def _local_slots(self) -> Tensor:
        """int32 [rows, K]: slot within the row's destination rank, -1 for the slots of other ranks."""
        per_rank = self._owner.slots_per_rank
        local = self._slot_ids[self._token] - (self._destination * per_rank).int().unsqueeze(1)
        return torch.where((local >= 0) & (local < per_rank), local, -1)

    def combine(self, partial: Tensor) -> Tensor:
        """See `Exchange`. They are added in float32, in order of rank."""
        owner, plan = self._owner, self._plan
        returned = owner.ranks.all_to_all(partial.to(owner.dtype), plan.receive_counts, plan.send_counts)
        total = torch.zeros(self._slot_ids.shape[0], owner.hidden_size, device=partial.device)
        # A token occurs once in a rank's rows, so no addition races with another on any device.
        tokens, blocks = (torch.split(rows, list(plan.send_counts)) for rows in (self._token, returned))
        for token, rows in zip(tokens, blocks, strict=True):
            total.index_add_(0, token, rows.float())
        return total.to(owner.dtype)

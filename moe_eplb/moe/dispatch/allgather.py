"""All-gather dispatch: every rank sees every row; the partial sums come back through a reduce-scatter.

Collectives of a forward: an all-gather of token counts (and riders), an all-gather of rows padded to the largest token
count, a reduce-scatter of float32 partial sums.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.moe.dispatch.base import Received
from moe_eplb.moe.dispatch.collectives import Ranks
from moe_eplb.moe.dispatch.packing import RowFormat

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
    ) -> None:
        self.ranks = Ranks(group)
        self.slots_per_rank = slots_per_rank
        self.hidden_size = hidden_size
        self.top_k = top_k
        self.dtype = dtype
        self.gather_ids = gather_ids
        self.row = RowFormat(hidden_size, top_k, 2 * top_k if gather_ids else top_k, dtype)

    def prepare_bytes(self, riders: Tensor | None) -> int:
        """See `Dispatcher`."""
        words = 1 + (0 if riders is None else riders.numel())
        return 8 * words if self.ranks.size > 1 else 0

    def prepare(self, slot_ids: Tensor, expert_ids: Tensor, riders: Tensor | None) -> AllGatherExchange:
        """See `Dispatcher`."""
        count = torch.tensor([slot_ids.shape[0]], device=slot_ids.device)
        told = count if riders is None else torch.cat((count, riders))
        gathered = self.ranks.all_gather(told.unsqueeze(0))
        integers = (slot_ids, expert_ids) if self.gather_ids else (slot_ids,)
        counts = tuple(gathered[:, 0].tolist())
        return AllGatherExchange(self, integers, counts, None if riders is None else gathered[:, 1:])


class AllGatherExchange:
    """One forward's all-gather exchange, see `Exchange`."""

    def __init__(
        self, owner: AllGather, integers: tuple[Tensor, ...], counts: tuple[int, ...], riders: Tensor | None
    ) -> None:
        self.riders = riders
        self._owner = owner
        self._integers = integers
        self._counts = counts
        self._block = max(counts)

    @property
    def dispatch_bytes(self) -> int:
        """See `Exchange`."""
        return self._owner.row.nbytes * self._block if self._owner.ranks.size > 1 else 0

    @property
    def combine_bytes(self) -> int:
        """See `Exchange`."""
        size = self._owner.ranks.size
        return 4 * self._owner.hidden_size * self._block * size if size > 1 else 0

    def dispatch(self, x: Tensor, scales: Tensor) -> Received:
        """See `Exchange`."""
        owner = self._owner
        rows = owner.ranks.all_gather(self._padded(owner.row.pack(x, scales, *self._integers)))
        hidden, scales, integers = owner.row.unpack(rows)
        local = integers[:, : owner.top_k] - owner.ranks.rank * owner.slots_per_rank
        mine = (local >= 0) & (local < owner.slots_per_rank)
        token = torch.arange(self._block, device=x.device).repeat(owner.ranks.size)
        return Received(
            hidden=hidden,
            slots=torch.where(mine, local, -1),
            scales=scales,
            token=token,
            source_counts=(self._block,) * owner.ranks.size,
            entries=int(mine.sum()),
            expert_ids=self._real_rows(integers[:, owner.top_k :]) if owner.gather_ids else None,
        )

    def _padded(self, rows: Tensor) -> Tensor:
        padding = rows.new_full((self._block - rows.shape[0], rows.shape[1]), -1)
        return torch.cat((rows, padding))

    def _real_rows(self, ids: Tensor) -> Tensor:
        blocks = ids.reshape(self._owner.ranks.size, self._block, ids.shape[1])
        return torch.cat([block[:count] for block, count in zip(blocks, self._counts, strict=True)])

    def combine(self, partial: Tensor) -> Tensor:
        """See `Exchange`."""
        total = self._owner.ranks.reduce_scatter(partial)
        return total[: self._counts[self._owner.ranks.rank]].to(self._owner.dtype)

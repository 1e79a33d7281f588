"""What every dispatch offers: prepare once, then send rows to the ranks of their slots and bring the sums back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_eplb.moe.dispatch.collectives import Ranks

__all__ = ["Dispatcher", "Exchange", "Received"]


@dataclass(frozen=True, slots=True)
class Received:
    """M rows that a rank received, in order of their source rank."""

    hidden: Tensor
    """[M, D] in the model's dtype, rows may be strided; rows without a slot may hold anything."""
    slots: Tensor
    """int32 [M, K]: slot, of which this rank's are [first_slot, first_slot + S); another rank or none processes the
    other entries."""
    scales: Tensor
    """float32 [M, K], rows may be strided; entries without a slot may hold anything."""
    source_counts: tuple[int, ...]
    """Rows by source rank, R numbers that sum to M."""
    entries: int | None
    """Number of (row, k) with a slot; None where only the device knows it, and then at most M * K."""
    sent_token: Tensor | None = None
    """int64 or int32 [M]: the row's token within its source rank; None where row i of a source rank is its token i."""
    expert_ids: Tensor | None = None
    """int32 [sum of T over ranks, K] of all ranks, where the dispatch was asked to gather them."""
    first_slot: int = 0
    """What local slot 0 is called in `slots`."""

    @property
    def local_slots(self) -> Tensor:
        """int32 [M, K]: local slot of this rank, outside [0, S) where another rank or none processes the entry."""
        return self.slots - self.first_slot if self.first_slot else self.slots

    @property
    def most_entries(self) -> int:
        """`entries`, and where only the device knows them how many there can be."""
        return self.slots.numel() if self.entries is None else self.entries

    @property
    def likely_entries(self) -> int:
        """`entries`, and where only the device knows them what an even load would give this rank."""
        return self.slots.numel() // len(self.source_counts) if self.entries is None else self.entries

    def source_rank(self) -> Tensor:
        """int64 [M]: the rank that each row came from. Waits for the device."""
        counts = torch.tensor(self.source_counts, device=self.hidden.device)
        return torch.arange(len(self.source_counts), device=self.hidden.device).repeat_interleave(counts)

    def token(self) -> Tensor:
        """int64 or int32 [M]: the row's token within its source rank."""
        if self.sent_token is not None:
            return self.sent_token
        return torch.cat([torch.arange(count, device=self.hidden.device) for count in self.source_counts])


class Exchange(Protocol):
    """One layer's exchange of one forward; every rank of the group makes the same calls in the same order."""

    riders: Tensor | None
    """int64 [R, V]: the riders of all ranks, None where there are none; if they ride with rows, from `dispatch` on."""

    @property
    def dispatch_bytes(self) -> int:
        """Bytes that this rank puts into the dispatch collective, 0 in a group of one."""

    @property
    def combine_bytes(self) -> int:
        """Bytes that this rank puts into the combine collective, 0 in a group of one."""

    @property
    def partial_dtype(self) -> torch.dtype:
        """In what dtype `combine` takes the partial sums."""

    def dispatch(self, x: Tensor, scales: Tensor) -> Received:
        """Send hidden states [T, D] and scales float32 [T, K]; return the rows for this rank's slots."""

    def combine(self, partial: Tensor) -> Tensor:
        """Bring partial sums [M, D] back to their tokens; return their sum [T, D] in the model's dtype."""


class Dispatcher(Protocol):
    """Makes exchanges over one process group."""

    ranks: Ranks
    static_shapes: bool
    """Whether, where the tokens of all ranks are given, every size follows from them alone: then nothing waits for the
    device, and a forward can be captured into a graph. Costs rows that carry nothing; meant for CUDA."""

    def prepare(
        self, slot_ids: Tensor, expert_ids: Tensor, riders: Tensor | None, tokens: Sequence[int] | None = None
    ) -> Exchange:
        """Tell all ranks what will be sent.

        Args:
            slot_ids: Global slot ids int32 [T, K]; ids outside [0, P) are dispatched nowhere.
            expert_ids: Expert ids int32 [T, K]; sent only by a dispatch that was built to gather them.
            riders: int64 [V] of numbers that every rank shall see, the same V on all ranks, or None on all ranks.
            tokens: T of each rank where it is known, the same on all ranks, or None on all ranks.
        """

    def prepare_bytes(self, riders: Tensor | None, tokens: Sequence[int] | None = None) -> int:
        """Bytes that this rank puts into the prepare collective, 0 in a group of one."""

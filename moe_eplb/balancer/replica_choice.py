"""Which replica of its expert a token goes to: the reference's round-robin, and an option that stays on the rank."""

from __future__ import annotations

import enum

import numpy as np
import torch
from torch import Tensor

from moe_eplb.core.placement import Placement
from moe_eplb.device import ops

__all__ = ["ReplicaChoice", "RouteTables"]


class ReplicaChoice(enum.StrEnum):
    """`round_robin`: over all replicas. `local_first`: over the source rank's own replicas where it has any."""

    ROUND_ROBIN = "round_robin"
    LOCAL_FIRST = "local_first"


class RouteTables:
    """Replica tables of one layer on one rank, kept at the same addresses for the life of the layer.

    Args:
        placement: The initial placement.
        rank: The source rank that routes with these tables.
        choice: See `ReplicaChoice`.
        device: Where the tables live.

    Attributes:
        block: int32 [2E + P]: replicas of each expert, where they begin among the slot ids, and the slot ids.
    """

    def __init__(
        self, placement: Placement, *, rank: int, choice: ReplicaChoice, device: torch.device | None = None
    ) -> None:
        self._rank, self._choice = rank, choice
        experts = placement.experts
        self.block = torch.zeros(2 * experts + placement.slots, dtype=torch.int32, device=device)
        self._count, self._start, self._slots = torch.split(self.block, [experts, experts, placement.slots])
        self._invalid = placement.slots
        self.set(placement)

    def set(self, placement: Placement) -> None:
        """Overwrite the tables by those of `placement`."""
        self.block.copy_(torch.from_numpy(self.of(placement)))

    def of(self, placement: Placement) -> np.ndarray:
        """The contents of `block` for a placement, int32 [2E + P]."""
        counts, starts, slots = self._tables(placement)
        rest = np.zeros(placement.slots - len(slots), dtype=np.int32)
        return np.concatenate((counts, starts, slots, rest)).astype(np.int32)

    def _tables(self, placement: Placement) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._choice is ReplicaChoice.ROUND_ROBIN:
            return placement.replica_count, placement.start_offset, placement.slot_ids
        per_rank = placement.slots_per_rank
        chosen = []
        for expert in range(placement.experts):
            start = int(placement.start_offset[expert])
            replicas = placement.slot_ids[start : start + int(placement.replica_count[expert])]
            local = replicas[replicas // per_rank == self._rank]
            chosen.append(local if len(local) else replicas)
        counts = np.array([len(c) for c in chosen], dtype=np.int32)
        starts = (np.cumsum(counts) - counts).astype(np.int32)
        return counts, starts, np.concatenate(chosen).astype(np.int32)

    def route(self, ids: Tensor, *, offset: int, counts: Tensor | None = None) -> Tensor:
        """Global slot ids int32 [T, K] for expert ids [T, K]; P for ids outside [0, E).

        Entry i of the flattened ids lies in block b = i // 1024 and takes replica
        ``(seen + b + offset) mod count``, where `seen` counts earlier entries of its expert in its block.
        The histogram of the ids is added to `counts` int32 [E], if given.
        """
        return ops.route(
            ids, self._count, self._start, self._slots, offset=offset, invalid=self._invalid, counts=counts
        )

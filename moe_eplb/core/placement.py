"""Which expert lies in which slot, what follows from it, and how balanced it makes the ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moe_eplb.core.errors import BalancerError

__all__ = ["Placement", "balancedness"]


@dataclass(frozen=True, eq=False)
class Placement:
    """The expert of each slot; slot s lies on rank s // (P / R). Values never change.

    Args:
        ranks: R.
        experts: E.
        slot_to_expert: int32 [P], P a multiple of R, every expert at least once.

    Raises:
        BalancerError: E131 to E132 when it is no placement of E experts on R ranks.
    """

    ranks: int
    experts: int
    slot_to_expert: np.ndarray

    def __post_init__(self) -> None:
        given = np.asarray(self.slot_to_expert)
        slots = given.astype(np.int32)  # always a copy
        if given.ndim != 1 or (given.dtype != np.int32 and not np.array_equal(given, slots)):
            raise BalancerError(
                "E132",
                "slots must hold whole expert ids",
                why=f"{given.dtype} of shape {given.shape}",
                hint="pass int32 [P]",
            )
        slots.flags.writeable = False
        object.__setattr__(self, "slot_to_expert", slots)
        self._check()

    def _check(self) -> None:
        slots, ranks = len(self.slot_to_expert), self.ranks
        fewest = -(-self.experts // ranks) * ranks
        if slots % ranks or slots < self.experts:
            nearest = max(fewest, round(slots / ranks) * ranks)
            raise BalancerError(
                "E131", f"{slots} slots do not fit {self.experts} experts on {ranks} ranks",
                why="the slots must be a multiple of the ranks and at least as many as the experts",
                hint=f"use {nearest} slots",
            )  # fmt: skip
        low, high = int(self.slot_to_expert.min()), int(self.slot_to_expert.max())
        if low < 0 or high >= self.experts:
            raise BalancerError(
                "E132", "a slot holds an expert that does not exist", why=f"ids {low} to {high}, {self.experts} experts"
            )
        missing = np.flatnonzero(self.replica_count == 0)
        if len(missing):
            raise BalancerError(
                "E132", f"experts {missing[:8].tolist()} have no slot", why=f"{len(missing)} of {self.experts}",
                hint="every expert needs at least one slot",
            )  # fmt: skip

    @property
    def slots(self) -> int:
        """P."""
        return len(self.slot_to_expert)

    @property
    def slots_per_rank(self) -> int:
        """P / R."""
        return self.slots // self.ranks

    @cached_property
    def replica_count(self) -> np.ndarray:
        """int32 [E]: slots of each expert."""
        counts: np.ndarray = np.bincount(self.slot_to_expert, minlength=self.experts).astype(np.int32)
        return counts

    @cached_property
    def start_offset(self) -> np.ndarray:
        """int32 [E]: where an expert's slots begin in `slot_ids`."""
        before: np.ndarray = (np.cumsum(self.replica_count) - self.replica_count).astype(np.int32)
        return before

    @cached_property
    def slot_ids(self) -> np.ndarray:
        """int32 [P]: global slots grouped by expert, in slot order."""
        order: np.ndarray = np.argsort(self.slot_to_expert, kind="stable").astype(np.int32)
        return order

    @cached_property
    def _digest(self) -> int:
        text = f"{self.ranks} {self.experts} ".encode() + self.slot_to_expert.astype("<i4").tobytes()
        return int.from_bytes(hashlib.blake2b(text, digest_size=5).digest(), "little")

    def digest(self) -> int:
        """A number in [0, 2**40) that differs between placements and agrees between processes."""
        return self._digest

    def changed_slots(self, other: Placement) -> np.ndarray:
        """Slots that hold another expert than in `other`, int64."""
        changed: np.ndarray = np.flatnonzero(self.slot_to_expert != other.slot_to_expert)
        return changed

    def rank_slots(self, rank: int) -> slice:
        """The slots of a rank."""
        return slice(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    def rank_load(self, load: np.ndarray) -> np.ndarray:
        """float64 [R]: load of each rank when an expert's load [E] is shared equally by its replicas."""
        share = (np.asarray(load, dtype=np.float64) / self.replica_count)[self.slot_to_expert]
        per_rank: np.ndarray = share.reshape(self.ranks, -1).sum(axis=1)
        return per_rank


def balancedness(rank_load: np.ndarray) -> np.ndarray:
    """Mean over maximum of the rank loads [..., R], along the ranks; 1 where no rank has any load."""
    mean, top = rank_load.mean(axis=-1), rank_load.max(axis=-1)
    ratio: np.ndarray = np.where(top > 0, mean / np.where(top > 0, top, 1.0), 1.0)
    return ratio

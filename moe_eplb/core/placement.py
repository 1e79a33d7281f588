"""Which expert lies in which slot, and what follows from it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Placement:
    ranks: int
    experts: int
    slot_to_expert: np.ndarray

    @property
    def slots(self) -> int:
        return len(self.slot_to_expert)

    @property
    def slots_per_rank(self) -> int:
        return self.slots // self.ranks

    @cached_property
    def replica_count(self) -> np.ndarray:
        return np.bincount(self.slot_to_expert, minlength=self.experts).astype(np.int32)

    @cached_property
    def start_offset(self) -> np.ndarray:
        c = self.replica_count
        return (np.cumsum(c) - c).astype(np.int32)

    @cached_property
    def slot_ids(self) -> np.ndarray:
        return np.argsort(self.slot_to_expert, kind="stable").astype(np.int32)

    def digest(self) -> int:
        text = f"{self.ranks} {self.experts} ".encode() + self.slot_to_expert.astype("<i4").tobytes()
        return int.from_bytes(hashlib.blake2b(text, digest_size=5).digest(), "little")

    def changed_slots(self, other: "Placement") -> np.ndarray:
        return np.flatnonzero(self.slot_to_expert != other.slot_to_expert)

    def rank_slots(self, rank: int) -> slice:
        return slice(rank * self.slots_per_rank, (rank + 1) * self.slots_per_rank)

    def rank_load(self, load: np.ndarray) -> np.ndarray:
        per = (load / self.replica_count)[self.slot_to_expert]
        return per.reshape(self.ranks, -1).sum(1)


def balancedness(rank_load: np.ndarray) -> np.ndarray:
    top = rank_load.max(-1)
    return np.where(top > 0, rank_load.mean(-1) / np.where(top > 0, top, 1), 1.0)

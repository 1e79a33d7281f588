"""What a planner is asked and what it answers: loads of some windows, ranks and slots; a placement of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import UsageError

__all__ = ["EMPTY", "Problem", "Solution", "gains", "rank_loads"]

EMPTY = -1
"""What stands in a slot of a masked rank."""

Loads = NDArray[np.float64]
Slots = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Problem:
    """A question to a policy.

    Attributes:
        loads: Load of each expert [W, L, E], windows in order of time, the last one is the newest; finite and >= 0.
        ranks, slots: R and P; every rank has P / R slots, or as many as `slots_per_rank` says.
        nodes, groups: Nodes of as many ranks each, and groups of neighbouring experts that stay on one node where the
            policy is hierarchical (DeepSeek's); 1 and 1 for a flat one.
        allow_duplicates: Whether two replicas of an expert may lie on one rank.
        current: The placement that is there [L, P], None when there is none.
        slots_per_rank: Slots of each rank [R] where they differ; their sum is `slots`.
        masked_ranks: Ranks that must hold nothing; their slots are `EMPTY`.
        max_moves: Slots over all layers that may hold another expert than in `current`; None for any number.
        time_budget_ms: When to answer with the best placement so far; None for the policy's own end.
        seed: Of a policy that draws; the same question has the same answer.
        held: Layers that keep what is in `current`; no moves are spent on them.
    """

    loads: Loads
    ranks: int
    slots: int
    nodes: int = 1
    groups: int = 1
    allow_duplicates: bool = False
    current: Slots | None = None
    slots_per_rank: tuple[int, ...] | None = None
    masked_ranks: tuple[int, ...] = ()
    max_moves: int | None = None
    time_budget_ms: float | None = None
    seed: int = 0
    held: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        loads = np.ascontiguousarray(self.loads, np.float64)
        object.__setattr__(self, "loads", loads[np.newaxis] if loads.ndim == 2 else loads)
        self._check_loads()
        self._check_sizes()
        self._check_current()

    @property
    def layers(self) -> int:
        """L."""
        return int(self.loads.shape[1])

    @property
    def experts(self) -> int:
        """E."""
        return int(self.loads.shape[2])

    @property
    def newest(self) -> Loads:
        """The last window's load [L, E]."""
        newest: Loads = self.loads[-1]
        return newest

    @cached_property
    def first_slot(self) -> NDArray[np.int64]:
        """Where each rank's slots begin, int64 [R + 1]."""
        sizes = self.slots_per_rank or (self.slots // self.ranks,) * self.ranks
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    @cached_property
    def room(self) -> NDArray[np.int64]:
        """Slots that each rank can hold experts in, int64 [R]; 0 for a masked one."""
        room: NDArray[np.int64] = np.diff(self.first_slot)
        room[list(self.masked_ranks)] = 0
        return room

    @property
    def plain(self) -> bool:
        """Whether all ranks have as many slots and none is masked."""
        return self.slots_per_rank is None and not self.masked_ranks

    def _check_loads(self) -> None:
        if self.loads.ndim != 3 or 0 in self.loads.shape:
            raise _refused("loads must be [windows, layers, experts]", f"their shape is {self.loads.shape}")
        if not (np.isfinite(self.loads).all() and (self.loads >= 0).all()):
            worst = np.argwhere(~np.isfinite(self.loads) | (self.loads < 0))[0].tolist()
            value = self.loads[tuple(worst)]
            raise _refused("a load is not usable", f"{value} in window, layer, expert {worst}", "loads are >= 0")

    def _check_sizes(self) -> None:
        ranks, slots, experts = self.ranks, self.slots, self.experts
        if ranks < 1 or self.nodes < 1 or self.groups < 1:
            raise _refused("ranks, nodes and groups are at least 1", f"{ranks}, {self.nodes}, {self.groups}")
        if self.slots_per_rank is None and slots % ranks:
            nearest = max(-(-experts // ranks), round(slots / ranks)) * ranks
            raise _refused(f"{slots} slots do not divide by {ranks} ranks", "", f"use {nearest} slots")
        if self.slots_per_rank is not None and (
            len(self.slots_per_rank) != ranks or sum(self.slots_per_rank) != slots or min(self.slots_per_rank) < 0
        ):
            why = f"{len(self.slots_per_rank)} numbers with the sum {sum(self.slots_per_rank)}"
            raise _refused(f"slots_per_rank must be {ranks} numbers with the sum {slots}", why)
        if any(not 0 <= rank < ranks for rank in self.masked_ranks):
            raise _refused("a masked rank does not exist", f"{self.masked_ranks} of {ranks} ranks")
        usable = int(self.room.sum())
        if usable < experts:
            nearest = -(-experts // ranks) * ranks
            why = f"{usable} slots that may hold one"
            raise _refused(f"{experts} experts do not fit", why, f"use {nearest} slots or more" if self.plain else "")
        if ranks % self.nodes:
            raise _refused(f"{ranks} ranks do not divide by {self.nodes} nodes", "")
        most = int((self.room > 0).sum())
        if not self.allow_duplicates and usable > experts * most:
            why = f"{usable} slots, {experts} experts, {most} ranks"
            raise _refused("so many slots need two replicas of an expert on one rank", why, "set allow_duplicates")

    def _check_current(self) -> None:
        current = self.current
        if any(not 0 <= layer < self.layers for layer in self.held):
            raise _refused("a held layer does not exist", f"{self.held} of {self.layers} layers")
        if current is None:
            if self.held:
                why = f"layers {self.held} are held"
                raise _refused("layers hold nothing that they could keep", why, "give the current placement")
            return
        if current.shape != (self.layers, self.slots):
            why = f"its shape is {current.shape}, not {(self.layers, self.slots)}"
            raise _refused("the current placement does not fit", why)
        low = EMPTY if self.masked_ranks else 0
        if int(current.min()) < low or int(current.max()) >= self.experts:
            raise _refused("the current placement holds experts that do not exist", f"of {self.experts}")


@dataclass(frozen=True, eq=False)
class Solution:
    """An answer.

    Attributes:
        slots: The expert of each slot [L, P].
        milliseconds: What it took, without compiling.
        finished: False when the time budget ended it.
        notes: What the policy has to say of its answer.
    """

    policy: str
    slots: Slots
    milliseconds: float
    finished: bool = True
    notes: Sequence[str] = field(default_factory=tuple)

    def rank_loads(self, load: Loads, problem: Problem) -> Loads:
        """Load of each rank [L, R] under a load [L, E] that an expert's replicas share equally."""
        return rank_loads(self.slots, load, problem.first_slot)


def rank_loads(slots: Slots, load: Loads, first_slot: NDArray[np.int64]) -> Loads:
    """Load of each rank [L, R] for placements [L, P] and a load [L, E]."""
    layers, experts = load.shape
    flat = np.where(slots >= 0, slots, 0) + np.arange(layers)[:, np.newaxis] * experts
    held = slots >= 0
    counts = np.bincount(flat[held], minlength=layers * experts)
    share = np.where(held, (load.reshape(-1) / np.maximum(counts, 1))[flat], 0.0)
    before = np.concatenate([np.zeros((layers, 1)), np.cumsum(share, axis=1)], axis=1)
    loads: Loads = np.diff(before[:, first_slot], axis=1)
    return loads


def gains(now: Loads, then: Loads) -> Loads:
    """Share [L] by which the balancedness of layers grows whose largest rank loads [L] change; -1 without load."""
    grown: Loads = np.divide(now, then, out=np.zeros_like(now), where=then > 0) - 1
    return grown


def _refused(what: str, why: str, hint: str = "") -> UsageError:
    return UsageError("E190", what, why=why, hint=hint)

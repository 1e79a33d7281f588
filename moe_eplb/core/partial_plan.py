"""A part of a plan that changes few slots of each rank at once, and is a whole placement by itself."""

from __future__ import annotations

from collections import Counter

import numpy as np

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement

__all__ = ["part_of"]


def part_of(current: Placement, target: Placement, load: np.ndarray, most_changes: int) -> Placement:
    """A placement on the way from `current` to `target`, at most `most_changes` slots of each rank away from `current`.

    Slots take their new experts in order of the load that a replica brings, the larger first. A slot that holds the
    last replica of its expert changes together with one that takes this expert in, so that none is ever without.

    Args:
        current, target: Placements of the same E experts in the same P slots.
        load: [E].
        most_changes: At least 1.

    Raises:
        BalancerError: E175 when no such change fits.
    """
    way = _Way(current, target, most_changes)
    share = np.asarray(load, dtype=np.float64) / target.replica_count
    order = sorted(target.changed_slots(current).tolist(), key=lambda slot: (-share[target.slot_to_expert[slot]], slot))
    # From the beginning after each change, because it may have given an expert a second replica.
    while any(way.change(slot) for slot in order if slot not in way.changed):
        pass
    if order and not way.changed:
        raise BalancerError(
            "E175", "no part of the plan fits", why=f"{len(order)} slots change, at most {most_changes} of a rank at "
            "once, and experts with a single replica change places", hint="raise spare_slots",
        )  # fmt: skip
    return Placement(current.ranks, current.experts, np.array(way.slots, dtype=np.int32))


class _Way:
    """Slots as they are so far."""

    def __init__(self, current: Placement, target: Placement, most_changes: int) -> None:
        self.slots: list[int] = current.slot_to_expert.tolist()
        self.changed: set[int] = set()
        self._target: list[int] = target.slot_to_expert.tolist()
        self._per_rank, self._most = current.slots_per_rank, most_changes
        self._replicas = Counter(self.slots)
        self._used: Counter[int] = Counter()

    def change(self, slot: int) -> bool:
        """Change a slot, with those that must change with it, if they fit. Whether they do."""
        chain = self._chain(slot)
        used = self._used + Counter(place // self._per_rank for place in chain)
        if not chain or max(used.values()) > self._most:
            return False
        self._used = used
        for place in chain:
            self._replicas[self.slots[place]] -= 1
            self._replicas[self._target[place]] += 1
            self.slots[place] = self._target[place]
        self.changed.update(chain)
        return True

    def _chain(self, slot: int) -> list[int]:
        """The slot, and for as long as the last replica of an expert goes, one more that takes the expert in."""
        chain = [slot]
        arrived = {self._target[slot]}
        while (leaving := self.slots[chain[-1]]) not in arrived and self._replicas[leaving] == 1:
            following = self._taking(leaving, chain)
            if following is None:
                return []
            chain.append(following)
            arrived.add(self._target[following])
        return chain

    def _taking(self, expert: int, chain: list[int]) -> int | None:
        """A slot that has yet to take the expert in."""
        for slot, wanted in enumerate(self._target):
            if wanted == expert and slot not in self.changed and slot not in chain:
                return slot
        return None

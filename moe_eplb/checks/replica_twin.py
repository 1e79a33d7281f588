"""The replica rule once more, one entry after the other, to hold the running one against."""

from __future__ import annotations

import numpy as np

__all__ = ["expected_slot_counts"]

_BLOCK = 1024


def expected_slot_counts(
    expert_ids: np.ndarray, slot_to_expert: np.ndarray, *, rank: int, ranks: int, local_first: bool
) -> np.ndarray:
    """Entries per slot int64 [P] that a source rank's ids [T, K] lead to.

    Entry i goes to replica ``(seen + i // 1024 + rank) mod count`` of its expert, where `seen` counts the expert's
    earlier entries in the same block of 1024 (TensorRT-LLM's rule). With `local_first` only the source rank's own
    replicas count where it has any.
    """
    replicas: dict[int, list[int]] = {}
    for slot, expert in enumerate(slot_to_expert.tolist()):
        replicas.setdefault(expert, []).append(slot)
    if local_first:
        per_rank = len(slot_to_expert) // ranks
        for expert, slots in replicas.items():
            replicas[expert] = [s for s in slots if s // per_rank == rank] or slots
    counts = np.zeros(len(slot_to_expert), dtype=np.int64)
    seen: dict[int, int] = {}
    for i, expert in enumerate(expert_ids.reshape(-1).tolist()):
        if i % _BLOCK == 0:
            seen = {}
        slots = replicas[expert]
        earlier = seen.get(expert, 0)
        seen[expert] = earlier + 1
        counts[slots[(earlier + i // _BLOCK + rank) % len(slots)]] += 1
    return counts

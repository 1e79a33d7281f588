"""TensorRT-LLM's ``cpp/tests/unit_tests/runtime/moeLoadBalancerTest.cpp``, but for MultiLayerTest (test_multi_layer).

The vectors of VerifyReplication and VerifyPlacement are held against the planner's functions in
``tests/core/test_planner.py``. Here they go all the way: counted, summed over the ranks, planned and committed.
ReconfigureMaskOnlyRemovesDeadRankSlots has its place in test_python_list.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_eplb.core.errors import BalancerError
from tests.support.balanced import Rig, StandIn

REPLICATION = {
    "Equal slots and experts": (2, 2, [1, 2, 3, 4], [1, 1, 1, 1]),
    "Zero load factors": (3, 2, [0, 0, 0, 0], [2, 2, 1, 1]),
    "Varied load factors": (4, 2, [1, 4, 2, 1], [1, 4, 2, 1]),
    "Complex load distribution": (3, 3, [10, 5, 2, 15, 8], [2, 1, 1, 3, 2]),
    "Single expert with load": (2, 2, [0, 10, 0], [1, 2, 1]),
}
"""Slots per rank, R, counts of one iteration [E], replicas [E]."""
PLACEMENT = {
    "Equal load factors": (2, 2, [1, 1, 1, 1], [1, 1, 1, 1], 0.001),
    "Varied load factors": (3, 2, [1, 3, 2, 1], [1, 2, 2, 1], 0.01),
    "Complex load distribution": (3, 3, [10, 5, 2, 15, 8], [2, 1, 1, 3, 2], 2.0),
    "Extreme load differences": (2, 2, [1, 100, 10], [1, 2, 1], 9.0),
    "One replica per expert": (3, 2, [2, 3, 4, 5, 6, 7], [1, 1, 1, 1, 1, 1], 1.0),
}
"""The same, and the largest difference between rank loads."""


def committed_slots(per_rank: int, ranks: int, counts: list[int]) -> np.ndarray:
    """The expert of each slot [P] after one iteration that counted `counts` and one that commits."""
    experts = len(counts)
    rig = Rig(2, experts, 1, slots_per_rank=per_rank, ranks=ranks, updates=2, empty_group="never", tokens=0)
    rig.iterate(2, StandIn(ranks, torch.tensor(counts)))
    rig.balancer.shutdown()
    assert rig.journal.commits == [(0, 0, 1), (1, 0, 1)]
    rig.assert_weights_match()
    first, second = rig.placements()
    assert first == second
    assert len(first) == per_rank * ranks
    return np.array(first)


@pytest.mark.parametrize(("per_rank", "ranks", "counts", "replicas"), REPLICATION.values(), ids=REPLICATION)
def test_verify_replication(per_rank: int, ranks: int, counts: list[int], replicas: list[int]) -> None:
    """ReplicationTests/MoeReplicationTest.VerifyReplication."""
    slots = committed_slots(per_rank, ranks, counts)
    assert np.bincount(slots, minlength=len(counts)).tolist() == replicas


@pytest.mark.parametrize(("per_rank", "ranks", "counts", "replicas", "most"), PLACEMENT.values(), ids=PLACEMENT)
def test_verify_placement(per_rank: int, ranks: int, counts: list[int], replicas: list[int], most: float) -> None:
    """PlacementTests/MoePlacementTest.VerifyPlacement."""
    slots = committed_slots(per_rank, ranks, counts)
    assert np.bincount(slots, minlength=len(counts)).tolist() == replicas
    share = np.array(counts) / np.array(replicas)
    rank_loads = [float(share[slots[first : first + per_rank]].sum()) for first in range(0, len(slots), per_rank)]
    assert max(rank_loads) - min(rank_loads) <= most + 1e-9
    assert sum(rank_loads) == pytest.approx(sum(counts))


@pytest.mark.parametrize(("statistic", "update"), [(False, True), (None, True)])
def test_updates_with_statistics_disabled_are_refused(statistic: bool | None, update: bool) -> None:
    """computeLayerUpdateSchedule's check: upstream's test refuses such a configuration, here the balancer does."""
    rig = Rig(2, updates=2, empty_group="never")
    rig.balancer.set_iter_info(False, False)
    with pytest.raises(BalancerError, match=r"E146(.|\n)*updates without statistics"):
        rig.balancer.set_iter_info(statistic, update)
    rig.iterate(2)
    rig.balancer.shutdown()
    assert (rig.journal.loads, rig.journal.commits) == ([], [])

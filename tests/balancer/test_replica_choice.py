"""Replica choice against the rule done one entry after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.balancer.replica_choice import ReplicaChoice, RouteTables
from moe_eplb.checks.replica_twin import expected_slot_counts
from moe_eplb.core.placement import Placement


def placement(experts: int, ranks: int, per_rank: int, seed: int) -> Placement:
    """Every expert once, the rest of the slots at random."""
    rng = np.random.default_rng(seed)
    extra = rng.integers(0, experts, ranks * per_rank - experts)
    slots = rng.permutation(np.concatenate([np.arange(experts), extra])).astype(np.int32)
    return Placement(ranks, experts, slots)


# (E, K, R, slots per rank, T): the sizes that TensorRT-LLM's kernel test uses, and one that crosses several blocks
SIZES = [(8, 2, 2, 5, 128), (256, 8, 32, 12, 5000), (16, 2, 1, 16, 64), (7, 3, 2, 6, 2000)]


@pytest.mark.parametrize(("experts", "top_k", "ranks", "per_rank", "tokens"), SIZES)
@pytest.mark.parametrize("choice", list(ReplicaChoice))
def test_counts_equal_the_twins(
    experts: int, top_k: int, ranks: int, per_rank: int, tokens: int, choice: ReplicaChoice
) -> None:
    where = placement(experts, ranks, per_rank, seed=tokens)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, experts, (tokens, top_k), dtype=np.int32))
    for rank in range(min(ranks, 3)):
        slots = RouteTables(where, rank=rank, choice=choice).route(ids, offset=rank)
        assert slots.dtype == torch.int32
        assert slots.shape == ids.shape
        assert np.array_equal(where.slot_to_expert[slots.numpy()], ids.numpy())
        expected = expected_slot_counts(
            ids.numpy(), where.slot_to_expert, rank=rank, ranks=ranks, local_first=choice is ReplicaChoice.LOCAL_FIRST
        )
        assert np.bincount(slots.numpy().reshape(-1), minlength=where.slots).tolist() == expected.tolist()


def test_order_within_a_block_and_restart_in_the_next() -> None:
    where = Placement(1, 2, np.array([0, 1, 0], dtype=np.int32))
    ids = torch.zeros(1026, 1, dtype=torch.int32)
    slots = RouteTables(where, rank=0, choice=ReplicaChoice.ROUND_ROBIN).route(ids, offset=0)
    assert slots[:4, 0].tolist() == [0, 2, 0, 2]
    assert slots[1024:, 0].tolist() == [2, 0]  # block 1 begins with replica (0 + 1) mod 2


def test_offset_by_rank_starts_at_another_replica() -> None:
    where = Placement(2, 2, np.array([0, 1, 0, 1], dtype=np.int32))
    tables = RouteTables(where, rank=1, choice=ReplicaChoice.ROUND_ROBIN)
    assert tables.route(torch.tensor([[0, 1]]), offset=1).tolist() == [[2, 3]]


@pytest.mark.parametrize("bad", [-1, 4, 1000])
def test_ids_out_of_range_get_the_invalid_slot(bad: int) -> None:
    where = placement(4, 2, 3, seed=0)
    tables = RouteTables(where, rank=0, choice=ReplicaChoice.ROUND_ROBIN)
    slots = tables.route(torch.tensor([[0, bad]], dtype=torch.int32), offset=0)
    assert slots[0, 1] == where.slots
    assert slots[0, 0] < where.slots


def test_without_redundancy_assignment_is_the_identity() -> None:
    where = Placement(2, 4, np.arange(4, dtype=np.int32))
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3]], dtype=torch.int32)
    assert torch.equal(RouteTables(where, rank=0, choice=ReplicaChoice.ROUND_ROBIN).route(ids, offset=0), ids)


def test_tables_keep_their_addresses() -> None:
    tables = RouteTables(placement(6, 2, 4, seed=1), rank=0, choice=ReplicaChoice.LOCAL_FIRST)
    before = [t.data_ptr() for t in (tables._count, tables._start, tables._slots)]
    tables.set(placement(6, 2, 4, seed=2))
    assert [t.data_ptr() for t in (tables._count, tables._start, tables._slots)] == before


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 60), st.integers(0, 5), st.integers(0, 10**6))
def test_local_first_never_leaves_a_rank_that_has_the_expert(k: int, tokens: int, rank: int, seed: int) -> None:
    where = placement(12, 6, 4, seed)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 12, (tokens, k), dtype=np.int32))
    slots = RouteTables(where, rank=rank, choice=ReplicaChoice.LOCAL_FIRST).route(ids, offset=rank)
    own = set(where.slot_to_expert[where.rank_slots(rank)].tolist())
    for expert, slot in zip(ids.reshape(-1).tolist(), slots.reshape(-1).tolist(), strict=True):
        if expert in own:
            assert slot // where.slots_per_rank == rank

"""Counting and folding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.balancer.statistics import AllReduce, LoadWindow, accumulate, require_ids_shape
from moe_eplb.core.errors import BalancerError
from tests.support.ranks import run_ranks


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 130), st.lists(st.integers(-3, 140), max_size=60))
def test_counts_any_number_of_experts_and_ignores_ids_out_of_range(experts: int, ids: list[int]) -> None:
    counts = torch.zeros(experts, dtype=torch.int32)
    accumulate(torch.tensor(ids, dtype=torch.int32).reshape(-1, 1), counts)
    assert counts.tolist() == [ids.count(e) for e in range(experts)]


def test_overflow_of_an_iterations_count_is_an_error() -> None:
    counts = torch.tensor([0, 2**31 - 1], dtype=torch.int32)
    with pytest.raises(BalancerError, match=r"expert 1 overflows[\s\S]*2147483648"):
        accumulate(torch.tensor([[1]]), counts)
    assert counts[1] == 2**31 - 1


def test_decayed_sum_bit_for_bit_against_float32_arithmetic_done_one_by_one() -> None:
    window, expected = LoadWindow(3, decay=0.95, window=1), np.zeros(3, dtype=np.float32)
    for step in range(20):
        counts = np.array([step * 7 + 1, 3, 1000 - step])
        window.fold(torch.from_numpy(counts))
        expected = np.float32(0.95) * expected
        expected = expected + counts.astype(np.float32)
    assert window.take().tolist() == expected.astype(np.float64).tolist()
    assert window.take().tolist() == [0.0, 0.0, 0.0]


def test_window_averages_the_last_counts() -> None:
    window = LoadWindow(1, decay=0.0, window=3)
    for value in (3, 6, 9, 12):
        window.fold(torch.tensor([value]))
    assert window.take().tolist() == [9.0]


def reduce_on(rank: int, size: int) -> list[int]:
    import torch.distributed as dist

    tensor = torch.tensor([2**40 + rank, rank, -rank], dtype=torch.int64)
    if size > 1:
        assert dist.group.WORLD is not None
        AllReduce(dist.group.WORLD)(tensor)
    return [int(value) for value in tensor]


@pytest.mark.parametrize("size", [2, 4])
def test_allreduce_is_the_exact_integer_sum(size: int) -> None:
    total = sum(range(size))
    assert run_ranks(reduce_on, size) == [[size * 2**40 + total, total, -total]] * size


@pytest.mark.parametrize("shape", [(3, 5), (3,), (3, 2, 1)])
def test_ids_of_another_shape_than_tokens_by_top_k_are_refused(shape: tuple[int, ...]) -> None:
    require_ids_shape(torch.zeros(0, 2), 0, top_k=2)
    with pytest.raises(BalancerError, match=r"E141(.|\n)*\(tokens, 2\)"):
        require_ids_shape(torch.zeros(shape), 0, top_k=2)

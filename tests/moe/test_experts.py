"""Grouping by slot, the grouped feed-forward against its slow twin, and slot storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core.errors import BalancerError
from moe_eplb.moe.experts import ExpertSlots, ffn_twin, group_by_slot, sum_over_k

HIDDEN, INTERMEDIATE, SLOTS = 24, 16, 5


def _experts(dtype: torch.dtype) -> ExpertSlots:
    experts = ExpertSlots(SLOTS, HIDDEN, INTERMEDIATE, dtype)
    generator = torch.Generator().manual_seed(0)
    for name in ("w3_w1", "w2"):
        weight = experts.weight(name)
        weight.copy_(torch.randn(weight.shape, generator=generator) / 4)
    return experts


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("slots", [[0, 0, 1, 4, 4, 4], [2] * 7, [], [3]])
def test_grouped_ffn_equals_its_twin(dtype: torch.dtype, tolerance: float, slots: list[int]) -> None:
    experts = _experts(dtype)
    hidden = torch.randn(len(slots), HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
    slot = torch.tensor(slots, dtype=torch.int32)
    offs = torch.bincount(slot, minlength=SLOTS).cumsum(0, dtype=torch.int32)
    got = experts.grouped_ffn(hidden, offs)
    wanted = ffn_twin(hidden, slot, experts.weight("w3_w1"), experts.weight("w2"))
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    if slots:
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_twin_computes_swiglu_with_w3_before_w1() -> None:
    w3, w1, w2 = torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.tensor([[3.0]])
    got = ffn_twin(torch.tensor([[4.0]]), torch.tensor([0]), torch.cat((w3, w1)).unsqueeze(0), w2.unsqueeze(0))
    gate = torch.tensor(0.5 * 4.0).double()
    assert got.item() == pytest.approx((3.0 * (gate * torch.sigmoid(gate) * 8.0)).item())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(-1, SLOTS - 1), min_size=3, max_size=3), max_size=9))
def test_group_by_slot_keeps_every_entry_once_in_order(table: list[list[int]]) -> None:
    slots = torch.tensor(table, dtype=torch.int32).view(-1, 3)
    wanted = sorted((s, row, k) for row, line in enumerate(table) for k, s in enumerate(line) if s >= 0)
    grouping = group_by_slot(slots, len(wanted), SLOTS)
    got = list(zip(grouping.slot.tolist(), grouping.row.tolist(), grouping.k.tolist(), strict=True))
    assert got == wanted
    assert grouping.offs.tolist() == [sum(s <= slot for s, _, _ in wanted) for slot in range(SLOTS)]
    assert grouping.offs.dtype == torch.int32


def test_sum_over_k_weights_entries_and_leaves_other_rows_zero() -> None:
    slots = torch.tensor([[1, -1], [-1, -1], [0, 1]], dtype=torch.int32)
    scales = torch.tensor([[0.5, 9.0], [9.0, 9.0], [2.0, 3.0]])
    grouping = group_by_slot(slots, 3, 2)
    output = torch.tensor([[10.0], [20.0], [30.0]])  # entries (row 2, k 0), (row 0, k 0), (row 2, k 1)
    assert sum_over_k(output, grouping, scales).tolist() == [[10.0], [0.0], [110.0]]


def test_sum_over_k_ignores_scales_of_rows_that_are_padding() -> None:
    grouping = group_by_slot(torch.tensor([[0], [-1]], dtype=torch.int32), 1, 1)
    total = sum_over_k(torch.ones(1, 2), grouping, torch.tensor([[1.0], [float("nan")]]))
    assert total.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_load_writes_the_storage_that_the_ffn_reads() -> None:
    experts = _experts(torch.float32)
    address = experts.weight("w2").data_ptr()
    before = experts.weight("w2")[2].clone()
    weights = {"w3_w1": torch.full((2 * INTERMEDIATE, HIDDEN), 1.5), "w2": torch.full((HIDDEN, INTERMEDIATE), 2.5)}
    experts.load(3, weights)
    assert torch.equal(experts.slot_tensor(3, "w2"), weights["w2"])
    assert torch.equal(experts.weight("w3_w1")[3], weights["w3_w1"])
    assert torch.equal(experts.weight("w2")[2], before)
    assert experts.weight("w2").data_ptr() == address
    assert experts.slot_tensor(0, "w2").data_ptr() == address


@pytest.mark.parametrize("weights", [{}, {"w3_w1": torch.zeros(2 * INTERMEDIATE, HIDDEN), "w2": torch.zeros(1)}])
def test_load_refuses_missing_or_misshapen_weights(weights: dict[str, torch.Tensor]) -> None:
    with pytest.raises(BalancerError, match="E153"):
        _experts(torch.float32).load(0, weights)


@pytest.mark.parametrize(
    ("hidden", "intermediate", "dtype", "hint"),
    [(10, 16, torch.float32, "such as 12"), (16, 4, torch.bfloat16, "such as 8"), (0, 8, torch.float32, "such as 4")],
)
def test_sizes_that_grouped_gemm_cannot_read_are_refused(
    hidden: int, intermediate: int, dtype: torch.dtype, hint: str
) -> None:
    with pytest.raises(BalancerError, match=f"E152(.|\n)*{hint}"):
        ExpertSlots(1, hidden, intermediate, dtype)

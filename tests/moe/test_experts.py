"""Grouping by slot, the grouped feed-forward against its slow twin, and slot storage."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.core.errors import BalancerError
from moe_eplb.device import ops
from moe_eplb.moe import experts as experts_module
from moe_eplb.moe.experts import ExpertSlots, ffn_twin
from moe_eplb.moe.grouping import Grouped, entries_of, group_by_slot, sum_over_k

HIDDEN, INTERMEDIATE, SLOTS = 24, 16, 5


def _experts(dtype: torch.dtype, spare: int = 0) -> ExpertSlots:
    experts = ExpertSlots(SLOTS, HIDDEN, INTERMEDIATE, dtype, spare=spare)
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
    got = experts.grouped_ffn(Grouped(hidden, torch.arange(len(slots)), offs))
    wanted = ffn_twin(hidden, slot, experts.weight("w3_w1"), experts.weight("w2"))
    assert got.shape == wanted.shape
    assert got.dtype == dtype
    if slots:
        assert (got.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize(
    ("rows", "likely", "each"),
    [(50, None, 10), (51, None, None), (51, 45, 9), (50, 51, None), (3, 0, 0), (0, None, 0), (40, None, 8)],
)
def test_few_rows_a_slot_go_through_products_of_their_own(
    rows: int, likely: int | None, each: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = _experts(torch.float32)
    slots = (torch.arange(rows, dtype=torch.int32) % SLOTS).view(-1, 1)
    hidden = torch.randn(rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    by_torch = experts.grouped_ffn(experts.group(hidden, slots, likely=likely))
    seen: list[int] = []
    first, second = ops.grouped_swiglu, ops.grouped_product
    monkeypatch.setattr(experts, "_few_rows", 10)
    monkeypatch.setattr(ops, "grouped_swiglu", lambda *given: (seen.append(given[2].rows), first(*given))[1])
    monkeypatch.setattr(ops, "grouped_product", lambda *given: (seen.append(given[2].rows), second(*given))[1])
    assert torch.allclose(experts.grouped_ffn(experts.group(hidden, slots, likely=likely)), by_torch, atol=1e-5)
    assert seen == ([] if each is None else [16 if each <= 8 else 32] * 2)


@pytest.mark.parametrize(
    ("kind", "capability", "taken"), [("cuda", (9, 0), True), ("cuda", (8, 9), False), ("cuda", (10, 0), False),
                                      ("cpu", (9, 0), False)],
)  # fmt: skip
def test_only_a_device_that_they_were_cut_for_takes_products_of_few_rows(
    kind: str, capability: tuple[int, int], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    assert experts_module._is_hopper(torch.device(kind)) is taken
    assert not experts_module._is_hopper(None)


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


@settings(max_examples=40, deadline=None)
@given(
    table=st.lists(st.lists(st.integers(-1, SLOTS + 1), min_size=3, max_size=3), max_size=9),
    cells=st.permutations(range(SLOTS + 2)),
    exact=st.booleans(),
)
def test_entries_are_grouped_by_the_cells_that_hold_their_slots(
    table: list[list[int]], cells: list[int], exact: bool
) -> None:
    experts = _experts(torch.float32, spare=2)
    experts.slot_cells.copy_(torch.tensor(cells[:SLOTS]))
    slots = torch.tensor(table, dtype=torch.int32).view(-1, 3)
    hidden = torch.arange(float(len(table) * HIDDEN)).view(-1, HIDDEN)
    wanted = sorted(
        (cells[s], row, k, s) for row, line in enumerate(table) for k, s in enumerate(line) if 0 <= s < SLOTS
    )
    rows, position, offs, *_ = experts.group(hidden, slots, len(wanted) if exact else None)
    found = entries_of(slots, position, offs)
    assert list(zip(found.row.tolist(), found.k.tolist(), found.slot.tolist(), strict=True)) == [e[1:] for e in wanted]
    assert torch.equal(rows[: len(wanted)], hidden[found.row])
    assert len(rows) == (len(wanted) if exact else slots.numel())
    assert offs.tolist() == [sum(entry[0] <= cell for entry in wanted) for cell in range(SLOTS + 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_after_the_last_end_change_nothing(dtype: torch.dtype) -> None:
    experts = _experts(dtype, spare=1)
    slots = torch.tensor([[0, 3], [-1, 9], [3, -1]], dtype=torch.int32)
    hidden = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(4)).to(dtype)
    scales = torch.rand(3, 2)
    outputs = []
    for entries in (3, None):
        grouped = experts.group(hidden, slots, entries)
        grouped.rows[3:] = float("nan")
        output = experts.grouped_ffn(grouped)
        output[3:] = float("nan")
        outputs.append(sum_over_k(output, grouped.position, scales))
    assert torch.equal(outputs[0], outputs[1])
    assert outputs[0].abs().sum(dim=1).gt(0).tolist() == [True, False, True]


def test_slots_are_looked_up_in_their_cells_when_asked() -> None:
    experts = _experts(torch.float32, spare=2)
    slots = experts.by_slot()
    assert [slot["w2"].data_ptr() for slot in slots] == [experts.cell_tensor(c, "w2").data_ptr() for c in range(SLOTS)]
    table = experts.slot_cells.data_ptr()
    experts.slot_cells.copy_(torch.tensor([6, 1, 0, 3, 5]))
    assert experts.slot_cells.data_ptr() == table
    for slot, cell in enumerate([6, 1, 0, 3, 5]):
        assert slots[slot]["w3_w1"].data_ptr() == experts.cell_tensor(cell, "w3_w1").data_ptr()
        assert torch.equal(experts.slot_tensor(slot, "w2"), experts.weight("w2")[cell])


def test_a_slot_computes_with_the_weights_of_its_cell() -> None:
    experts = _experts(torch.float32, spare=2)
    experts.slot_cells.copy_(torch.tensor([6, 1, 0, 3, 5]))
    slots = torch.tensor([[0, 4], [2, 1], [3, 0]], dtype=torch.int32)
    hidden, scales = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(5)), torch.ones(3, 2)
    grouped = experts.group(hidden, slots)
    got = sum_over_k(experts.grouped_ffn(grouped), grouped.position, scales)
    cells = experts.slot_cells[slots.long()].flatten()
    weights = [experts.weight(name) for name in ("w3_w1", "w2")]
    wanted = ffn_twin(hidden.repeat_interleave(2, dim=0), cells, *weights).view(3, 2, -1).sum(1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("first", [0, 5])
@pytest.mark.parametrize(("likely", "few"), [(5, True), (6, False), (None, False)])
def test_few_rows_are_grouped_by_slot_and_multiplied_by_the_weights_of_their_cells(
    likely: int | None, few: bool, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = _experts(torch.float32, spare=2)
    experts.slot_cells.copy_(torch.tensor([6, 1, 0, 3, 5]))
    slots = torch.tensor([[0, 4], [2, 1], [3, 0], [-1, 7]], dtype=torch.int32)
    hidden, scales = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(5)), torch.ones(4, 2)
    grouped = experts.group(hidden, slots)
    wanted = sum_over_k(experts.grouped_ffn(grouped), grouped.position, scales)
    monkeypatch.setattr(experts, "_few_rows", 1)
    grouped = experts.group(hidden, (slots + first).int(), first_slot=first, likely=likely)
    assert grouped.offs.tolist() == ([2, 3, 4, 5, 6] if few else [1, 2, 2, 3, 3, 4, 6])
    assert (grouped.parts is not None) is few
    found = sum_over_k(experts.grouped_ffn(grouped), grouped.position, scales)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    experts.slot_cells[0] = 2
    again = sum_over_k(experts.grouped_ffn(grouped), grouped.position, scales)
    assert torch.equal(again, found), "the cells are those of when the entries were grouped"


def test_sum_over_k_weights_entries_and_leaves_other_rows_zero() -> None:
    slots = torch.tensor([[1, -1], [-1, -1], [0, 1]], dtype=torch.int32)
    scales = torch.tensor([[0.5, 9.0], [9.0, 9.0], [2.0, 3.0]])
    grouping = group_by_slot(slots, 3, 2)
    output = torch.tensor([[10.0], [20.0], [30.0]])  # entries (row 2, k 0), (row 0, k 0), (row 2, k 1)
    assert sum_over_k(output, grouping.position, scales).tolist() == [[10.0], [0.0], [110.0]]
    assert sum_over_k(output, grouping.position, scales, torch.bfloat16).dtype is torch.bfloat16


def test_sum_over_k_ignores_scales_of_rows_that_are_padding() -> None:
    grouping = group_by_slot(torch.tensor([[0], [-1]], dtype=torch.int32), 1, 1)
    total = sum_over_k(torch.ones(1, 2), grouping.position, torch.tensor([[1.0], [float("nan")]]))
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

"""Every Triton kernel equals its plain twin; on a machine without a GPU under Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from moe_eplb.device.ops import Parts, plain
from moe_eplb.device.ops.plain_parts import parts_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
from moe_eplb.device.ops import triton_group, triton_ops  # noqa: E402

EXPERTS = (1, 8, 64, 129, 256, 1000)
BOTH = [torch.float32, torch.bfloat16]


def _ids(entries: int, experts: int, seed: int = 0, top_k: int = 2) -> torch.Tensor:
    """Skewed ids [T, K], some of them outside [0, E) on either side."""
    generator = torch.Generator().manual_seed(seed)
    ids = (torch.rand(entries, top_k, generator=generator) ** 2 * (experts + 2)).int() - 1
    return ids.to(DEVICE)


def _randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


# -- histogram -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [0, 1, 700, 1500])
@pytest.mark.parametrize("experts", EXPERTS)
def test_histogram(entries: int, experts: int) -> None:
    ids = _ids(entries, experts)
    counts = [torch.full((experts,), 3, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    plain.histogram(ids, counts[0])
    triton_ops.histogram(ids, counts[1])
    assert counts[0].tolist() == counts[1].tolist()
    assert int(counts[0].sum()) - 3 * experts == int(((ids >= 0) & (ids < experts)).sum())


def test_histogram_writes_nothing_beyond_the_counts() -> None:
    memory = torch.zeros(131, dtype=torch.int32, device=DEVICE)
    triton_ops.histogram(_ids(900, 129), memory[1:130])
    assert memory[0] == memory[130] == 0


# -- route -----------------------------------------------------------------------------------------------------------


def _tables(experts: int, slots: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    owner = torch.cat((torch.arange(experts), torch.randint(0, experts, (slots - experts,)))).sort().values
    count = torch.bincount(owner, minlength=experts).int()
    start = (count.cumsum(0) - count).int()
    return count.to(DEVICE), start.to(DEVICE), torch.randperm(slots).int().to(DEVICE)


@pytest.mark.parametrize("extra", [0, 7])
@pytest.mark.parametrize("entries", [0, 5, 600, 1600])
@pytest.mark.parametrize("experts", EXPERTS)
def test_route(entries: int, experts: int, extra: int) -> None:
    torch.manual_seed(experts)
    tables = _tables(experts, experts + extra)
    ids = _ids(entries, experts)
    wanted = plain.route(ids, *tables, offset=3, invalid=experts + 7)
    assert triton_ops.route(ids, *tables, offset=3, invalid=experts + 7).tolist() == wanted.tolist()


@pytest.mark.parametrize("entries", [5, 600, 1600])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("hot", [False, True])
def test_route_counts_beside(entries: int, experts: int, hot: bool) -> None:
    tables = _tables(experts, experts + 7)
    ids = _ids(entries, experts)
    if hot:
        ids = torch.where(ids % 3 > 0, experts - 1, ids)
    counts = [torch.full((experts + 2,), 3, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    routed = [
        ops.route(ids, *tables, offset=3, invalid=experts + 7, counts=found[1:-1]).tolist()
        for ops, found in zip((plain, triton_ops), counts, strict=True)
    ]
    assert routed[0] == routed[1] == plain.route(ids, *tables, offset=3, invalid=experts + 7).tolist()
    assert counts[0].tolist() == counts[1].tolist()
    assert counts[1][0] == counts[1][-1] == 3, "nothing is written beyond the counts"
    assert int((counts[1] - 3).sum()) == int(((ids >= 0) & (ids < experts)).sum())


def test_numbers_that_do_not_fit_32_bits_are_no_experts() -> None:
    ids = torch.tensor([[2**32 + 1, 1], [1, -(2**32) + 1]], device=DEVICE)
    tables = _tables(4, 11)
    wanted = plain.route(ids, *tables, offset=0, invalid=99)
    assert triton_ops.route(ids, *tables, offset=0, invalid=99).tolist() == wanted.tolist()
    counts = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    triton_ops.histogram(ids, counts)
    assert counts.tolist() == [0, 2, 0, 0]
    assert triton_ops.permute(ids, 4)[0].tolist() == [[-1, 0], [1, -1]]


# -- top-k -----------------------------------------------------------------------------------------------------------

METHODS: tuple[plain.Choice, ...] = ("default", "renormalize_naive", "renormalize", "sigmoid")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(0, 4, 2), (1, 1, 1), (9, 8, 2), (19, 129, 8), (5, 1000, 10), (33, 60, 6), (3, 5, 5)]
)
def test_top_k(tokens: int, experts: int, k: int, dtype: torch.dtype, method: plain.Choice) -> None:
    # Every token has all of E values, half a unit or more apart, so that rounding cannot change the choice.
    order = _randn(tokens, experts).argsort(dim=1)
    logits = (order.float() * 0.5 - 3).clamp(-30, 600).to(dtype) * (0.125 if experts > 100 else 1)
    wanted_ids, wanted = plain.top_k(logits, k, method)
    ids, scales = triton_ops.top_k(logits, k, method)
    assert (ids.dtype, scales.dtype) == (torch.int32, torch.float32)
    torch.testing.assert_close(scales, wanted, rtol=2e-6, atol=1e-8)
    # bfloat16 makes neighbours equal; both then take the lower id.
    assert ids.tolist() == wanted_ids.tolist()


@pytest.mark.parametrize("method", METHODS)
def test_top_k_takes_the_lower_id_of_equal_logits(method: plain.Choice) -> None:
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0], [0.0, 2.0, -0.0, 2.0, 1.0], [-0.0, 0.0, -1, -1, 0.0]])
    for twin in (plain, triton_ops):
        assert twin.top_k(logits.to(DEVICE), 3, method)[0].tolist() == [[0, 1, 2], [1, 3, 4], [0, 1, 4]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("method", METHODS)
def test_top_k_of_infinite_and_undefined_logits_still_chooses_different_experts(method: plain.Choice) -> None:
    inf, nan = float("inf"), float("nan")
    logits = torch.tensor([[-inf, -inf, -inf, -inf], [-inf, 1.0, -inf, -inf], [nan, 1.0, nan, nan], [nan] * 4])
    for twin in (plain, triton_ops):
        ids, _ = twin.top_k(logits.to(DEVICE), 3, method)
        assert all(len(set(chosen)) == 3 and set(chosen) <= {0, 1, 2, 3} for chosen in ids.tolist())
        assert ids[1].tolist() == [1, 0, 2]


# -- grouping --------------------------------------------------------------------------------------------------------


def _cells(slots: int, cells: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(slots)
    return torch.randperm(cells, generator=generator)[:slots].int().to(DEVICE)


@pytest.mark.parametrize("spare", [None, 0, 3])
@pytest.mark.parametrize("rows", [0, 3, 520, 1100])
@pytest.mark.parametrize("slots", [1, 5, 36, 130])
def test_permute(rows: int, slots: int, spare: int | None) -> None:
    local = _ids(rows, slots, top_k=3)
    groups = slots + (spare or 0)
    cells = None if spare is None else _cells(slots, groups)
    position, offs = plain.permute(local, groups, cells)
    fast_position, fast_offs = triton_ops.permute(local, groups, cells)
    assert fast_offs.tolist() == offs.tolist()
    assert fast_position.tolist() == position.tolist()
    placed = position[position >= 0]
    assert sorted(placed.tolist()) == list(range(len(placed)))
    assert len(placed) == int(((local >= 0) & (local < slots)).sum())


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("spare", [None, 3])
@pytest.mark.parametrize("first", [1, 5, 2000])
def test_slots_are_counted_from_the_first(
    monkeypatch: pytest.MonkeyPatch, first: int, spare: int | None, small: int
) -> None:
    monkeypatch.setattr(triton_group, "_SMALL", small)
    local, groups = _ids(37, 20, top_k=8), 20 + (spare or 0)
    given, cells = (local + first).int(), None if spare is None else _cells(20, groups)
    hidden = _randn(37, 24, dtype=torch.float32)
    wanted = plain.permute_rows(hidden, local, groups, cells)
    for twin in (plain, triton_ops):
        found = twin.permute_rows(hidden, given, groups, cells, first_slot=first)
        position, offs = twin.permute(given, groups, cells, first)
        last = int(offs[-1])
        assert found[1].tolist() == position.tolist() == wanted[1].tolist()
        assert found[2].tolist() == offs.tolist() == wanted[2].tolist()
        assert torch.equal(found[0][:last], wanted[0][:last])


def test_a_cell_that_does_not_exist_takes_nothing() -> None:
    local, cells = _ids(40, 3), torch.tensor([1, 7, -1], dtype=torch.int32, device=DEVICE)
    for twin in (plain, triton_ops):
        position, offs = twin.permute(local, 5, cells)
        assert torch.equal(position >= 0, local == 0)
        assert offs.tolist() == [0] + [int((local == 0).sum())] * 4


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("rows", "top_k", "width", "slots", "spare"),
    [(0, 2, 8, 4, None), (1, 1, 8, 1, 0), (37, 8, 64, 20, 2), (50, 3, 300, 33, None), (40, 8, 24, 7, 3)],
)
def test_permute_rows(
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    top_k: int,
    width: int,
    slots: int,
    spare: int | None,
    dtype: torch.dtype,
    small: int,
) -> None:
    monkeypatch.setattr(triton_group, "_SMALL", small)
    monkeypatch.setattr(triton_group, "_TILE", 64)  # so that few entries are several tiles
    local, groups = _ids(rows, slots, top_k=top_k), slots + (spare or 0)
    cells = None if spare is None else _cells(slots, groups)
    hidden = _randn(rows, width + 5, dtype=dtype)[:, :width]  # rows with a stride, as they come out of a collective
    for entries in (None, int(((local >= 0) & (local < slots)).sum())):
        wanted_rows, wanted, offs = plain.permute_rows(hidden, local, groups, cells, entries)
        found_rows, found, found_offs = triton_ops.permute_rows(hidden, local, groups, cells, entries)
        assert found.tolist() == wanted.tolist()
        assert found_offs.tolist() == offs.tolist()
        assert found_rows.shape == wanted_rows.shape == (local.numel() if entries is None else entries, width)
        assert torch.equal(found_rows[: int(offs[-1])], wanted_rows[: int(offs[-1])])


@pytest.mark.parametrize("small", [0, 4096])
@pytest.mark.parametrize(
    ("rows", "top_k", "slots", "part"), [(0, 2, 4, 16), (1, 1, 1, 16), (37, 8, 20, 16), (90, 1, 2, 32), (80, 4, 70, 64)]
)
def test_permute_in_parts(
    monkeypatch: pytest.MonkeyPatch, rows: int, top_k: int, slots: int, part: int, small: int
) -> None:
    monkeypatch.setattr(triton_group, "_SMALL", small)
    monkeypatch.setattr(triton_group, "_TILE", 64)
    local, cells = _ids(rows, slots, top_k=top_k), _cells(slots, slots + 3)
    hidden, given = _randn(rows, 24, dtype=torch.float32), (local + 5).int()
    for entries in (None, int(((local >= 0) & (local < slots)).sum())):
        wanted_rows, wanted, offs, wanted_parts = plain.permute_in_parts(hidden, local, cells, part, entries)
        found_rows, found, found_offs, parts = triton_ops.permute_in_parts(
            hidden, given, cells, part, entries, first_slot=5
        )
        assert found.tolist() == wanted.tolist()
        assert found_offs.tolist() == offs.tolist()
        last = int(offs[-1])
        assert torch.equal(found_rows[:last], wanted_rows[:last])
        _assert_same_parts(parts, wanted_parts)
    if rows > 1:  # fewer places than entries
        *_, offs, parts = triton_ops.permute_in_parts(hidden, local, cells, part, 10)
        _assert_same_parts(parts, parts_of(offs, cells, part, 10))


def _assert_same_parts(found: Parts, wanted: Parts) -> None:
    count = int(wanted.table[0, 0])
    assert found.table.shape == wanted.table.shape
    assert (found.rows, int(found.table[0, 0])) == (wanted.rows, count)
    assert found.table[1 : 1 + count].tolist() == wanted.table[1 : 1 + count].tolist()


@pytest.mark.parametrize("small", [0, 4096])
def test_permute_rows_writes_nothing_beyond_its_rows(monkeypatch: pytest.MonkeyPatch, small: int) -> None:
    """Fewer places are given than there are entries, inside memory that shows every other write."""
    monkeypatch.setattr(triton_group, "_SMALL", small)
    memory = torch.zeros(30, 8, device=DEVICE)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: memory[5:15] if size == (10, 8) else empty(*size, **kw))
    local = torch.zeros(20, 1, dtype=torch.int32, device=DEVICE)
    triton_ops.permute_rows(torch.ones(20, 8, device=DEVICE), local, 2, None, 10)
    assert memory.sum(dim=1).tolist() == [0.0] * 5 + [8.0] * 10 + [0.0] * 15


# -- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (37, 768), (3, 1100), (9, 512)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    x = _randn(rows, 2 * width, dtype=dtype)
    wanted, found = plain.swiglu(x), triton_ops.swiglu(x)
    assert found.dtype is dtype
    tolerance = 1e-6 if dtype is torch.float32 else 1e-2
    assert torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)
    offs = torch.tensor([0, rows // 2], dtype=torch.int32, device=DEVICE)
    assert torch.equal(triton_ops.swiglu(x, offs)[: rows // 2], found[: rows // 2])


@pytest.mark.parametrize("result", BOTH)
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 8), (40, 300), (9, 2048)])
def test_combine(rows: int, width: int, dtype: torch.dtype, result: torch.dtype) -> None:
    local = torch.randint(-1, 6, (rows, 4), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    position, offs = plain.permute(local, 6)
    # What no entry's place is may hold anything, and nothing of it may be read.
    output = torch.cat((_randn(int(offs[-1]), width, dtype=dtype), _randn(3, width, dtype=dtype) * float("nan")))
    scales = torch.rand(rows, 6, generator=torch.Generator().manual_seed(3)).to(DEVICE)[:, :4]
    scales[local < 0] = float("nan")
    wanted = plain.combine(output, position, scales, result)
    found = triton_ops.combine(output, position, scales, result)
    assert found.dtype is wanted.dtype is result
    tolerance = 1e-6 if result is torch.float32 else 1e-2
    assert torch.allclose(found.float(), wanted.float(), rtol=tolerance, atol=tolerance)
    for row in range(min(rows, 3)):
        mine = [float(scales[row, k]) * output[position[row, k]].float() for k in range(4) if position[row, k] >= 0]
        total = torch.stack(mine).sum(0) if mine else torch.zeros(width, device=DEVICE)
        assert torch.allclose(found[row].float(), total, rtol=tolerance, atol=max(tolerance, 1e-4))


@pytest.mark.parametrize(
    ("ranks", "rows", "tokens", "width"), [(1, 1, 1, 1), (2, 5, 3, 300), (3, 4, 0, 8), (4, 2, 2, 2048)]
)
def test_add_blocks(ranks: int, rows: int, tokens: int, width: int) -> None:
    blocks = _randn(ranks, rows, width, dtype=torch.bfloat16)
    for dtype in BOTH:
        wanted, found = plain.add_blocks(blocks, tokens, dtype), triton_ops.add_blocks(blocks, tokens, dtype)
        assert found.dtype is dtype
        # The interpreter cuts off where a GPU rounds.
        exact = dtype is torch.float32 or DEVICE == "cuda"
        torch.testing.assert_close(found, wanted, rtol=0 if exact else 1e-2, atol=0 if exact else 1e-2)
        if dtype is torch.float32:
            torch.testing.assert_close(found, blocks[:, :tokens].float().sum(0))


@pytest.mark.parametrize(
    ("tokens", "rows", "widths"), [(0, 3, (4, 1)), (5, 5, (1100, 8, 8, 3)), (2, 7, (3,)), (0, 0, (2,))]
)
def test_pack_rows(tokens: int, rows: int, widths: tuple[int, ...]) -> None:
    columns = [torch.full((tokens, width), 7 + i, dtype=torch.int32, device=DEVICE) for i, width in enumerate(widths)]
    for column in columns:
        column += torch.arange(tokens, dtype=torch.int32, device=DEVICE).unsqueeze(1) * 100
    wanted, found = (torch.zeros(rows, sum(widths) + 6, dtype=torch.int32, device=DEVICE) for _ in range(2))
    plain.pack_rows(columns, wanted)
    triton_ops.pack_rows(columns, found)
    assert torch.equal(found, wanted)
    assert (found[tokens:] == -1).all()
    assert (found[:, sum(widths) :] == -1).all()


@pytest.mark.parametrize("pack", [plain.pack_rows, triton_ops.pack_rows])
@pytest.mark.parametrize("shapes", [((3, 4), (2, 4)), ((3, 4), (3, 5)), ((3, 9),)])
def test_columns_that_do_not_fit_are_refused(pack: Any, shapes: tuple[tuple[int, int], ...]) -> None:
    columns = [torch.zeros(shape, dtype=torch.int32, device=DEVICE) for shape in shapes]
    with pytest.raises(ValueError, match="do not fit rows"):
        pack(columns, torch.zeros(3, 8, dtype=torch.int32, device=DEVICE))

"""The products of few rows equal their plain twins; on a machine without a GPU under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from moe_eplb.device import ops
from moe_eplb.device.ops import Parts, part_rows, plain
from moe_eplb.device.ops.plain_parts import parts_of
from moe_eplb.moe.grouped_mm import grouped_mm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
from moe_eplb.device.ops import triton_ffn  # noqa: E402
from moe_eplb.device.ops.triton_ffn import Tiles  # noqa: E402

# The interpreter multiplies bfloat16 wrongly, and a GPU multiplies float32 in fewer bits.
DTYPE, TOLERANCE = (torch.bfloat16, 1e-2) if DEVICE == "cuda" else (torch.float32, 1e-5)
ROWS = [[5, 0, 20], [0, 0, 17, 40, 1], [7], [0, 0], [16, 32, 16], [1] * 9]


def _given(rows: list[int], depth: int, width: int, left: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows with some behind the last end, weights [C, width, depth] and ends."""
    generator = torch.Generator().manual_seed(len(rows) + depth)
    x = torch.randn(sum(rows) + left, depth, generator=generator).to(DTYPE).to(DEVICE)
    weights = (torch.randn(len(rows), width, depth, generator=generator) * depth**-0.5).to(DTYPE).to(DEVICE)
    return x, weights, torch.tensor(rows).cumsum(0).int().to(DEVICE)


def _parts(
    ends: torch.Tensor, count: int, each: int = 8, cells: list[int] | None = None, rows: int | None = None
) -> Parts:
    table = torch.tensor(range(len(ends)) if cells is None else cells, dtype=torch.int32, device=DEVICE)
    return parts_of(ends, table, rows or part_rows(each), count)


def _assert_close(found: torch.Tensor, wanted: torch.Tensor, ends: torch.Tensor) -> None:
    last = int(ends[-1])
    assert found.dtype is DTYPE
    assert found.shape == wanted.shape
    assert torch.allclose(found[:last].float(), wanted[:last].float(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("depth", "width"), [(64, 32), (16, 8), (136, 72)])
def test_products_equal_their_twins(rows: list[int], depth: int, width: int) -> None:
    x, weights, ends = _given(rows, depth, width, 3)
    parts = _parts(ends, len(x))
    _assert_close(triton_ffn.grouped_product(x, weights, parts), plain.grouped_product(x, weights, parts), ends)
    _assert_close(triton_ffn.grouped_swiglu(x, weights, parts), plain.grouped_swiglu(x, weights, parts), ends)


@pytest.mark.parametrize("rows", ROWS)
def test_the_plain_product_is_each_groups_rows_times_its_weights(rows: list[int]) -> None:
    x, weights, ends = _given(rows, 64, 32, 3)
    found = plain.grouped_product(x, weights, _parts(ends, len(x)))
    begin = 0
    for weight, end in zip(weights, ends.tolist(), strict=True):
        wanted = x[begin:end].float() @ weight.float().T
        assert torch.allclose(found[begin:end].float(), wanted, rtol=TOLERANCE, atol=TOLERANCE)
        begin = end


@pytest.mark.parametrize("cells", [[2, 0, 4], [1, 1, 3]])
def test_a_group_has_the_weights_of_its_cell(cells: list[int]) -> None:
    x, _, ends = _given([5, 40, 20], 64, 32, 3)
    weights = _given([0] * 5, 64, 32, 0)[1]
    wanted = plain.grouped_product(x, weights[cells], _parts(ends, len(x)))
    parts = _parts(ends, len(x), cells=cells)
    for twin in (plain, triton_ffn):
        _assert_close(twin.grouped_product(x, weights, parts), wanted, ends)
        _assert_close(twin.grouped_swiglu(x, weights, parts), plain.swiglu(wanted), ends)


def test_rows_of_a_cell_that_does_not_exist_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.full((32, 32), 7.0, dtype=DTYPE, device=DEVICE)
    x, _, ends = _given([5, 20, 3, 4], 64, 32, 0)
    weights = _given([0] * 5, 64, 32, 0)[1]
    parts = _parts(ends, len(x), cells=[2, -1, 5, 4])
    wanted = plain.grouped_product(x, weights, parts)
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: memory)
    found = triton_ffn.grouped_product(x, weights, parts)
    assert found[5:28].eq(7).all()
    for there in (slice(0, 5), slice(28, 32)):
        assert torch.allclose(found[there].float(), wanted[there].float(), rtol=TOLERANCE, atol=TOLERANCE)


def test_there_may_be_more_groups_than_weights() -> None:
    x, _, ends = _given([5, 0, 20, 3, 4, 1, 1, 2, 9], 64, 32, 0)
    weights = _given([0] * 2, 64, 32, 0)[1]
    cells = [1, 0, 0, 1, 0, 1, 1, 0, 1]
    wanted = plain.grouped_product(x, weights[cells], _parts(ends, len(x)))
    _assert_close(triton_ffn.grouped_product(x, weights, _parts(ends, len(x), cells=cells)), wanted, ends)


@pytest.mark.parametrize("tiles", [Tiles(16, 64, 32, 4, 2), Tiles(32, 128, 16, 8, 3), Tiles(64, 64, 64, 4, 4)])
@pytest.mark.parametrize("gated", [False, True])
def test_however_they_are_cut(tiles: Tiles, gated: bool) -> None:
    x, weights, ends = _given([33, 0, 70], 64, 256, 0)
    parts = _parts(ends, len(x), rows=tiles.rows)
    wanted = (plain.grouped_swiglu if gated else plain.grouped_product)(x, weights, parts)
    _assert_close(triton_ffn.launch(x, weights, parts, tiles, gated=gated), wanted, ends)


@pytest.mark.parametrize(
    ("each", "rows"), [(0, 16), (1, 16), (8, 16), (9, 32), (17, 64), (32, 64), (33, 128), (5000, 128)]
)
def test_most_groups_are_one_part(each: int, rows: int) -> None:
    assert part_rows(each) == rows
    assert {triton_ffn.tiles(rows, gated=gated).rows for gated in (False, True)} == {rows}


@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU: numpy's sums depend on the size, other GPUs' on the kernel")
@pytest.mark.parametrize("each", [8, 16, 32, 128])
@pytest.mark.parametrize(("depth", "width"), [(512, 256), (264, 144)])
def test_a_row_has_the_bits_of_torchs_product(depth: int, width: int, each: int) -> None:
    x, weights, ends = _given([40, 0, 300, 1], depth, width, 0)
    torchs = grouped_mm(x, weights.transpose(1, 2), offs=ends)
    parts = _parts(ends, len(x), each)
    assert torch.equal(triton_ffn.grouped_product(x, weights, parts), torchs)
    assert torch.equal(triton_ffn.grouped_swiglu(x, weights, parts), ops.swiglu(torchs))


def test_a_group_that_ends_beyond_the_rows_ends_with_them() -> None:
    x, weights, _ = _given([5, 20, 3], 64, 32, 0)
    longer = parts_of(torch.tensor([5, 40, 60]), torch.arange(3), 16, 60)
    parts = Parts(longer.table.to(DEVICE), 16)
    wanted = plain.grouped_product(x, weights, _parts(torch.tensor([5, 28, 28]).int().to(DEVICE), len(x)))
    _assert_close(triton_ffn.grouped_product(x, weights, parts), wanted, torch.tensor([28]))


def test_what_stands_behind_the_last_part_is_nothing() -> None:
    x, weights, ends = _given([5, 20, 3], 64, 32, 9)
    parts = _parts(ends, len(x))
    wanted = triton_ffn.grouped_product(x, weights, parts)
    count = int(parts.table[0, 0])
    assert len(parts.table) > 1 + count
    parts.table[1 + count :] = torch.tensor([0, 0, len(x), count], dtype=torch.int32, device=DEVICE)
    last = int(ends[-1])
    assert torch.equal(triton_ffn.grouped_product(x, weights, parts)[:last], wanted[:last])


def test_what_is_not_in_one_piece_is_refused() -> None:
    x, weights, ends = _given([5, 20, 3], 64, 64, 0)
    parts = _parts(ends, len(x))
    with pytest.raises(AssertionError, match="copied"):
        triton_ffn.grouped_product(x, weights.transpose(1, 2), parts)
    with pytest.raises(AssertionError, match="lies behind"):
        triton_ffn.grouped_product(x, weights, Parts(parts.table.repeat_interleave(2, dim=1)[:, ::2], parts.rows))
    with pytest.raises(AssertionError, match="a part"):
        triton_ffn.launch(x, weights, parts, triton_ffn.tiles(32, gated=False), gated=False)


def test_nothing_is_written_behind_the_last_end(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.full((40, 16), 7.0, dtype=DTYPE, device=DEVICE)
    x, weights, ends = _given([5, 20], 64, 32, 15)
    parts = _parts(ends, len(x))
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: memory)
    triton_ffn.grouped_swiglu(x, weights, parts)
    assert memory[25:].eq(7).all()
    assert not memory[:25].eq(7).all(dim=1).any()

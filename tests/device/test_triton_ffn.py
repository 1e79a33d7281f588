"""The products of few rows equal their plain twins; on a machine without a GPU under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

from moe_eplb.device.ops import plain

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def _assert_close(found: torch.Tensor, wanted: torch.Tensor, ends: torch.Tensor) -> None:
    last = int(ends[-1])
    assert found.dtype is DTYPE
    assert found.shape == wanted.shape
    assert torch.allclose(found[:last].float(), wanted[:last].float(), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("depth", "width"), [(64, 32), (16, 8), (136, 72)])
def test_products_equal_their_twins(rows: list[int], depth: int, width: int) -> None:
    x, weights, ends = _given(rows, depth, width, 3)
    _assert_close(triton_ffn.grouped_product(x, weights, ends), plain.grouped_product(x, weights, ends), ends)
    _assert_close(triton_ffn.grouped_swiglu(x, weights, ends), plain.grouped_swiglu(x, weights, ends), ends)


@pytest.mark.parametrize("tiles", [Tiles(16, 64, 32, 4, 2), Tiles(32, 128, 16, 8, 3), Tiles(64, 64, 64, 4, 4)])
@pytest.mark.parametrize("gated", [False, True])
def test_however_they_are_cut(tiles: Tiles, gated: bool) -> None:
    x, weights, ends = _given([33, 0, 70], 64, 256, 0)
    wanted = (plain.grouped_swiglu if gated else plain.grouped_product)(x, weights, ends)
    _assert_close(triton_ffn.launch(x, weights, ends, gated, tiles), wanted, ends)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: numpy multiplies otherwise for other sizes")
def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    x, weights, ends = _given([40, 40], 64, 32, 0)
    every = triton_ffn.grouped_swiglu(x, weights, ends)
    alone = triton_ffn.grouped_swiglu(x[57:58], weights, torch.tensor([0, 1], dtype=torch.int32, device=DEVICE))
    assert torch.equal(alone[0], every[57])


def test_nothing_is_written_behind_the_last_end(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.full((40, 16), 7.0, dtype=DTYPE, device=DEVICE)
    monkeypatch.setattr(torch, "empty", lambda *size, **kw: memory)
    x, weights, ends = _given([5, 20], 64, 32, 15)
    triton_ffn.grouped_swiglu(x, weights, ends)
    assert memory[25:].eq(7).all()
    assert not memory[:25].eq(7).all(dim=1).any()


@pytest.mark.parametrize("rows", ROWS)
def test_the_first_product_is_swiglu_of_the_plain_one(rows: list[int]) -> None:
    x, weights, ends = _given(rows, 64, 32, 2)
    apart = plain.swiglu(plain.grouped_product(x, weights, ends))
    _assert_close(plain.grouped_swiglu(x, weights, ends), apart, ends)

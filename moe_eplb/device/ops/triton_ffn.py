"""The experts' two products as Triton kernels for few rows an expert, where time goes by how fast weights are read.

torch's grouped product computes tiles of 256 rows, of which a decode step has 8 in an expert. Here a tile has room for
twice an expert's mean, so that most need one, and for 128 rows at most; the weights' rows are the wide side of the
matrix instruction, and SwiGLU is computed before the first product is written to memory. A row's result depends neither
on the rows beside it nor on how work is cut.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.triton_rows import silu_times
from moe_eplb.device.sanitizer import declares

__all__ = ["Tiles", "grouped_product", "grouped_swiglu", "launch", "tiles"]


class Tiles(NamedTuple):
    """How a product is cut: rows and results of a program, values that it adds at a time, and what it runs in."""

    rows: int
    results: int
    depth: int
    warps: int
    stages: int


_GATED = {16: (64, 128, 4, 3), 32: (64, 64, 4, 4), 64: (64, 64, 4, 4), 128: (128, 64, 8, 4)}
_PLAIN = _GATED | {128: (128, 64, 8, 3)}
"""By the rows of a tile, the fastest on an H200 of six to ten that were tried; `benchmarks.gpu.few_rows` compares the
tiles."""


def grouped_swiglu(rows: Tensor, w3_w1: Tensor, offs: Tensor, each: int, cells: Tensor | None = None) -> Tensor:
    """See `plain_ffn.grouped_swiglu`."""
    return launch(rows, w3_w1, offs, tiles(each, gated=True), gated=True, cells=cells)


def grouped_product(rows: Tensor, weights: Tensor, offs: Tensor, each: int, cells: Tensor | None = None) -> Tensor:
    """See `plain_ffn.grouped_product`."""
    return launch(rows, weights, offs, tiles(each, gated=False), gated=False, cells=cells)


def tiles(each: int, *, gated: bool) -> Tiles:
    """How a product is cut where a group has `each` rows on average: in tiles of twice as many, 16 to 128."""
    cuts = _GATED if gated else _PLAIN
    rows = min(max(cuts), max(min(cuts), triton.next_power_of_2(2 * each)))
    return Tiles(rows, *cuts[rows])


def launch(
    rows: Tensor, weights: Tensor, offs: Tensor, cut: Tiles, *, gated: bool, cells: Tensor | None = None
) -> Tensor:
    """Either product, cut so."""
    table, ends = offs if cells is None else cells, len(offs)
    assert weights.is_contiguous(), "they are too large to be copied"
    assert offs.is_contiguous(), "one end lies behind the other"
    assert table.is_contiguous(), "one cell lies behind the other"
    assert ends == (len(weights) if cells is None else len(cells)), "each group has one"
    width, depth = weights.shape[1] // (1 + gated), weights.shape[2]
    result = torch.empty(len(rows), width, dtype=rows.dtype, device=rows.device)
    if not result.numel():
        return result
    most = len(rows) // cut.rows + min(ends, len(rows))
    _products[(most * triton.cdiv(width, cut.results),)](
        rows.contiguous(), weights, offs, table, result, len(rows), ends, len(weights), width, depth=depth, gated=gated,
        mapped=cells is not None, groups=triton.next_power_of_2(ends), tile=cut.rows, results=cut.results,
        block=cut.depth, whole=width % cut.results == 0 and depth % cut.depth == 0, stages=cut.stages,
        num_warps=cut.warps,
    )  # fmt: skip
    return result


@declares(writes=["result"])
@triton.jit(do_not_specialize=["count", "ends", "cells"])
def _products(
    rows, weights, offs, table, result, count, ends, cells, width, depth: tl.constexpr, gated: tl.constexpr,
    mapped: tl.constexpr, groups: tl.constexpr, tile: tl.constexpr, results: tl.constexpr, block: tl.constexpr,
    whole: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    cell, first, end, slice_ = _part_of(
        tl.program_id(0), offs, table, count, ends, tl.cdiv(width, results), mapped, groups, tile
    )
    if (cell >= 0) & (cell < cells):
        row, at = first + tl.arange(0, tile), tl.arange(0, block)
        out = slice_ * results + tl.arange(0, results)
        matrix = weights + cell.to(tl.int64) * width * depth * (2 if gated else 1)
        there = row < end
        left = rows + row.to(tl.int64)[:, None] * depth + at[None, :]
        up = matrix + out.to(tl.int64)[:, None] * depth + at[None, :]
        gate = up + tl.cast(width, tl.int64) * depth
        summed, gating = tl.zeros([results, tile], dtype=tl.float32), tl.zeros([results, tile], dtype=tl.float32)
        for begin in tl.range(0, depth, block, num_stages=stages):
            if whole:
                x, w = tl.load(left + begin, mask=there[:, None], other=0.0), tl.load(up + begin)
            else:
                inside = at < depth - begin
                held = (out < width)[:, None] & inside[None, :]
                x = tl.load(left + begin, mask=there[:, None] & inside[None, :], other=0.0)
                w = tl.load(up + begin, mask=held, other=0.0)
            summed = tl.dot(w, tl.trans(x), summed)
            if gated:
                g = tl.load(gate + begin) if whole else tl.load(gate + begin, mask=held, other=0.0)
                gating = tl.dot(g, tl.trans(x), gating)
        kept: tl.constexpr = result.dtype.element_ty
        if gated:  # rounded as a product that is written to memory is, so that it has the same bits
            up_value, gate_value = summed.to(kept).to(tl.float32), gating.to(kept).to(tl.float32)
            summed = silu_times(gate_value, up_value)
        place = result + row.to(tl.int64)[None, :] * width + out[:, None]
        tl.store(place, summed.to(kept), mask=there[None, :] & (out < width)[:, None])


@triton.jit
def _part_of(
    number, offs, table, count, ends, slices, mapped: tl.constexpr, groups: tl.constexpr, tile: tl.constexpr
):  # fmt: skip
    """A program's cell, first row, end of its group's rows, and slice of the results; beyond the last a cell that is
    not there.

    Programs of one group follow each other, and of them those that read the same weights. The table of cells is read
    as a whole, beside the ends and not behind them.
    """
    group = tl.arange(0, groups)
    end = tl.minimum(tl.load(offs + group, mask=group < ends, other=0), count)
    begin = tl.minimum(tl.load(offs + group - 1, mask=(group > 0) & (group < ends), other=0), count)
    cell = tl.load(table + group, mask=group < ends, other=-1) if mapped else group
    tiles = tl.where(group < ends, (end - begin + tile - 1) // tile, 0)
    last = tl.cumsum(tiles * slices, 0)
    here = group == tl.sum((last <= number).to(tl.int32), 0)
    within = number - tl.sum(tl.where(here, last - tiles * slices, 0), 0)
    parts = tl.maximum(tl.sum(tl.where(here, tiles, 0), 0), 1)
    first = tl.sum(tl.where(here, begin, 0), 0) + within % parts * tile
    mine = tl.sum(tl.where(here, cell + 1, 0), 0) - 1
    return mine, first, tl.sum(tl.where(here, end, 0), 0), within // parts

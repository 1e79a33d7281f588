"""The experts' two products as Triton kernels for few rows an expert, where time goes by how fast weights are read.

torch's grouped product computes tiles of 256 rows, of which a decode step has 8 in an expert. Here a part has room for
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

from moe_eplb.device.ops.plain_parts import Parts
from moe_eplb.device.ops.triton_rows import silu_times
from moe_eplb.device.sanitizer import declares

__all__ = ["Tiles", "grouped_product", "grouped_swiglu", "launch", "tiles"]


class Tiles(NamedTuple):
    """How a product is cut: rows of a part, results of a program, values that it adds at a time, what it runs in."""

    rows: int
    results: int
    depth: int
    warps: int
    stages: int


_GATED = {16: (64, 128, 4, 3), 32: (64, 64, 4, 4), 64: (64, 64, 4, 4), 128: (128, 64, 8, 4)}
_PLAIN = _GATED | {128: (128, 64, 8, 3)}
"""By the rows of a part, the fastest on an H200 of six to ten that were tried; `benchmarks.gpu.few_rows` compares the
tiles."""


def grouped_swiglu(rows: Tensor, w3_w1: Tensor, parts: Parts) -> Tensor:
    """See `plain_ffn.grouped_swiglu`."""
    return launch(rows, w3_w1, parts, tiles(parts.rows, gated=True), gated=True)


def grouped_product(rows: Tensor, weights: Tensor, parts: Parts) -> Tensor:
    """See `plain_ffn.grouped_product`."""
    return launch(rows, weights, parts, tiles(parts.rows, gated=False), gated=False)


def tiles(rows: int, *, gated: bool) -> Tiles:
    """How a product of parts of so many rows is cut."""
    return Tiles(rows, *(_GATED if gated else _PLAIN)[rows])


def launch(rows: Tensor, weights: Tensor, parts: Parts, cut: Tiles, *, gated: bool) -> Tensor:
    """Either product, cut so."""
    assert weights.is_contiguous(), "they are too large to be copied"
    assert parts.table.is_contiguous(), "one number lies behind the other"
    assert parts.rows == cut.rows, "a program computes a part"
    width, depth = weights.shape[1] // (1 + gated), weights.shape[2]
    result = torch.empty(len(rows), width, dtype=rows.dtype, device=rows.device)
    if not result.numel():
        return result
    _products[((len(parts.table) - 1) * triton.cdiv(width, cut.results),)](
        rows.contiguous(), weights, parts.table, result, len(rows), len(weights), width, depth=depth, gated=gated,
        part_rows=cut.rows, results=cut.results, block=cut.depth,
        whole=width % cut.results == 0 and depth % cut.depth == 0, stages=cut.stages, num_warps=cut.warps,
    )  # fmt: skip
    return result


@declares(writes=["result"])
@triton.jit(do_not_specialize=["count", "cells"])
def _products(
    rows, weights, parts, result, count, cells, width, depth: tl.constexpr, gated: tl.constexpr,
    part_rows: tl.constexpr, results: tl.constexpr, block: tl.constexpr, whole: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Programs of one group follow each other, and of them those that read the same weights.

    The line of a part is read beside the number of parts, and not behind it: behind the last part it is there, too.
    """
    slices = tl.cdiv(width, results)
    number = tl.program_id(0) // slices
    line, listed = parts + 4 + number * 4, number < tl.load(parts)
    cell, start, end, first_part = tl.load(line), tl.load(line + 1), tl.load(line + 2), tl.load(line + 3)
    if listed & (cell >= 0) & (cell < cells):
        within, own_parts = tl.program_id(0) - first_part * slices, (end - start + part_rows - 1) // part_rows
        slice_, end = within // own_parts, tl.minimum(end, count)
        row, at = start + within % own_parts * part_rows + tl.arange(0, part_rows), tl.arange(0, block)
        out = slice_ * results + tl.arange(0, results)
        matrix = weights + cell.to(tl.int64) * width * depth * (2 if gated else 1)
        there = row < end
        left = rows + row.to(tl.int64)[:, None] * depth + at[None, :]
        up = matrix + out.to(tl.int64)[:, None] * depth + at[None, :]
        gate = up + tl.cast(width, tl.int64) * depth
        summed, gating = tl.zeros([results, part_rows], tl.float32), tl.zeros([results, part_rows], tl.float32)
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

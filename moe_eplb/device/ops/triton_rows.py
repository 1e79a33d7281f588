"""Triton kernels that stream rows: SwiGLU, the weighted combine, sums over ranks, and packing for a collective.

All are bound by bytes. SwiGLU reads 2I and writes I values an entry; the combine reads K rows of D values and writes
one. Threads take 16 bytes of bf16 at a time where the width is a multiple of 16.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.plain_rows import require_columns
from moe_eplb.device.sanitizer import declares

__all__ = ["add_blocks", "combine", "pack_rows", "silu_times", "swiglu", "word_of"]

_ELEMENTS = 4096
"""Results of one program of SwiGLU."""
_COLUMNS = 4
"""Columns that `pack_rows` takes."""


def swiglu(rows: Tensor, offs: Tensor | None = None) -> Tensor:
    """See `plain.swiglu`."""
    count, width = rows.shape[0], rows.shape[1] // 2
    result = torch.empty(count, width, dtype=rows.dtype, device=rows.device)
    if result.numel():
        block = _dividing(width, (512, 256, 128))
        tile = _ELEMENTS // block
        _swiglu[(triton.cdiv(count, tile), triton.cdiv(width, block))](
            rows.contiguous(), result, result if offs is None else offs, count, width, 0 if offs is None else len(offs),
            offs is not None, tile, block,
        )  # fmt: skip
    return result


def combine(output: Tensor, position: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `plain.combine`."""
    rows, width = position.shape[0], output.shape[1]
    total = torch.empty(rows, width, dtype=dtype, device=output.device)
    if total.numel():
        block = _dividing(width, (2048, 1024, 512))
        scales = scales if scales.stride(1) == 1 else scales.contiguous()
        _combine[(rows, triton.cdiv(width, block))](
            output.contiguous(), position.contiguous(), scales, total, scales.stride(0), width, output.shape[0],
            position.shape[1], block, num_warps=block // 256,
        )  # fmt: skip
    return total


def add_blocks(blocks: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """See `plain.add_blocks`."""
    ranks, rows, width = blocks.shape
    total = torch.empty(tokens, width, dtype=dtype, device=blocks.device)
    if total.numel():
        block = _dividing(width, (2048, 1024, 512))
        _add_blocks[(tokens, triton.cdiv(width, block))](
            blocks.contiguous(), total, rows, width, ranks, block, num_warps=block // 256
        )
    return total


def pack_rows(columns: Sequence[Tensor], rows: Tensor) -> None:
    """See `plain.pack_rows`."""
    require_columns(columns, rows)
    if not rows.numel():
        return
    given = [column.contiguous() for column in columns]
    widths = [column.shape[1] for column in given] + [0] * (_COLUMNS - len(given))
    given += [rows] * (_COLUMNS - len(given))  # of width 0: nothing reads them
    block = 1024
    _pack_rows[(rows.shape[0], triton.cdiv(rows.shape[1], block))](
        *given, rows, columns[0].shape[0], rows.shape[1], *widths, block
    )


def _dividing(width: int, blocks: tuple[int, ...]) -> int:
    """The first of these blocks that divides the width, else the smallest, else what covers it."""
    return next((block for block in blocks if width % block == 0), blocks[-1])


@triton.jit
def silu_times(gate, up):
    """``silu(gate) * up`` in float32: one formula, so that all kernels which compute it give the same bits."""
    return gate * tl.sigmoid(gate) * up


@declares(writes=["result"])
@triton.jit(do_not_specialize=["count"])
def _swiglu(
    rows, result, offs, count, width, groups, bounded: tl.constexpr, tile: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    end = count
    if bounded:  # known at compile time: without ends the pointer is another tensor's, of another type
        end = tl.minimum(tl.load(offs + groups - 1), count)
    if tl.program_id(0) * tile < end:
        column = tl.program_id(1) * block + tl.arange(0, block)
        mask = (row < end)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None]
        up = tl.load(rows + at * (2 * width) + column[None, :], mask=mask).to(tl.float32)
        gate = tl.load(rows + at * (2 * width) + width + column[None, :], mask=mask).to(tl.float32)
        value = silu_times(gate, up)
        tl.store(result + at * width + column[None, :], value.to(result.dtype.element_ty), mask=mask)


@declares(writes=["total"])
@triton.jit(do_not_specialize=["entries"])
def _combine(
    output, position, scales, total, scale_stride, width, entries, top_k: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    value = tl.zeros([block], dtype=tl.float32)
    for k in tl.static_range(top_k):
        at = tl.load(position + row * top_k + k).to(tl.int64)
        here = (at >= 0) & (at < entries)
        scale = tl.load(scales + row * scale_stride + k)
        entry = tl.load(output + at * width + column, mask=mask & here, other=0.0).to(tl.float32)
        value += tl.where(here, entry * scale, 0.0)
    tl.store(total + row * width + column, value.to(total.dtype.element_ty), mask=mask)


@declares(writes=["total"])
@triton.jit
def _add_blocks(blocks, total, rows, width, ranks: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    value = tl.zeros([block], dtype=tl.float32)
    for rank in tl.static_range(ranks):
        value += tl.load(blocks + (row + rank * rows) * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(total + row * width + column, value.to(total.dtype.element_ty), mask=mask)


@declares(writes=["rows"])
@triton.jit(do_not_specialize=["tokens"])
def _pack_rows(
    first, second, third, fourth, rows, tokens, words, width1, width2, width3, width4, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * block + tl.arange(0, block)
    real = row < tokens
    value = tl.full([block], -1, dtype=tl.int32)
    value = word_of(first, value, row, word, width1, real)
    word2 = word - width1
    value = word_of(second, value, row, word2, width2, real)
    word3 = word2 - width2
    value = word_of(third, value, row, word3, width3, real)
    value = word_of(fourth, value, row, word3 - width3, width4, real)
    tl.store(rows + row * words + word, value, mask=word < words)


@triton.jit
def word_of(column, value, row, word, width, real):
    """`value` with the words that lie within a column of that width instead."""
    mine = (word >= 0) & (word < width) & real
    return tl.where(mine, tl.load(column + row * width + word, mask=mine, other=0), value)

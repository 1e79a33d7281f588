"""Triton kernels that quantise rows to fp8 where they are written anyway, so that no pass is made for it.

A program holds whole rows, since a row's scale is known only once all of it has been read. Bytes that a GPU has to
move: hidden states are read once and written K times at half the size, (2 + K) * M * D; SwiGLU reads 2I values of bf16
and writes I bytes an entry, 5 * N * I.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.plain import FP8, LARGEST, LEAST_MAX
from moe_eplb.device.ops.triton_entries import with_dense_rows
from moe_eplb.device.ops.triton_group import permute_few
from moe_eplb.device.ops.triton_rows import silu_times
from moe_eplb.device.sanitizer import declares

__all__ = ["permute_rows_fp8", "swiglu_fp8"]

_ELEMENTS = 4096
"""Results of one program of SwiGLU, as far as rows are no wider."""
_WARP_ELEMENTS = 512

_LARGEST = tl.constexpr(LARGEST)
_INVERSE = tl.constexpr(1 / LARGEST)
_LEAST_BITS = tl.constexpr(int(torch.tensor(LEAST_MAX).view(torch.int32)))
_MAGNITUDE = tl.constexpr(0x7FFFFFFF)


def permute_rows_fp8(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None = None, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `plain.permute_rows_fp8`."""
    position, offs = permute_few(slots, groups, cells, first_slot)
    copying()
    size, width = slots.numel() if entries is None else entries, hidden.shape[1]
    rows = torch.empty(size, width, dtype=FP8, device=hidden.device)
    scale = torch.empty(size, dtype=torch.float32, device=hidden.device)
    if rows.numel():
        hidden, block = with_dense_rows(hidden), triton.next_power_of_2(width)
        _spread_rows[(hidden.shape[0],)](
            hidden, position, rows, scale, hidden.stride(0), width, size, position.shape[1], block,
            num_warps=_warps(block),
        )  # fmt: skip
    return rows, scale, position, offs


def swiglu_fp8(rows: Tensor, offs: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See `plain.swiglu_fp8`."""
    count, width = rows.shape[0], rows.shape[1] // 2
    result = torch.empty(count, width, dtype=FP8, device=rows.device)
    scale = torch.empty(count, dtype=torch.float32, device=rows.device)
    if result.numel():
        block = triton.next_power_of_2(width)
        tile = max(1, _ELEMENTS // block)
        _swiglu_fp8[(triton.cdiv(count, tile),)](
            rows.contiguous(), result, scale, scale if offs is None else offs, count, width,
            0 if offs is None else len(offs), offs is not None, tile, block, num_warps=_warps(tile * block),
        )  # fmt: skip
    return result, scale


def _warps(elements: int) -> int:
    return min(16, max(4, elements // _WARP_ELEMENTS))


@triton.jit
def _scale_of(bits):
    """Scale and its inverse for the largest magnitude, given as bits: these order as the magnitudes do, NaN last."""
    largest = tl.maximum(bits, _LEAST_BITS).to(tl.float32, bitcast=True)
    return largest * _INVERSE, tl.div_rn(_LARGEST, largest)


@declares(writes=["rows", "scales"])
@triton.jit(do_not_specialize=["capacity"])
def _spread_rows(
    hidden, position, rows, scales, hidden_stride, width, capacity, top_k: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """A program a token: quantise its row once, write it to the places of its entries."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, block)
    mask = column < width
    value = tl.load(hidden + row * hidden_stride + column, mask=mask, other=0.0).to(tl.float32)
    scale, inverse = _scale_of(tl.max(value.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=0))
    quantized = (value * inverse).to(rows.dtype.element_ty)
    for k in tl.static_range(top_k):
        at = tl.load(position + row * top_k + k).to(tl.int64)
        here = (at >= 0) & (at < capacity)
        tl.store(rows + at * width + column, quantized, mask=mask & here)
        tl.store(scales + at, scale, mask=here)


@declares(writes=["result", "scales"])
@triton.jit(do_not_specialize=["count"])
def _swiglu_fp8(
    rows, result, scales, offs, count, width, groups, bounded: tl.constexpr, tile: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * tile + tl.arange(0, tile)
    end = count
    if bounded:
        end = tl.minimum(tl.load(offs + groups - 1), count)
    if tl.program_id(0) * tile < end:
        column = tl.arange(0, block)
        mask = (row < end)[:, None] & (column < width)[None, :]
        at = row.to(tl.int64)[:, None]
        up = tl.load(rows + at * (2 * width) + column[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(rows + at * (2 * width) + width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = silu_times(gate, up)
        scale, inverse = _scale_of(tl.max(value.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1))
        quantized = (value * inverse[:, None]).to(result.dtype.element_ty)
        tl.store(result + at * width + column[None, :], quantized, mask=mask)
        tl.store(scales + row, scale, mask=row < end)

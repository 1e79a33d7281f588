"""The device operations as Triton kernels; each has the signature of its twin in `plain` and gives the same result."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.plain import BLOCK

__all__ = ["combine", "histogram", "permute", "route", "swiglu"]

_TILE = 64
"""Entries that one step of a comparison takes at a time."""


def histogram(ids: Tensor, counts: Tensor) -> None:
    """See `plain.histogram`."""
    if ids.numel():
        bins = max(16, triton.next_power_of_2(counts.numel() + 1))
        _histogram[(triton.cdiv(ids.numel(), BLOCK),)](
            ids.contiguous(), counts, ids.numel(), counts.numel(), BLOCK, bins
        )


def route(ids: Tensor, count: Tensor, start: Tensor, slots: Tensor, *, offset: int, invalid: int) -> Tensor:
    """See `plain.route`."""
    routed = torch.empty(ids.shape, dtype=torch.int32, device=ids.device)
    if ids.numel():
        _route[(triton.cdiv(ids.numel(), BLOCK),)](
            ids.contiguous(), count, start, slots, routed, ids.numel(), count.numel(), offset, invalid, BLOCK, _TILE
        )
    return routed


def permute(slots: Tensor, num_slots: int) -> tuple[Tensor, Tensor]:
    """See `plain.permute`. A counting sort: entries per block and slot, their prefix sums, then each entry's place."""
    entries, blocks = slots.numel(), max(1, triton.cdiv(slots.numel(), BLOCK))
    flat = slots.contiguous()
    bins = max(16, triton.next_power_of_2(num_slots + 1))
    per_block = torch.zeros(blocks, num_slots, dtype=torch.int32, device=slots.device)
    position = torch.empty(slots.shape, dtype=torch.int32, device=slots.device)
    if entries:
        _count_blocks[(blocks,)](flat, per_block, entries, num_slots, BLOCK, bins)
    totals = per_block.sum(dim=0, dtype=torch.int32)
    offs = totals.cumsum(0, dtype=torch.int32)
    first = per_block.cumsum(0, dtype=torch.int32) - per_block + (offs - totals)
    if entries:
        _place[(blocks,)](flat, first.contiguous(), position, entries, num_slots, BLOCK, _TILE)
    return position, offs


def swiglu(rows: Tensor) -> Tensor:
    """See `plain.swiglu`."""
    count, width = rows.shape[0], rows.shape[1] // 2
    result = torch.empty(count, width, dtype=rows.dtype, device=rows.device)
    if result.numel():
        block = min(1024, triton.next_power_of_2(width))
        _swiglu[(count, triton.cdiv(width, block))](rows.contiguous(), result, width, block)
    return result


def combine(output: Tensor, position: Tensor, scales: Tensor) -> Tensor:
    """See `plain.combine`."""
    rows, width = position.shape[0], output.shape[1]
    total = torch.empty(rows, width, dtype=torch.float32, device=output.device)
    if total.numel():
        block = min(1024, triton.next_power_of_2(width))
        _combine[(rows, triton.cdiv(width, block))](
            output.contiguous(), position.contiguous(), scales.contiguous(), total, width, position.shape[1], block
        )
    return total


@triton.jit
def _histogram(ids, counts, entries, experts, block: tl.constexpr, nbins: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    expert = tl.load(ids + at, mask=at < entries, other=-1).to(tl.int32)
    # The last bin takes what belongs to nobody; it is never written.
    expert = tl.where((expert >= 0) & (expert < experts), expert, nbins - 1)
    found = tl.histogram(expert, nbins)
    bins = tl.arange(0, nbins)
    tl.atomic_add(counts + bins, found, mask=(bins < experts) & (found > 0))


@triton.jit
def _seen(ids, at, value, first, entries, block: tl.constexpr, tile: tl.constexpr):
    """For each entry of a block, how many earlier ones of the block have the same value."""
    seen = tl.zeros([block], dtype=tl.int32)
    for begin in range(0, block, tile):
        other_at = first + begin + tl.arange(0, tile)
        other = tl.load(ids + other_at, mask=other_at < entries, other=-1).to(tl.int32)
        same = (value[:, None] == other[None, :]) & (other_at[None, :] < at[:, None])
        seen += tl.sum(same.to(tl.int32), axis=1)
    return seen


@triton.jit
def _route(
    ids, count, start, slots, routed, entries, experts, offset, invalid, block: tl.constexpr, tile: tl.constexpr
):
    program = tl.program_id(0)
    at = program * block + tl.arange(0, block)
    expert = tl.load(ids + at, mask=at < entries, other=-1).to(tl.int32)
    inside = (expert >= 0) & (expert < experts)
    seen = _seen(ids, at, expert, program * block, entries, block, tile)
    replicas = tl.load(count + expert, mask=inside, other=1)
    replica = (seen + program + offset) % replicas
    slot = tl.load(slots + tl.load(start + expert, mask=inside, other=0) + replica, mask=inside, other=invalid)
    tl.store(routed + at, slot, mask=at < entries)


@triton.jit
def _count_blocks(slots, per_block, entries, num_slots, block: tl.constexpr, nbins: tl.constexpr):
    program = tl.program_id(0)
    at = program * block + tl.arange(0, block)
    slot = tl.load(slots + at, mask=at < entries, other=-1).to(tl.int32)
    slot = tl.where((slot >= 0) & (slot < num_slots), slot, nbins - 1)
    bins = tl.arange(0, nbins)
    tl.store(per_block + program * num_slots + bins, tl.histogram(slot, nbins), mask=bins < num_slots)


@triton.jit
def _place(slots, first, position, entries, num_slots, block: tl.constexpr, tile: tl.constexpr):
    program = tl.program_id(0)
    at = program * block + tl.arange(0, block)
    slot = tl.load(slots + at, mask=at < entries, other=-1).to(tl.int32)
    inside = (slot >= 0) & (slot < num_slots)
    seen = _seen(slots, at, slot, program * block, entries, block, tile)
    begin = tl.load(first + program * num_slots + slot, mask=inside, other=0)
    tl.store(position + at, tl.where(inside, begin + seen, -1), mask=at < entries)


@triton.jit
def _swiglu(rows, result, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    up = tl.load(rows + row * 2 * width + column, mask=mask).to(tl.float32)
    gate = tl.load(rows + row * 2 * width + width + column, mask=mask).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    tl.store(result + row * width + column, value.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _combine(output, position, scales, total, width, top_k: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < width
    value = tl.zeros([block], dtype=tl.float32)
    for k in tl.static_range(top_k):
        at = tl.load(position + row * top_k + k).to(tl.int64)
        scale = tl.load(scales + row * top_k + k)
        entry = tl.load(output + at * width + column, mask=mask & (at >= 0), other=0.0).to(tl.float32)
        value += tl.where(at >= 0, entry * scale, 0.0)
    tl.store(total + row * width + column, value, mask=mask)

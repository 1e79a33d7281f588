"""Triton kernels that group entries by cell and copy hidden states to their places.

Grouping is a counting sort over blocks of `_BLOCK` entries. With A[c, b] the entries of block b whose cell is at most
c, cell c begins at the sum of row c - 1 of A, and the entries of earlier blocks in cell c are a prefix sum of row c
minus row c - 1. So one program a cell needs nobody else's sums, and no atomic operation decides an order. Few entries
take one launch, see `triton_group_few`.

Bytes of `permute_rows`, which a GPU has to move: a row is read once and written K times, (1 + K) * M * D * itemsize;
all tables together are below 1 % of that for D >= 1024.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.plain_parts import Parts, most_parts
from moe_eplb.device.ops.triton_entries import (
    Wanted,
    cell_of,
    column_block,
    table_of,
    wanted_or_nothing,
    with_dense_rows,
    write_parts,
)
from moe_eplb.device.ops.triton_group_few import permute_small
from moe_eplb.device.sanitizer import declares

__all__ = ["permute", "permute_few", "permute_in_parts", "permute_rows"]

_BLOCK = 128
_CHUNK = 2048
"""Blocks that the prefix sum takes at a time."""
_SMALL = 4096
"""Entries up to which one launch does everything."""


def permute(slots: Tensor, groups: int, cells: Tensor | None = None, first_slot: int = 0) -> tuple[Tensor, Tensor]:
    """See `plain.permute`."""
    position = torch.empty(slots.shape, dtype=torch.int32, device=slots.device)
    if not slots.numel():
        return position, torch.zeros(groups, dtype=torch.int32, device=slots.device)
    slots = with_dense_rows(slots)
    entries, blocks = slots.numel(), triton.cdiv(slots.numel(), _BLOCK)
    offs = torch.empty(groups, dtype=torch.int32, device=slots.device)
    below, first = torch.empty(2, groups, blocks, dtype=torch.int32, device=slots.device).unbind()
    bins = max(16, triton.next_power_of_2(groups + 1))
    given = (slots, *table_of(slots, groups, cells), first_slot, slots.stride(0), entries, groups, blocks)
    how = (slots.shape[1], cells is not None, _BLOCK)
    _count[(blocks,)](*given, below, *how, bins)
    _scan[(groups,)](below, first, offs, blocks, _CHUNK)
    _place[(blocks,)](*given, first, position, *how)
    return position, offs


def permute_rows(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None = None, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `plain.permute_rows`."""
    return _permute_rows(hidden, slots, groups, cells, entries, copying, first_slot, None)


def permute_in_parts(
    hidden: Tensor, slots: Tensor, cells: Tensor, rows: int, entries: int | None = None,
    copying: Callable[[], None] = lambda: None, first_slot: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Parts]:  # fmt: skip
    """See `plain.permute_in_parts`."""
    size, groups = slots.numel() if entries is None else entries, len(cells)
    make = torch.empty if size * hidden.shape[1] else torch.zeros  # without rows nothing is launched that writes it
    table = make(1 + most_parts(size, groups, rows), 4, dtype=torch.int32, device=slots.device)
    wanted = Wanted(Parts(table, rows), cells.contiguous())
    return (*_permute_rows(hidden, slots, groups, None, entries, copying, first_slot, wanted), wanted.parts)


def _permute_rows(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None, entries: int | None, copying: Callable[[], None],
    first_slot: int, wanted: Wanted | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`permute_rows`; writes the parts of groups that have those cells, where they are wanted."""
    size = slots.numel() if entries is None else entries
    hidden = with_dense_rows(hidden)
    rows = torch.empty(size, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    if not slots.numel() or slots.numel() > _SMALL:
        position, offs = permute(slots, groups, cells, first_slot)
        copying()
        if rows.numel():
            _copy(hidden, position, offs, rows, wanted)
        return rows, position, offs
    copying()
    return (rows, *permute_small(hidden, with_dense_rows(slots), groups, cells, first_slot, rows, wanted))


def permute_few(slots: Tensor, groups: int, cells: Tensor | None = None, first_slot: int = 0) -> tuple[Tensor, Tensor]:
    """`permute`, in one launch where there are few entries, as in a decode step."""
    if not slots.numel() or slots.numel() > _SMALL:
        return permute(slots, groups, cells, first_slot)
    nothing = torch.empty(slots.shape[0], 0, dtype=torch.float32, device=slots.device)
    return permute_small(nothing, with_dense_rows(slots), groups, cells, first_slot, nothing, None)


def _copy(hidden: Tensor, position: Tensor, offs: Tensor, rows: Tensor, wanted: Wanted | None) -> None:
    width = hidden.shape[1]
    block = column_block(width)
    parts, own_cells, part_rows = wanted_or_nothing(wanted, rows)
    grid = (hidden.shape[0] + (part_rows > 0), triton.cdiv(width, block))
    _copy_rows[grid](
        hidden, position, offs, own_cells, rows, parts, hidden.stride(0), width, rows.shape[0], len(offs),
        position.shape[1], part_rows, max(16, triton.next_power_of_2(len(offs))), block, num_warps=block // 256,
    )  # fmt: skip


@declares(writes=["below"])
@triton.jit(do_not_specialize=["first_slot", "entries", "blocks"])
def _count(
    slots, cells, num_slots, first_slot, slot_stride, entries, groups, blocks, below,
    top_k: tl.constexpr, mapped: tl.constexpr, block: tl.constexpr, nbins: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program * block + tl.arange(0, block)
    cell, inside = cell_of(
        slots, cells, num_slots, first_slot, slot_stride, at, at < entries, groups, top_k, mapped, False
    )
    # The last bin takes what belongs to nobody; it is never written.
    found = tl.histogram(tl.where(inside, cell, nbins - 1), nbins)
    bins = tl.arange(0, nbins)
    tl.store(below + bins * blocks + program, tl.cumsum(found, axis=0), mask=bins < groups)


@declares(writes=["first", "offs"])
@triton.jit(do_not_specialize=["blocks"])
def _scan(below, first, offs, blocks, chunk: tl.constexpr):
    """first[c, b]: where block b's entries of cell c begin, less its entries of lower cells; and where cells end."""
    cell = tl.program_id(0)
    upper, lower = below + cell * blocks, below + (cell - 1) * blocks
    before = tl.zeros([chunk], dtype=tl.int32)
    begin = 0
    while begin < blocks:
        at = begin + tl.arange(0, chunk)
        before += tl.load(lower + at, mask=(at < blocks) & (cell > 0), other=0)
        begin += chunk
    running = tl.sum(before, axis=0)
    begin = 0
    while begin < blocks:
        at = begin + tl.arange(0, chunk)
        less = tl.load(lower + at, mask=(at < blocks) & (cell > 0), other=0)
        own = tl.load(upper + at, mask=at < blocks, other=0) - less
        tl.store(first + cell * blocks + at, running + tl.cumsum(own, axis=0) - own - less, mask=at < blocks)
        running += tl.sum(own, axis=0)
        begin += chunk
    tl.store(offs + cell, running)


@declares(writes=["position"])
@triton.jit(do_not_specialize=["first_slot", "entries", "blocks"])
def _place(
    slots, cells, num_slots, first_slot, slot_stride, entries, groups, blocks, first, position,
    top_k: tl.constexpr, mapped: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    index = tl.arange(0, block)
    at = program * block + index
    cell, inside = cell_of(
        slots, cells, num_slots, first_slot, slot_stride, at, at < entries, groups, top_k, mapped, False
    )
    # No two keys are equal, so that one comparison ranks by cell and then by arrival. A thread keeps the column of its
    # own entry, so that it adds up alone.
    key = tl.where(inside, cell * block + index, 0x7FFFFFFF)
    rank = tl.sum((key[:, None] < key[None, :]).to(tl.int32), axis=0)
    begin = tl.load(first + cell * blocks + program, mask=inside, other=0)
    tl.store(position + at, tl.where(inside, begin + rank, -1), mask=at < entries)


@declares(writes=["rows", "parts"])
@triton.jit(do_not_specialize=["capacity"])
def _copy_rows(
    hidden, position, offs, own_cells, rows, parts, hidden_stride, width, capacity, groups, top_k: tl.constexpr,
    part_rows: tl.constexpr, bins: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program a token, behind one that finds the parts where they are wanted."""
    token = tl.program_id(0)
    if part_rows > 0:
        token -= 1
        if (token < 0) & (tl.program_id(1) == 0):
            group = tl.arange(0, bins)
            end = tl.load(offs + group, mask=group < groups, other=0)
            begin = tl.load(offs + group - 1, mask=(group > 0) & (group < groups), other=0)
            cell = tl.load(own_cells + group, mask=group < groups, other=-1)
            write_parts(parts, cell, begin, end, capacity, part_rows)
    if token >= 0:
        row = token.to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        value = tl.load(hidden + row * hidden_stride + column, mask=column < width)
        for k in tl.static_range(top_k):
            at = tl.load(position + row * top_k + k).to(tl.int64)
            tl.store(rows + at * width + column, value, mask=(column < width) & (at >= 0) & (at < capacity))

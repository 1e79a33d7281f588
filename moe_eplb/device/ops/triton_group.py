"""Triton kernels that group entries by cell and copy hidden states to their places.

Grouping is a counting sort over blocks of `_BLOCK` entries. With A[c, b] the entries of block b whose cell is at most
c, cell c begins at the sum of row c - 1 of A, and the entries of earlier blocks in cell c are a prefix sum of row c
minus row c - 1. So one program a cell needs nobody else's sums, and no atomic operation decides an order. Small inputs
take one launch, in which every program finds the places of its own token by comparing with all entries.

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
from moe_eplb.device.sanitizer import declares

__all__ = ["permute", "permute_few", "permute_in_parts", "permute_rows", "with_dense_rows"]

_BLOCK = 128
_CHUNK = 2048
"""Blocks that the prefix sum takes at a time."""
_SMALL = 4096
"""Entries up to which one launch does everything."""
_TILE = 1024
"""Entries that a program of the small kernel compares with at a time."""


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
    given = (slots, *_table(slots, groups, cells), first_slot, slots.stride(0), entries, groups, blocks)
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
    make = torch.empty if size else torch.zeros  # without rows nothing is launched that writes it
    table = make(1 + most_parts(size, groups, rows), 4, dtype=torch.int32, device=slots.device)
    wanted = Parts(table, rows), cells
    return (*_permute_rows(hidden, slots, groups, None, entries, copying, first_slot, wanted), wanted[0])


def _permute_rows(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None, entries: int | None, copying: Callable[[], None],
    first_slot: int, wanted: tuple[Parts, Tensor] | None,
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
    return (rows, *_permute_small(hidden, with_dense_rows(slots), groups, cells, first_slot, rows, wanted))


def permute_few(slots: Tensor, groups: int, cells: Tensor | None = None, first_slot: int = 0) -> tuple[Tensor, Tensor]:
    """`permute`, in one launch where there are few entries, as in a decode step."""
    if not slots.numel() or slots.numel() > _SMALL:
        return permute(slots, groups, cells, first_slot)
    nothing = torch.empty(slots.shape[0], 0, dtype=torch.float32, device=slots.device)
    return _permute_small(nothing, with_dense_rows(slots), groups, cells, first_slot, nothing, None)


def _copy(
    hidden: Tensor, position: Tensor, offs: Tensor, rows: Tensor, wanted: tuple[Parts, Tensor] | None
) -> None:  # fmt: skip
    width = hidden.shape[1]
    block = _column_block(width)
    parts, own_cells, part_rows = _given(wanted, rows)
    grid = (hidden.shape[0] + (part_rows > 0), triton.cdiv(width, block))
    _copy_rows[grid](
        hidden, position, offs, own_cells, rows, parts, hidden.stride(0), width, rows.shape[0], len(offs),
        position.shape[1], part_rows, max(16, triton.next_power_of_2(len(offs))), block, num_warps=block // 256,
    )  # fmt: skip


def _permute_small(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None, first_slot: int, rows: Tensor,
    wanted: tuple[Parts, Tensor] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, top_k = slots.shape
    position = torch.empty(slots.shape, dtype=torch.int32, device=slots.device)
    offs = torch.empty(groups, dtype=torch.int32, device=slots.device)
    block = _column_block(hidden.shape[1])
    parts, own_cells, part_rows = _given(wanted, rows)
    _small[(1 + tokens, max(1, triton.cdiv(hidden.shape[1], block)))](
        hidden, slots, *_table(slots, groups, cells), own_cells, first_slot, rows, position, offs, parts,
        hidden.stride(0), slots.stride(0), tokens * top_k, groups, hidden.shape[1], rows.shape[0], top_k,
        triton.next_power_of_2(top_k), 0 if cells is None else max(16, triton.next_power_of_2(cells.numel())), _TILE,
        max(16, triton.next_power_of_2(groups + 1)), part_rows, block, num_warps=max(4, block // 256),
    )  # fmt: skip
    return position, offs


def _given(wanted: tuple[Parts, Tensor] | None, nothing: Tensor) -> tuple[Tensor, Tensor, int]:
    """Table, cells of the groups and rows of the parts that are wanted; of none, what nothing reads or writes."""
    return (nothing, nothing, 0) if wanted is None else (wanted[0].table, wanted[1].contiguous(), wanted[0].rows)


def _table(slots: Tensor, groups: int, cells: Tensor | None) -> tuple[Tensor, int]:
    """The table of cells and S; where slots are their own cells, a pointer that nothing reads."""
    return (slots, groups) if cells is None else (cells, cells.numel())


def with_dense_rows(tensor: Tensor) -> Tensor:
    """A 2-dimensional tensor whose rows are dense, itself where it has them; rows may be strided."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def _column_block(width: int) -> int:
    """Columns of a program, at least 256: 16 bytes of bf16 a thread, and no idle threads where a block divides D."""
    for block in (2048, 1024, 512):
        if width % block == 0:
            return block
    return max(256, min(1024, int(triton.next_power_of_2(width))))


@triton.jit
def _cell(
    slots, cells, num_slots, first_slot, slot_stride, at, real, groups, top_k: tl.constexpr, mapped: tl.constexpr,
    held: tl.constexpr,
):  # fmt: skip
    """The cell of each entry and whether it has one; `cells` is where the table lies, or `held`, what it holds."""
    token = (at // top_k).to(tl.int64)
    slot = tl.load(slots + token * slot_stride + at % top_k, mask=real, other=-1) - first_slot
    inside = (slot >= 0) & (slot < num_slots)
    cell = tl.where(inside, slot, 0).to(tl.int32)
    if mapped:
        cell = tl.gather(cells, cell, axis=0) if held else tl.load(cells + cell, mask=inside, other=-1)
        inside = inside & (cell >= 0) & (cell < groups)
    return cell, inside


@declares(writes=["below"])
@triton.jit(do_not_specialize=["first_slot", "entries", "blocks"])
def _count(
    slots, cells, num_slots, first_slot, slot_stride, entries, groups, blocks, below,
    top_k: tl.constexpr, mapped: tl.constexpr, block: tl.constexpr, nbins: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    at = program * block + tl.arange(0, block)
    cell, inside = _cell(
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
    cell, inside = _cell(
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
    token = tl.program_id(0) - (1 if part_rows > 0 else 0)
    if token >= 0:
        row = token.to(tl.int64)
        column = tl.program_id(1) * block + tl.arange(0, block)
        value = tl.load(hidden + row * hidden_stride + column, mask=column < width)
        for k in tl.static_range(top_k):
            at = tl.load(position + row * top_k + k).to(tl.int64)
            tl.store(rows + at * width + column, value, mask=(column < width) & (at >= 0) & (at < capacity))
    elif tl.program_id(1) == 0:
        group = tl.arange(0, bins)
        end = tl.load(offs + group, mask=group < groups, other=0)
        begin = tl.load(offs + group - 1, mask=(group > 0) & (group < groups), other=0)
        cell = tl.load(own_cells + group, mask=group < groups, other=-1)
        _write_parts(parts, cell, begin, end, group < groups, capacity, part_rows)


@triton.jit
def _write_parts(parts, cell, begin, end, real, capacity, part_rows: tl.constexpr):
    """The table of the parts of all groups, of which those are `real`; it has lines for as many rows as `capacity`."""
    begin, end = tl.minimum(begin, capacity), tl.minimum(end, capacity)
    number = tl.where(real, (end - begin + part_rows - 1) // part_rows, 0)
    first = tl.cumsum(number, 0) - number
    tl.store(parts, tl.sum(number, 0))
    most = tl.max(number, 0)
    turn = 0
    while turn < most:
        line, more = parts + (1 + first + turn) * 4, turn < number
        tl.store(line, cell, mask=more)
        tl.store(line + 1, begin, mask=more)
        tl.store(line + 2, end, mask=more)
        tl.store(line + 3, first, mask=more)
        turn += 1


@declares(writes=["rows", "position", "offs", "parts"])
@triton.jit(do_not_specialize=["first_slot", "entries", "capacity"])
def _small(
    hidden, slots, cells, num_slots, own_cells, first_slot, rows, position, offs, parts, hidden_stride, slot_stride,
    entries, groups, width, capacity, top_k: tl.constexpr, k_width: tl.constexpr, held: tl.constexpr,
    tile: tl.constexpr, bins: tl.constexpr, part_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program a token, behind one that finds the ends of groups, and their parts where they are wanted.

    Each reads the whole table of cells, `held` of them or none, beside the slots, and not each slot's cell behind it.
    """
    token = tl.program_id(0) - 1
    table = slots
    if held > 0:
        slot = tl.arange(0, held)
        table = tl.load(cells + slot, mask=slot < num_slots, other=-1)
    if token >= 0:
        k = tl.arange(0, k_width)
        cell, inside = _cell(
            slots, table, num_slots, first_slot, slot_stride, token * top_k + k, k < top_k, groups, top_k, held > 0,
            True,
        )  # fmt: skip
        limit = tl.where(inside, cell * entries + token * top_k + k, -1)
        place = _before(
            slots, table, num_slots, first_slot, slot_stride, entries, groups, limit, k_width, top_k, held > 0, tile
        )
        place = tl.where(inside, place, -1)
        once = (k < top_k) & (tl.program_id(1) == 0)
        tl.store(position + token * top_k + k, place, mask=once)
        column = tl.program_id(1) * block + tl.arange(0, block)
        value = tl.load(hidden + token.to(tl.int64) * hidden_stride + column, mask=column < width)
        for turn in tl.static_range(top_k):
            at = tl.sum(tl.where(k == turn, place, 0), axis=0).to(tl.int64)
            tl.store(rows + at * width + column, value, mask=(column < width) & (at >= 0) & (at < capacity))
    elif tl.program_id(1) == 0:
        group = tl.arange(0, bins)
        if part_rows > 0:
            own = tl.load(own_cells + group, mask=group < groups, other=-1)
        count = _per_group(
            slots, table, num_slots, first_slot, slot_stride, entries, groups, top_k, held > 0, tile, bins
        )
        end = tl.cumsum(count, 0)
        tl.store(offs + group, end, mask=group < groups)
        if part_rows > 0:
            _write_parts(parts, own, end - count, end, group < groups, capacity, part_rows)


@triton.jit
def _per_group(
    slots, table, num_slots, first_slot, slot_stride, entries, groups, top_k: tl.constexpr, mapped: tl.constexpr,
    tile: tl.constexpr, bins: tl.constexpr,
):  # fmt: skip
    """How many entries each group has; 0 behind the last group."""
    found = tl.zeros([bins], dtype=tl.int32)
    begin = 0
    while begin < entries:
        at = begin + tl.arange(0, tile)
        cell, inside = _cell(
            slots, table, num_slots, first_slot, slot_stride, at, at < entries, groups, top_k, mapped, True
        )
        # The last bin takes what belongs to nobody.
        found += tl.histogram(tl.where(inside, cell, bins - 1), bins)
        begin += tile
    return tl.where(tl.arange(0, bins) < groups, found, 0)


@triton.jit
def _before(
    slots, table, num_slots, first_slot, slot_stride, entries, groups, limit, size: tl.constexpr, top_k: tl.constexpr,
    mapped: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """For each limit, how many entries have a smaller key; an entry's key is cell * entries + its number."""
    found = tl.zeros([size], dtype=tl.int32)
    begin = 0
    while begin < entries:
        at = begin + tl.arange(0, tile)
        cell, inside = _cell(
            slots, table, num_slots, first_slot, slot_stride, at, at < entries, groups, top_k, mapped, True
        )
        key = tl.where(inside, cell * entries + at, 0x7FFFFFFF)
        found += tl.sum((key[None, :] < limit[:, None]).to(tl.int32), axis=1)
        begin += tile
    return found

"""A Triton kernel that groups few entries, and copies hidden states to their places, in one launch.

Every program but the first finds the places of its own token, by comparing with all entries; that one finds the ends of
groups, and their parts.
"""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.triton_entries import Wanted, cell_of, column_block, table_of, wanted_or_nothing, write_parts
from moe_eplb.device.sanitizer import declares

__all__ = ["permute_small"]

_CHUNK = 1024
"""Entries that a program compares with at a time."""


def permute_small(
    hidden: Tensor, slots: Tensor, groups: int, cells: Tensor | None, first_slot: int, rows: Tensor,
    wanted: Wanted | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`plain.permute` of slots whose rows are dense, with hidden states copied to `rows` and parts where wanted."""
    tokens, top_k = slots.shape
    position = torch.empty(slots.shape, dtype=torch.int32, device=slots.device)
    offs = torch.empty(groups, dtype=torch.int32, device=slots.device)
    block = column_block(hidden.shape[1])
    parts, own_cells, part_rows = wanted_or_nothing(wanted, rows)
    _small[(1 + tokens, max(1, triton.cdiv(hidden.shape[1], block)))](
        hidden, slots, *table_of(slots, groups, cells), own_cells, first_slot, rows, position, offs, parts,
        hidden.stride(0), slots.stride(0), tokens * top_k, groups, hidden.shape[1], rows.shape[0], top_k,
        triton.next_power_of_2(top_k), 0 if cells is None else max(16, triton.next_power_of_2(cells.numel())), _CHUNK,
        max(16, triton.next_power_of_2(groups + 1)), part_rows, block, num_warps=max(4, block // 256),
    )  # fmt: skip
    return position, offs


@declares(writes=["rows", "position", "offs", "parts"])
@triton.jit(do_not_specialize=["first_slot", "entries", "capacity"])
def _small(
    hidden, slots, cells, num_slots, own_cells, first_slot, rows, position, offs, parts, hidden_stride, slot_stride,
    entries, groups, width, capacity, top_k: tl.constexpr, k_width: tl.constexpr, held: tl.constexpr,
    chunk: tl.constexpr, bins: tl.constexpr, part_rows: tl.constexpr, block: tl.constexpr,
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
        cell, inside = cell_of(
            slots, table, num_slots, first_slot, slot_stride, token * top_k + k, k < top_k, groups, top_k, held > 0,
            True,
        )  # fmt: skip
        limit = tl.where(inside, cell * entries + token * top_k + k, -1)
        place = _before(
            slots, table, num_slots, first_slot, slot_stride, entries, groups, limit, k_width, top_k, held > 0, chunk
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
            slots, table, num_slots, first_slot, slot_stride, entries, groups, top_k, held > 0, chunk, bins
        )
        end = tl.cumsum(count, 0)
        tl.store(offs + group, end, mask=group < groups)
        if part_rows > 0:
            write_parts(parts, own, end - count, end, capacity, part_rows)


@triton.jit
def _per_group(
    slots, table, num_slots, first_slot, slot_stride, entries, groups, top_k: tl.constexpr, mapped: tl.constexpr,
    chunk: tl.constexpr, bins: tl.constexpr,
):  # fmt: skip
    """How many entries each group has; 0 behind the last group."""
    found = tl.zeros([bins], dtype=tl.int32)
    begin = 0
    while begin < entries:
        at = begin + tl.arange(0, chunk)
        cell, inside = cell_of(
            slots, table, num_slots, first_slot, slot_stride, at, at < entries, groups, top_k, mapped, True
        )
        # The last bin takes what belongs to nobody.
        found += tl.histogram(tl.where(inside, cell, bins - 1), bins)
        begin += chunk
    return tl.where(tl.arange(0, bins) < groups, found, 0)


@triton.jit
def _before(
    slots, table, num_slots, first_slot, slot_stride, entries, groups, limit, size: tl.constexpr, top_k: tl.constexpr,
    mapped: tl.constexpr, chunk: tl.constexpr,
):  # fmt: skip
    """For each limit, how many entries have a smaller key; an entry's key is cell * entries + its number."""
    found = tl.zeros([size], dtype=tl.int32)
    begin = 0
    while begin < entries:
        at = begin + tl.arange(0, chunk)
        cell, inside = cell_of(
            slots, table, num_slots, first_slot, slot_stride, at, at < entries, groups, top_k, mapped, True
        )
        key = tl.where(inside, cell * entries + at, 0x7FFFFFFF)
        found += tl.sum((key[None, :] < limit[:, None]).to(tl.int32), axis=1)
        begin += chunk
    return found

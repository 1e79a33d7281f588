"""What the kernels that group entries have in common."""

# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moe_eplb.device.ops.plain_parts import Parts

__all__ = ["Wanted", "cell_of", "column_block", "table_of", "wanted_or_nothing", "with_dense_rows", "write_parts"]


class Wanted(NamedTuple):
    """Parts whose table is to be written, and the cell int32 [G] of each group's weights."""

    parts: Parts
    cells: Tensor


def with_dense_rows(tensor: Tensor) -> Tensor:
    """A 2-dimensional tensor whose rows are dense, itself where it has them; rows may be strided."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()


def column_block(width: int) -> int:
    """Columns of a program, at least 256: 16 bytes of bf16 a thread, and no idle threads where a block divides D."""
    for block in (2048, 1024, 512):
        if width % block == 0:
            return block
    return max(256, min(1024, int(triton.next_power_of_2(width))))


def table_of(slots: Tensor, groups: int, cells: Tensor | None) -> tuple[Tensor, int]:
    """The table of cells and S; where slots are their own cells, a pointer that nothing reads."""
    return (slots, groups) if cells is None else (cells, cells.numel())


def wanted_or_nothing(wanted: Wanted | None, nothing: Tensor) -> tuple[Tensor, Tensor, int]:
    """Table, cells of the groups and rows of the parts that are wanted; of none, what nothing reads or writes."""
    return (nothing, nothing, 0) if wanted is None else (wanted.parts.table, wanted.cells, wanted.parts.rows)


@triton.jit
def cell_of(
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


@triton.jit
def write_parts(parts, cell, begin, end, capacity, part_rows: tl.constexpr):
    """The table of the parts of all groups, those behind the last one empty; it has lines for `capacity` rows.

    In turns, one for each part of the largest group: mostly one or two.
    """
    begin, end = tl.minimum(begin, capacity), tl.minimum(end, capacity)
    number = (end - begin + part_rows - 1) // part_rows
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

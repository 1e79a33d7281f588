"""Parts: what a program of the products of few rows computes at a time, so many rows of one group.

They are found once, when entries are grouped, and not by each of a product's programs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Parts", "most_parts", "part_rows", "parts_of"]

_LEAST, _MOST = 16, 128
"""Rows of a part; `triton_ffn` has a cut for each power of two between them."""


class Parts(NamedTuple):
    """The parts of N rows in G groups."""

    table: Tensor
    """int32 [1 + Q, 4]. In the first line the number of parts, and anything. In the line of a part the cell of its
    group's weights, where the group begins and ends, and the number of its first part. Lines behind the last part hold
    anything."""
    rows: int
    """Rows of a part; the last one of a group may have fewer."""


def part_rows(each: int) -> int:
    """Rows of a part where a group has `each` on average: a power of two, twice as many or more, but 128 at most."""
    return min(_MOST, max(_LEAST, 1 << (2 * each - 1).bit_length() if each > 0 else 0))


def most_parts(count: int, groups: int, rows: int) -> int:
    """Q: how many parts of `rows` rows `count` rows can make in so many groups."""
    return count // rows + min(groups, count)


def parts_of(offs: Tensor, cells: Tensor, rows: int, count: int) -> Parts:
    """The parts of `count` rows.

    Args:
        offs: int32 [G], end of each group's rows; what is beyond `count` is `count`.
        cells: int32 [G], the cell of each group's weights.
        rows: Of a part.
        count: N.
    """
    end = offs.clamp(max=count)
    begin = torch.cat((end.new_zeros(1), end[:-1]))
    last = ((end - begin + rows - 1) // rows).cumsum(0, dtype=torch.int32)
    first = torch.cat((last.new_zeros(1), last[:-1]))
    number = torch.arange(most_parts(count, len(offs), rows), dtype=torch.int32, device=offs.device)
    group = torch.searchsorted(last, number, right=True).clamp(max=len(offs) - 1)
    lines = torch.stack((cells[group], begin[group], end[group], first[group]), dim=1)
    return Parts(torch.cat((last[-1:].expand(1, 4), lines)).to(torch.int32).contiguous(), rows)

"""Parts of the products of few rows: every row is in one, with the cell of its group."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.device.ops.plain_parts import most_parts, parts_of


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    part=st.sampled_from([1, 4, 16]),
    left=st.integers(-5, 5),
)
def test_every_row_is_in_one_part(counts: list[int], part: int, left: int) -> None:
    rows, groups = max(0, sum(counts) + left), len(counts)
    offs, cells = torch.tensor(counts).cumsum(0).int(), torch.arange(groups).flip(0).int() + 3
    parts = parts_of(offs, cells, part, rows)
    assert (parts.table.dtype, parts.table.shape) == (torch.int32, (1 + most_parts(rows, groups, part), 4))
    (count, *_), *lines = parts.table.tolist()
    found = []
    for number, (cell, begin, end, first) in enumerate(lines[:count]):
        at = begin + (number - first) * part
        found += [(row, cell) for row in range(at, min(at + part, end))]
        assert begin <= at < end
    wanted = [cell for cell, amount in zip(cells.tolist(), counts, strict=True) for _ in range(amount)]
    assert found == list(enumerate(wanted[:rows]))


def test_so_many_parts_there_can_be() -> None:
    for counts in ([17, 17, 17], [1, 1, 1], [50], [0, 0, 0]):
        offs = torch.tensor(counts).cumsum(0).int()
        count = int(parts_of(offs, torch.arange(len(counts)), 16, sum(counts)).table[0, 0])
        assert count == sum(-(-amount // 16) for amount in counts) <= most_parts(sum(counts), len(counts), 16)
    assert most_parts(51, 3, 16) == 6 == 2 * 3, "is reached"

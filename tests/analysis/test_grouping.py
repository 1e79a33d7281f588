"""Equal rows of several columns, against a naive twin."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_eplb.analysis.grouping import distinct_rows, members

_NUMBER = st.integers(-3, 3) | st.sampled_from([-(1 << 63), (1 << 63) - 1, 1 << 40])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4).flatmap(lambda width: st.lists(st.tuples(*[_NUMBER] * width), max_size=12)))
def test_rows_are_numbered_in_their_order(rows: list[tuple[int, ...]]) -> None:
    width = len(rows[0]) if rows else 2
    table = np.array(rows, np.int64).reshape(len(rows), width)
    distinct, group = distinct_rows(list(table.T))
    expected = sorted(set(rows))
    assert list(map(tuple, distinct.tolist())) == expected
    assert group.tolist() == [expected.index(row) for row in rows]
    of_group = [mine.tolist() for mine in members(group, len(distinct))]
    assert of_group == [[at for at, row in enumerate(rows) if row == one] for one in expected]


def test_small_types_do_not_overflow() -> None:
    distinct, group = distinct_rows([np.array([255, 0, 255], np.uint8), np.array([-(2**31), 2**31 - 1, 5], np.int32)])
    assert distinct.tolist() == [[0, 2**31 - 1], [255, -(2**31)], [255, 5]]
    assert group.tolist() == [1, 0, 2]

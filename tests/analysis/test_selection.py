"""What of a capture is asked for, as users write it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.selection import EVERYTHING, Selection, parse_numbers
from moe_eplb.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("3", [3], [2, 4, -1]),
        ("0-2", [0, 1, 2], [3, -1]),
        (" 5 - ", [5, 10**6], [4, -1]),
        ("0-1,7, 9-10", [0, 1, 7, 9, 10], [2, 6, 8, 11]),
    ],
)
def test_ranges(text: str, inside: list[int], outside: list[int]) -> None:
    selection = Selection(iterations=parse_numbers(text, "--iterations"))
    assert all(map(selection.has_iteration, inside))
    assert not any(map(selection.has_iteration, outside))


@pytest.mark.parametrize("text", ["", ",", "a", "-3", "3-1", "1,,2", "1-2-3", "1.5", "9" * 10, "٣"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_numbers(text, "--rank")
    assert caught.value.code == "E080"


@given(st.lists(st.tuples(*[st.integers(-1, 4)] * 3), max_size=20))
def test_the_mask_is_what_all_three_allow(rows: list[tuple[int, int, int]]) -> None:
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    selection = Selection(ranks=((0, 1),), iterations=((2, 2), (4, 9)), layers=((-1, 1),))
    expected = [r in (0, 1) and i in (2, 4) and layer <= 1 for r, i, layer in rows]
    assert selection.mask(*columns).tolist() == expected
    assert EVERYTHING.mask(*columns).all()


def test_it_says_what_was_asked_for() -> None:
    assert str(EVERYTHING) == ""
    assert EVERYTHING.everything
    asked = Selection(ranks=parse_numbers("0", "x"), iterations=parse_numbers("5-,1-2", "x"))
    assert str(asked) == "ranks 0, iterations 5-,1-2"
    assert not asked.everything


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (EVERYTHING, ""),
        (Selection(ranks=((0, 0),), iterations=((2, 2),)), ""),
        (Selection(ranks=((0, 0),), iterations=((3, 3),)), "not together"),
        (Selection(ranks=((2, 9),)), "its ranks are 0 to 1"),
        (Selection(iterations=((4, 9),)), "its iterations are 2 to 3"),
        (Selection(layers=((0, 0),)), "it names no layers"),
    ],
)
def test_a_selection_of_nothing_is_refused(asked: Selection, why: str) -> None:
    gpu = c.filled(c.GPU, 2, rank=np.array([0, 1]), iteration=np.array([2, 3]))
    asked.require_some(gpu[:0], "x.sqlite")
    if not why:
        asked.require_some(gpu, "x.sqlite")
        return
    with pytest.raises(UsageError, match=why) as caught:
        asked.require_some(gpu, "x.sqlite")
    assert (caught.value.code, str(asked) in caught.value.what) == ("E080", True)

"""Equal rows of several columns, found column by column, since sorting whole rows takes many times as long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["distinct_rows", "known_numbers", "members"]

_NEAR = 4
"""Times the number of values that their range may have to be looked up in a table."""


def distinct_rows(columns: Sequence[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct rows [G, C] of C columns [N] of whole numbers, in order, and the number [N] of each row's group."""
    count = len(columns[0])
    group, groups = np.zeros(count, np.int64), 1
    for column in columns:
        values, number = _numbered(column)
        if values <= 1:
            continue
        # Both factors are at most N, so the product fits; numbering anew keeps it so for the next column.
        groups, group = (values, number) if groups == 1 else _numbered(group * values + number)
    first = np.zeros(groups if count else 0, np.int64)
    first[group[::-1]] = np.arange(count)[::-1]
    return np.stack([column[first].astype(np.int64) for column in columns], axis=1), group


def _numbered(column: NDArray[Any]) -> tuple[int, NDArray[np.int64]]:
    """How many different values there are, and the place [N] of each among them; without sorting if they are near."""
    if not len(column):
        return 0, np.empty(0, np.int64)
    low, high = int(column.min()), int(column.max())
    if high - low > _NEAR * len(column):
        values, number = np.unique(column, return_inverse=True)
        return len(values), number.reshape(-1).astype(np.int64)
    moved = column.astype(np.int64) - low
    there = np.zeros(high - low + 1, np.bool_)
    there[moved] = True
    place = np.cumsum(there) - 1
    return int(place[-1]) + 1, place[moved]


def members(group: NDArray[np.int64], groups: int) -> list[NDArray[np.int64]]:
    """The indices of each group's rows, in order, for the group number [N] of each row."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.searchsorted(group, np.arange(1, groups), sorter=order)) if groups else []


def known_numbers(column: NDArray[Any]) -> tuple[int, ...]:
    """The numbers of iterations or layers that a column names, in order, without -1 for none."""
    found: list[int] = np.unique(column).tolist()
    return tuple(number for number in found if number >= 0)

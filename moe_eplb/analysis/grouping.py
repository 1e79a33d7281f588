"""Equal rows of several columns, found column by column, since sorting whole rows takes many times as long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["distinct_rows", "members"]


def distinct_rows(columns: Sequence[NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct rows [G, C] of C columns [N] of whole numbers, in order, and the number [N] of each row's group."""
    count = len(columns[0])
    group, groups = np.zeros(count, np.int64), 1
    for column in columns:
        values, inverse = np.unique(column, return_inverse=True)
        # Both factors are at most N, so the product fits; numbering anew keeps it so for the next column.
        packed, group = np.unique(group * max(len(values), 1) + inverse.reshape(-1), return_inverse=True)
        group, groups = group.reshape(-1).astype(np.int64), len(packed)
    first = np.zeros(groups if count else 0, np.int64)
    first[group[::-1]] = np.arange(count)[::-1]
    return np.stack([column[first].astype(np.int64) for column in columns], axis=1), group


def members(group: NDArray[np.int64], groups: int) -> list[NDArray[np.int64]]:
    """The indices of each group's rows, in order, for the group number [N] of each row."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.searchsorted(group, np.arange(1, groups), sorter=order)) if groups else []

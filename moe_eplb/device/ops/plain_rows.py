"""What rows and the columns that are written into them must have in common."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["require_columns"]


def require_columns(columns: Sequence[Tensor], rows: Tensor, more: int = 0) -> None:
    """Raise ValueError unless int32 columns [T, ...] have equally many rows and fit, with `more` words, into `rows`.

    A kernel goes by the sizes of the first column and of the rows: it would read and write beyond others.
    """
    heights, width = {column.shape[0] for column in columns}, sum(column.shape[1] for column in columns) + more
    if len(heights) != 1 or width > rows.shape[1]:
        shapes = [tuple(column.shape) for column in columns]
        raise ValueError(f"columns {shapes} and {more} words do not fit rows {tuple(rows.shape)}")

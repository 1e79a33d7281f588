"""Rows of a capture's tables, one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_eplb.analysis.capture import Table

__all__ = ["rows_of"]


def rows_of(table: Table) -> Iterator[dict[str, Any]]:
    """Each row by the names of its columns, as plain numbers."""
    names = table.dtype.names or ()
    for values in zip(*(table[name].tolist() for name in names), strict=True):
        yield dict(zip(names, values, strict=True))

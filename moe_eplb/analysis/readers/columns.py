"""An Nsight Systems export whose tables are in memory already, as columns, instead of in a file.

Whoever hands them over may have read them from SQLite, Parquet or Arrow, into libraries that hold a whole number beside
gaps as a floating-point one. What was whole comes back whole, or is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_eplb.core.errors import TraceError

__all__ = ["ColumnTables", "InMemory", "Tables"]

InMemory: TypeAlias = Mapping[str, Mapping[str, NDArray[Any]]]
"""Columns [N] by table and name: whole numbers, floating-point ones with NaN as gaps, or objects with None or NaN."""

_KEPT_TEXT = 4096
_EXACT = float(1 << 53)
"""Up to here every whole number has a floating-point one of its own."""
_PAYLOAD = "Value"
"""How columns of payloads end. They hold any 64 bits, and beyond `_EXACT` only their size matters to anyone."""


class Tables(Protocol):
    """What the reader of an export asks its tables, see `moe_eplb.analysis.readers.sqlite_tables.Database`."""

    @property
    def path(self) -> Path:
        """What the tables were read from."""

    def has(self, table: str, *columns: str) -> bool:
        """Whether a table with these columns is there."""

    def integers(
        self, table: str, required: tuple[str, ...], optional: Mapping[str, int] | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """Columns of whole numbers; `rowid` numbers the rows."""

    def texts(self, table: str, key: str, text: str) -> dict[int, str]:
        """Texts by a column of whole numbers."""

    def pairs(self, table: str) -> dict[str, str]:
        """A table of names and values."""


class ColumnTables:
    """`Tables` of columns in memory. Errors are those of a damaged file: TraceError E062."""

    def __init__(self, path: Path, tables: InMemory) -> None:
        self._path, self._tables = path, tables

    @property
    def path(self) -> Path:
        """What the tables were read from."""
        return self._path

    def has(self, table: str, *columns: str) -> bool:
        """Whether a table with these columns is there."""
        return table in self._tables and set(columns) <= self._tables[table].keys()

    def integers(
        self, table: str, required: tuple[str, ...], optional: Mapping[str, int] | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """Columns of whole numbers, see `sqlite_tables.Database.integers`."""
        optional = dict(optional or {})
        if table not in self._tables:
            return {name: np.empty(0, np.int64) for name in (*required, *optional)}
        columns = self._tables[table]
        if missing := sorted(set(required) - columns.keys() - {"rowid"}):
            why = f"{table} has no {', '.join(missing)}"
            raise TraceError("E062", "a trace lacks a needed column", why=why, where=str(self.path))
        count = len(next(iter(columns.values()), ()))
        found = {}
        for name in (*required, *optional):
            if name == "rowid":
                found[name] = np.arange(count)
            elif name in columns:
                found[name] = self._whole(columns[name], optional.get(name), f"{table}.{name}")
            else:
                found[name] = np.full(count, optional[name])
        return found

    def texts(self, table: str, key: str, text: str) -> dict[int, str]:
        """Texts by a column of whole numbers, each cut to 4096 characters; gaps are left out."""
        if not self.has(table, *{key, text} - {"rowid"}):
            return {}
        values = self._tables[table][text]
        there = np.flatnonzero(~_gaps(values))
        keys = self.integers(table, (key,))[key][there].tolist()
        found: dict[int, str] = {}
        for number, value in zip(keys, values[there].tolist(), strict=True):
            if not isinstance(value, str):
                raise self._damaged(f"{table}.{text} holds {type(value).__name__} under {number}")
            found[number] = value[:_KEPT_TEXT]
        return found

    def pairs(self, table: str) -> dict[str, str]:
        """A table of names and values; one that stands there twice has its last value."""
        if not self.has(table, "name", "value"):
            return {}
        names, values = self._tables[table]["name"], self._tables[table]["value"]
        gaps = _gaps(values).tolist()
        rows = zip(names.tolist(), values.tolist(), gaps, strict=True)
        return {str(name): "" if gap else str(value) for name, value, gap in rows}

    def _whole(self, values: NDArray[Any], gap: int | None, what: str) -> NDArray[np.int64]:
        if values.dtype.kind in "iub":
            return values.astype(np.int64)  # as SQLite, which has no unsigned numbers: the same 64 bits
        gaps = _gaps(values)
        if gap is None and gaps.any():
            raise self._damaged(f"{what} has {int(gaps.sum())} gaps")
        if values.dtype.kind == "f":
            return self._from_floats(np.where(gaps, 0.0, values), gaps, gap or 0, what)
        plain = [0 if empty else value for value, empty in zip(values.tolist(), gaps.tolist(), strict=True)]
        if wrong := next((value for value in plain if not isinstance(value, int)), None):
            raise self._damaged(f"{what} holds {type(wrong).__name__}")
        try:
            whole = np.array(plain, np.int64)
        except OverflowError as error:
            raise self._damaged(f"{what}: {error}") from error
        whole[gaps] = gap or 0
        return whole

    def _from_floats(self, values: NDArray[Any], gaps: NDArray[np.bool_], gap: int, what: str) -> NDArray[np.int64]:
        if not (values == np.floor(values)).all():
            raise self._damaged(f"{what} holds fractions")
        if (np.abs(values) > _EXACT).any():
            if not what.endswith(_PAYLOAD):
                raise self._damaged(f"{what} holds {values[np.abs(values).argmax()]:.17g}, which is not exact")
            values = np.clip(values, -_EXACT, _EXACT)
        whole = values.astype(np.int64)
        whole[gaps] = gap
        return whole

    def _damaged(self, why: str) -> TraceError:
        return TraceError("E062", "a trace has damaged values", why=why, where=str(self.path))


def _gaps(values: NDArray[Any]) -> NDArray[np.bool_]:
    if values.dtype.kind == "f":
        return np.asarray(np.isnan(values), np.bool_)
    if values.dtype.kind != "O":
        return np.zeros(len(values), np.bool_)
    # What is not equal to itself is NaN, which some libraries put where others put None.
    return np.array([value is None or value != value for value in values.tolist()], np.bool_)

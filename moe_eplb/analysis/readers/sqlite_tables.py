"""Typed columns out of a SQLite file that is not trusted: nothing is written, run, or taken for what it does not say.

A file may declare views or virtual tables under the names of tables, values of other types than its columns say, and
lengths that no memory holds. Only plain tables are read, only whole numbers pass as numbers, and every statement ends.
"""

from __future__ import annotations

import sqlite3
import struct
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.readers.limits import Limits, too_large
from moe_eplb.core.errors import TraceError
from moe_eplb.core.input_file import open_input

__all__ = ["MAGIC", "Database", "open_database"]

MAGIC = b"SQLite format 3\0"
_MAX_TEXT = 16 << 20
_KEPT_TEXT = 4096
"""Characters of a name that are kept; a template's full name may be longer and says nothing new."""
_KEPT_VALUE = 1 << 16
_BATCH = 1_000
_STEPS = 2_000
"""Virtual-machine steps of SQLite between two looks at the clock."""


class Database:
    """The plain tables of an open file."""

    def __init__(self, path: Path, connection: sqlite3.Connection, limits: Limits) -> None:
        self.path, self._connection, self._limits = path, connection, limits
        listed = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
        plain = [str(name) for name, sql in listed if not str(sql).upper().startswith("CREATE VIRTUAL")]
        self._columns = {name: self._declared(name) for name in plain}

    def has(self, table: str, *columns: str) -> bool:
        """Whether a plain table with these columns is there."""
        return table in self._columns and set(columns) <= self._columns[table]

    def integers(
        self, table: str, required: tuple[str, ...], optional: Mapping[str, int] | None = None, where: str = ""
    ) -> dict[str, NDArray[np.int64]]:
        """Columns of whole numbers, in no particular order.

        Args:
            table: Its name; a table that is not there has no rows.
            required: Columns that must be there and never NULL; `rowid` always is.
            optional: Columns with the value that stands for a missing column and for NULL.
            where: A condition in SQL, of the caller's own making.

        Raises:
            TraceError: a required column is missing, a value is no whole number, there are too many rows.
        """
        optional = dict(optional or {})
        wanted = [*required, *optional]
        if table not in self._columns:
            return {name: np.empty(0, np.int64) for name in wanted}
        if missing := sorted(set(required) - self._columns[table] - {"rowid"}):
            why = f"{table} has no {', '.join(missing)}"
            raise TraceError("E062", "a trace lacks a needed column", why=why, where=str(self.path))
        there = [name for name in wanted if name in self._columns[table] or name == "rowid"] or ["rowid"]
        selected = [f'COALESCE("{n}", {optional[n]})' if n in optional else f'"{n}"' for n in there]
        rows = self._numbers(f"SELECT {', '.join(selected)} FROM {table}" + (f" WHERE {where}" if where else ""), table)
        columns = rows.reshape(-1, len(there)).T
        found = {name: np.ascontiguousarray(column) for name, column in zip(there, columns, strict=True)}
        count = len(rows) // len(there)
        return {name: found[name] if name in found else np.full(count, optional[name]) for name in wanted}

    def texts(self, table: str, key: str, text: str, where: str = "1") -> dict[int, str]:
        """Texts by a column of whole numbers, each cut to 4096 characters."""
        if not self.has(table, *{key, text} - {"rowid"}):
            return {}
        query = f'SELECT "{key}", substr("{text}", 1, {_KEPT_TEXT}) FROM {table} WHERE {where} AND "{text}" IS NOT NULL'
        found: dict[int, str] = {}
        for rows in self._texts(query, table):
            for number, value in rows:
                if not isinstance(number, int) or not isinstance(value, str):
                    why = f"{table}.{text} holds {type(value).__name__} under {number!r:.40}"
                    raise TraceError("E062", "a trace has damaged values", why=why, where=str(self.path))
                found[number] = value
        return found

    def pairs(self, table: str) -> dict[str, str]:
        """A table of names and values of at most 65536 characters; one that stands there twice has its last value."""
        if not self.has(table, "name", "value"):
            return {}
        query = f"SELECT substr(name, 1, {_KEPT_TEXT}), substr(value, 1, {_KEPT_VALUE}) FROM {table}"
        batches = self._texts(query, table)
        return {str(name): "" if value is None else str(value) for rows in batches for name, value in rows}

    def _declared(self, table: str) -> set[str]:
        quoted = table.replace('"', '""')
        return {str(row[1]) for row in self._connection.execute(f'PRAGMA table_info("{quoted}")')}

    def _numbers(self, query: str, table: str) -> NDArray[np.int64]:
        numbers = array("q")  # takes whole numbers only, where numpy would cut fractions off
        try:
            for rows in self._batches(query, table):
                numbers.extend(chain.from_iterable(rows))
        except (TypeError, OverflowError) as error:
            why = f"{table}: {error}"
            raise TraceError("E062", "a trace has damaged values", why=why, where=str(self.path)) from error
        return np.frombuffer(numbers, np.int64) if numbers else np.empty(0, np.int64)

    def _texts(self, query: str, table: str) -> Iterator[list[tuple[Any, ...]]]:
        """Batches of rows that end in a text; a column may be an expression, so its size says nothing of the file's."""
        kept = 0
        for rows in self._batches(query, table):
            kept += sum(len(text) for *_, text in rows if isinstance(text, str | bytes))
            if kept > self._limits.kept_text:
                raise too_large(self.path, f"more than {self._limits.kept_text} characters of text", table)
            yield rows

    def _batches(self, query: str, table: str) -> Iterator[list[tuple[Any, ...]]]:
        deadline = time.monotonic() + self._limits.seconds
        self._connection.set_progress_handler(lambda: time.monotonic() > deadline, _STEPS)
        cursor = self._connection.execute(query)
        count = 0
        while rows := cursor.fetchmany(_BATCH):
            count += len(rows)
            if count > self._limits.events:
                raise too_large(self.path, f"more than {self._limits.events} rows", table)
            yield rows


@contextmanager
def open_database(path: Path, limits: Limits) -> Iterator[Database]:
    """Open a file for reading alone; errors of SQLite inside become a `TraceError`.

    Raises:
        TraceError: E060 there is no such file, E061 it is cut off, E062 it is damaged.
    """
    _require_whole(path)
    try:
        # Immutable: no lock file, no journal, no recovery, so that a folder that only reads stays as it is.
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    except sqlite3.Error as error:
        raise _damaged(path, error) from error
    try:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_TEXT)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.execute("PRAGMA trusted_schema = OFF")
        connection.execute("PRAGMA cell_size_check = ON")
        connection.execute("PRAGMA query_only = ON")
        yield Database(path, connection, limits)
    except (sqlite3.Error, sqlite3.Warning, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    finally:
        connection.close()


def _require_whole(path: Path) -> None:
    try:
        with open_input(path) as file:
            header, size = file.read(100), file.seek(0, 2)
    except OSError as error:
        raise TraceError(
            "E060", "a trace cannot be opened", why=error.strerror or str(error), where=str(path)
        ) from error
    if len(header) < 100:
        raise TraceError("E061", "a trace is cut off", why=f"{len(header)} bytes", where=str(path))
    page, pages = struct.unpack_from(">H", header, 16)[0], struct.unpack_from(">I", header, 28)[0]
    page = 65536 if page == 1 else page
    if size < page * pages:
        why = f"{size} bytes of {page * pages}"
        raise TraceError("E061", "a trace is cut off", why=why, where=str(path), hint="copy or export it again")
    journal = Path(f"{path}-wal")
    if journal.exists() and journal.stat().st_size:
        why = f"{journal.name} holds what is not in it yet"
        hint = "let the program that writes it end first"
        raise TraceError("E061", "a trace is still being written", why=why, where=str(path), hint=hint)


def _damaged(path: Path, error: Exception) -> TraceError:
    if "interrupted" in str(error):
        return too_large(path, "a table takes longer to read than allowed", str(error))
    return TraceError("E062", "a trace is damaged", why=f"SQLite: {error}"[:300], where=str(path))

"""Redaction of SQLite captures: Nsight Systems' exports and our own canonical trace, which has the same tables."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from moe_eplb.recording import nsys_schema
from moe_eplb.recording.nvtx_ranges import DOMAIN
from moe_eplb.recording.redact_json import scrubbed_text
from moe_eplb.recording.redact_names import names_someone, sensitive
from moe_eplb.recording.redact_text import REMOVED, Scrubber

__all__ = ["redact_sqlite"]

_SYSTEM_TABLES = re.compile(
    r"ProcessStreams|ANALYSIS_FILE|TARGET_INFO_(SYSTEM_ENV|NIC\w*|NETWORK\w*|PROCESS\w*|ENV\w*)|NIC_ID_MAP|\w*ENVIRON\w*",
    re.IGNORECASE,
)
"""Tables of which no row stays."""
_NUMBERED = frozenset(("guid", "mac", "serial", "serialnumber", "uuid"))
_KERNEL_NAMES = ("demangledName", "shortName", "mangledName")
_STRING_COLUMNS = (*_KERNEL_NAMES, "textId", "jsonTextId", "nameId", "filenameId", "contentId")
"""Columns that point into StringIds; those of a newer export are found by what its table definitions say."""
_REFERENCE = re.compile(r'^\s*"?(\w+)"?\s+INTEGER[^\n]*--[^\n]*REFERENCES StringIds', re.MULTILINE)
_STAND_IN = re.compile(r"|\(removed\)|\(uuid \d+\)")
_OWN_DOMAINS = f"""
    CREATE TEMP TABLE own_domains AS SELECT DISTINCT globalTid >> 24 AS process, domainId AS domain
    FROM NVTX_EVENTS LEFT JOIN StringIds ON StringIds.id = textId
    WHERE eventType = {nsys_schema.DOMAIN_CREATE} AND COALESCE(text, value) = '{DOMAIN}'
"""
_IN_OWN_DOMAIN = "(IFNULL(globalTid, 0) >> 24, IFNULL(domainId, -1)) IN (SELECT process, domain FROM own_domains)"


def redact_sqlite(path: Path, scrubber: Scrubber) -> list[str]:
    """Redact a database in place and rewrite it, so that no page holds a removed byte; returns what was removed."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA secure_delete = ON")
        removed = list(_Redaction(connection, scrubber).run())
        connection.execute("VACUUM")
    return removed


class _Redaction:
    """One database, its tables and their columns."""

    def __init__(self, connection: sqlite3.Connection, scrubber: Scrubber) -> None:
        self._connection, self._scrubber = connection, scrubber
        self._sql = dict(connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall())
        self._columns = {
            table: [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')] for table in self._sql
        }

    def run(self) -> Iterator[str]:
        self._learn_names()
        self._find_own_domains()
        self._connection.execute("BEGIN")
        yield from self._drop_views()
        yield from self._empty_system_tables()
        yield from self._remove_idle_processes()
        yield from self._clear_named_fields()
        yield from self._scrub_strings()
        yield from self._scrub_texts()
        self._connection.execute("COMMIT")

    def _learn_names(self) -> None:
        """Users and machines that the capture itself names, by columns, by properties and by paths of home folders."""
        self._connection.create_function("names_someone", 1, lambda name: isinstance(name, str) and names_someone(name))
        self._connection.create_function("learn_homes", 1, self._learn_homes)
        for table, column in self._text_columns():
            condition = self._where(table, column, "names_someone", names_someone(column))
            query = f'SELECT DISTINCT "{column}" FROM "{table}" WHERE {condition} AND "{column}" IS NOT NULL'
            self._scrubber.learn([str(row[0]) for row in self._connection.execute(query)])
            self._connection.execute(f'SELECT COUNT(learn_homes("{column}")) FROM "{table}"').fetchone()

    def _where(self, table: str, column: str, function: str, always: bool) -> str:
        """Of which rows a column is meant: of all, of properties whose name says so, or of none."""
        names = [name for name in ("name", "key") if name in self._columns[table]]
        if always or column != "value" or not names:
            return str(int(always))
        return f"{function}({names[0]})"

    def _learn_homes(self, value: object) -> None:
        if isinstance(value, str) and ("/" in value or "\\" in value):
            self._scrubber.learn_homes(value)

    def _find_own_domains(self) -> None:
        if "NVTX_EVENTS" in self._sql and "StringIds" in self._sql:
            self._connection.execute(_OWN_DOMAINS)
        else:
            self._connection.execute("CREATE TEMP TABLE own_domains (process INTEGER, domain INTEGER)")

    def _drop_views(self) -> Iterator[str]:
        """No capture needs them, and their definitions may hold any text."""
        found = self._connection.execute("SELECT type, name FROM sqlite_master WHERE type IN ('view', 'trigger')")
        for kind, name in found.fetchall():
            self._connection.execute(f'DROP {kind} IF EXISTS "{name}"')
            yield f"{kind}s: 1"

    def _empty_system_tables(self) -> Iterator[str]:
        for table in self._sql:
            if _SYSTEM_TABLES.fullmatch(table):
                count = self._connection.execute(f'DELETE FROM "{table}"').rowcount
                if count:
                    yield f"{table}: {count} rows"

    def _remove_idle_processes(self) -> Iterator[str]:
        """Of the list of processes, and of their threads, those stay that recorded something."""
        active = [
            f'SELECT "{column}" >> 24 FROM "{table}"'
            for table, columns in self._columns.items()
            for column in ("globalTid", "globalPid")
            if column in columns and table.startswith(("NVTX_EVENTS", "CUPTI_ACTIVITY"))
        ]
        for table, column in (("PROCESSES", "globalPid"), ("ThreadNames", "globalTid")):
            if column not in self._columns.get(table, ()):
                continue
            keep = f"{column} >> 24 IN ({' UNION '.join(active)})" if active else "0"
            count = self._connection.execute(f"DELETE FROM {table} WHERE NOT IFNULL({keep}, 0)").rowcount
            if count:
                yield f"{table}: {count} rows"

    def _clear_named_fields(self) -> Iterator[str]:
        """Values whose column, or whose property, has a name that forbids them."""
        self._connection.create_function("sensitive", 1, lambda name: isinstance(name, str) and sensitive(name))
        for table, column in self._text_columns():
            condition = self._where(table, column, "sensitive", sensitive(column))
            if condition != "0":
                yield from self._replace(table, column, condition)
        yield from self._clear_numbers()

    def _clear_numbers(self) -> Iterator[str]:
        """Serial numbers and the like that are numbers; other sensitive columns of numbers point into StringIds."""
        for table, columns in self._columns.items():
            for column in columns:
                if not _NUMBERED.isdisjoint(column.lower().split("_")):
                    where = f"""typeof("{column}") = 'integer' AND "{column}" != 0"""
                    count = self._connection.execute(f'UPDATE "{table}" SET "{column}" = 0 WHERE {where}').rowcount
                    if count:
                        yield f"{table}.{column}: {count} numbers"

    def _replace(self, table: str, column: str, condition: str) -> Iterator[str]:
        self._connection.create_function("stand_in", 1, self._stand_in)
        yield from self._update(table, column, "stand_in", condition)

    def _stand_in(self, value: str | bytes) -> str | bytes:
        if _STAND_IN.fullmatch(str(value)):
            return value
        return self._scrubber.field(str(value))

    def _scrub_strings(self) -> Iterator[str]:
        """Names of kernels and of our ranges stay, what nothing points to any more goes, the rest is scrubbed."""
        if "StringIds" not in self._sql:
            return
        self._collect("used_strings", self._references(), "1")
        kernels = [(table, column) for table, column in self._references() if column in _KERNEL_NAMES]
        self._collect("own_strings", kernels, "1")
        if "textId" in self._columns.get("NVTX_EVENTS", ()):
            self._connection.execute(f"INSERT INTO own_strings SELECT textId FROM NVTX_EVENTS WHERE {_IN_OWN_DOMAIN}")
        unused = self._connection.execute(
            "UPDATE StringIds SET value = ? WHERE value NOT IN (?, '') AND id NOT IN (SELECT id FROM used_strings)",
            (REMOVED, REMOVED),
        ).rowcount
        if unused:
            yield f"StringIds: {unused} texts that nothing points to"
        yield from self._scrub("StringIds", "value", "id NOT IN (SELECT id FROM own_strings WHERE id IS NOT NULL)")

    def _collect(self, name: str, references: list[tuple[str, str]], condition: str) -> None:
        self._connection.execute(f"CREATE TEMP TABLE {name} (id INTEGER)")
        for table, column in references:
            self._connection.execute(
                f'INSERT INTO {name} SELECT DISTINCT "{column}" FROM "{table}" '
                f'WHERE {condition} AND "{column}" IS NOT NULL'
            )

    def _references(self) -> list[tuple[str, str]]:
        found = []
        for table, columns in self._columns.items():
            told = set(_REFERENCE.findall(self._sql[table] or "")) | set(_STRING_COLUMNS)
            found += [(table, column) for column in columns if column in told]
        return found

    def _scrub_texts(self) -> Iterator[str]:
        for table, column in self._text_columns():
            if table == "StringIds" or table.startswith("ENUM_"):
                continue
            own = table == "NVTX_EVENTS" and column == "text"
            yield from self._scrub(table, column, f"NOT {_IN_OWN_DOMAIN}" if own else "1")

    def _scrub(self, table: str, column: str, condition: str) -> Iterator[str]:
        self._connection.create_function("scrub", 1, self._scrubbed)
        yield from self._update(table, column, "scrub", condition)

    def _scrubbed(self, value: str | bytes) -> str | bytes:
        if isinstance(value, bytes):
            # Bytes that we cannot read stay only when nothing in them looks like what must go, in UTF-16 neither.
            texts = (value.decode("latin-1"), value.replace(b"\0", b"").decode("latin-1"))
            return value if all(self._scrubber.text(text) == text for text in texts) else b""
        return scrubbed_text(value, self._scrubber)

    def _update(self, table: str, column: str, function: str, condition: str) -> Iterator[str]:
        new = f'{function}("{column}")'
        count = self._connection.execute(
            f'UPDATE "{table}" SET "{column}" = {new} '
            f"""WHERE typeof("{column}") IN ('text', 'blob') AND {condition} AND {new} IS NOT "{column}" """
        ).rowcount
        if count:
            yield f"{table}.{column}: {count} texts"

    def _text_columns(self) -> list[tuple[str, str]]:
        """Columns that hold any text or bytes, whatever type they were declared with."""
        return [
            (table, column)
            for table, columns in self._columns.items()
            for column in columns
            if self._connection.execute(
                f"""SELECT 1 FROM "{table}" WHERE typeof("{column}") IN ('text', 'blob') LIMIT 1"""
            ).fetchone()
        ]

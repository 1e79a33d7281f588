"""Which tables and columns a redacted database keeps: those that are named as Nsight Systems and we name ours.

A table's own name, a column's, a comment in a definition or a default may tell as much as a row, and no rule tells a
person's name from a word. So a database is written anew, from names whose every word is known and from nothing else.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

__all__ = ["is_known", "is_plain", "write_known"]

_FORMAT = """
2 32 64 a access activity actual addr address align amount analysis api app array async at attribute attributes b
bandwidth base binary block blocks buffer bus byte bytes cache call callback callchain callchains capture category
cause channel chip class clock codec collective color comm component composite compute config constant content context
copy core correlation count counter cpu ctrl ctx ctxsw cu cublas cuda cudnn cupti current cycle cycles data debug
default demangled deprecated depth description dest destination detail details dev device diagnostic dim discrete
display domain double dropped dst duration dynamic element encoder end engine engines entries entry enum enums env
environment eplb epoch error etw event events executed export fault field file filename flag flags float format frame
free func function generic global gpu graph green grid group guid handle height host hw id ids idx in index info input
int interval ip ipc is issue iteration json kernel key kind l label launch layer len length level levels limit line
local location log luid major mangled map mask max mem memcpy memory mempool memset message messages meta method
metric metrics migration min minor mode module mpi name names nccl nesting net network nic node ns nsys null num
number nvlink nvtx offset op openacc oper operation optin option or order original os osrt other output overhead p2p
packed page parent path payload pc pci pcie peer per perf phase pid pool port priority process processes profiler
progress property pw queue range ranges rank rate raw read real receive record recv region registers remote request
result return revision role root runtime sample samples sampling scale sched schema schemas seq serial serialized
session severity shared shmem short size sm source special src stack start state static status stop stream streams
string strings submit switch switches symbol sync synchronization system tag target text thread threads thumb tid time
timestamp to total trace type types ucp ucx uid uint um unif union unresolved unwind usage utc uuid value version vid
virtual vm wait warp warps width worker workers write x y z
"""
"""Words of the tables and columns in Nsight Systems' exports and in our traces."""
_VOCABULARY = frozenset(_FORMAT.split())
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*", re.ASCII)
_AFFINITIES = (("INT", "INTEGER"), ("CHAR", "TEXT"), ("CLOB", "TEXT"), ("TEXT", "TEXT"), ("BLOB", "BLOB"))
_FRACTIONS = ("REAL", "FLOA", "DOUB")


def is_known(name: str) -> bool:
    """Whether a table, column or index is called by words of the format alone."""
    return _NAME.fullmatch(name) is not None and {word.lower() for word in _WORDS.findall(name)} <= _VOCABULARY


def is_plain(definition: str | None) -> bool:
    """Whether a table holds its own rows, not those that a module makes up."""
    return not str(definition).lstrip().upper().startswith("CREATE VIRTUAL")


def write_known(
    connection: sqlite3.Connection,
    tables: Mapping[str, Collection[str]],
    references: Iterable[tuple[str, str]],
    target: Path,
) -> None:
    """Write a new database with these tables and columns, and with the indexes on them.

    Args:
        connection: The database, outside a transaction.
        tables: Columns of each table that are copied.
        references: Columns that point into ``StringIds``; their definitions say so, as those of exports do.
        target: Is made.
    """
    connection.execute("ATTACH DATABASE ? AS kept", (str(target),))
    connection.execute("PRAGMA kept.synchronous = OFF")
    connection.execute("BEGIN")
    told = set(references)
    for table, columns in tables.items():
        rows = connection.execute(f'PRAGMA main.table_info("{table}")').fetchall()
        keys = sum(bool(row[5]) for row in rows)
        kept = [_column(row, alone=keys == 1, told=(table, row[1]) in told) for row in rows if row[1] in columns]
        names = ", ".join(f'"{row[1]}"' for row in rows if row[1] in columns)
        connection.execute(f'CREATE TABLE kept."{table}" (\n{_listed(kept)})')
        connection.execute(f'INSERT INTO kept."{table}" ({names}) SELECT {names} FROM main."{table}"')
        for statement in _indexes(connection, table, columns):
            connection.execute(statement)
    connection.execute("COMMIT")
    connection.execute("DETACH DATABASE kept")


def _column(row: tuple[int, str, str, int, str | None, int], *, alone: bool, told: bool) -> tuple[str, str]:
    """A column's definition without default and checks, and the comment behind it."""
    _, name, declared, required, _, key = row
    kind = _affinity(declared)
    kind += " NOT NULL" if required else ""
    kind += " PRIMARY KEY" if key and alone and declared.upper() == "INTEGER" else ""
    return f'"{name}" {kind}', " -- REFERENCES StringIds(id)" if told else ""


def _listed(columns: list[tuple[str, str]]) -> str:
    last = len(columns) - 1
    return "".join(
        f"{column}{',' if number < last else ''}{comment}\n" for number, (column, comment) in enumerate(columns)
    )


def _affinity(declared: str) -> str:
    """The type that keeps values as a declared one has kept them; the declared one may hold any words."""
    upper = declared.upper()
    for part, kind in _AFFINITIES:
        if part in upper:
            return kind
    if any(part in upper for part in _FRACTIONS):
        return "REAL"
    return "NUMERIC" if declared else ""


def _indexes(connection: sqlite3.Connection, table: str, columns: Collection[str]) -> Iterator[str]:
    """Indexes over kept columns alone; conditions and expressions are texts of somebody."""
    for _, name, unique, origin, partial in connection.execute(f'PRAGMA main.index_list("{table}")').fetchall():
        if origin != "c" or partial or not is_known(name):
            continue
        over = [row[2] for row in connection.execute(f'PRAGMA main.index_info("{name}")')]
        if all(column in columns for column in over):
            listed = ", ".join(f'"{column}"' for column in over)
            yield f'CREATE {"UNIQUE " if unique else ""}INDEX kept."{name}" ON "{table}" ({listed})'

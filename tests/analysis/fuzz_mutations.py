"""Traces damaged on purpose: bytes, numbers, texts, schemas, declared lengths and packing that no profiler writes.

Everything is drawn from a `random.Random`, so that hypothesis can drive it as well as a seed. Each function returns the
content of one file.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
import struct
import tempfile
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from tests.analysis.nsys_files import export_of_everything
from tests.analysis.profiler_traces import expert_parallel
from tests.support.run_folders import good_run

__all__ = ["FORMS", "mutated", "samples"]

_NUMBERS = (-1, 0, 1, 34, 255, 1 << 31, -(1 << 31), 1 << 40, 1 << 53, 1 << 61, 1 << 62, (1 << 63) - 1, -(1 << 63))
_SQL_VALUES = (
    *map(str, _NUMBERS), "NULL", "1.5", "-0.0", "9e999", "-9e999", "'soon'", "'7'", "''", "x''", "x'00ff'",
    "CAST(x'eda080' AS TEXT)", "CAST(x'410042' AS TEXT)", "'rank=0'", "'ProfilerStep#4'", "'moe_eplb'", "'9'",
    "hex(zeroblob(3000))", "zeroblob(3000)", "start", "rowid", "rowid * 1000000007", "-rowid", "rowid << 40",
)  # fmt: skip
_LIKELY = (
    "start", "rowid", "(rowid * 7919) % 60000", "start + (rowid * 7919) % 5000", "start + 1152921504606846976 / 4000",
    "start - 1152921504606846976 / 4000", "rowid % 3", "1", "7", "9", "-1", "0", "(rowid * 7919) % 60000 * 38000000000",
    str(2**48 + (801 << 24)), str(2**48 + (802 << 24)), str(2**48 + (802 << 24) + 5), "10 + rowid % 20", "100 + rowid",
)  # fmt: skip
"""What could stand there: such files are read, and damaged only in what they mean."""
_ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n)"
_JSON_TOKENS = (
    *map(str, _NUMBERS), str(1 << 63), str(1 << 64), "-0", "0.0005", "1e3", "1e999", "-1e999", "1E-400", "NaN",
    "Infinity", "8796093022208.5", "4503599627370495.999", "null", "true", '""', '"7"', '"ns:5"', '"\\ud800"',
    '"\\u0000"', '"X"', '"kernel"', '"cuda_sync"', '"gpu_memset"', '"overhead"', '"ProfilerStep#1"', "[]", "{}",
    '{"rank": -3}', "[" * 900 + "]" * 900, "[" * 2000 + "]" * 2000, "[" * 3000, "9" * 5000, "0." + "9" * 5000,
    '"' + "a" * 9000 + '"', '"\xff"', "", '1, "ts": 2, "name": 3', '"x", "args": {"stream": 4}, "args": null',
)  # fmt: skip
_MARK = "here it comes "


@cache
def samples() -> dict[str, bytes]:
    """One small good file of each format that is read here."""
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        folder = Path(name)
        run = good_run().write(folder / "run")
        return {
            "nsys": export_of_everything().write(folder / "s").read_bytes(),
            "records": (run / "trace.sqlite").read_bytes(),
            "json": expert_parallel(layers=1, steps=2).write(folder / "t.json").read_bytes(),
        }


def mutated(form: str, chance: Random) -> bytes:
    """A damaged file of one of `FORMS`."""
    return FORMS[form](chance)


# -- SQLite --------------------------------------------------------------------------------------------------------


def _sql(sample: str) -> Callable[[Random], bytes]:
    def damaged(chance: Random) -> bytes:
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
            connection.deserialize(samples()[sample])
            connection.execute("PRAGMA writable_schema = ON")
            for _ in range(chance.randint(1, 4)):
                statements = chance.choice(_STATEMENTS)(chance, *_table_and_column(connection, chance))
                for statement in statements:
                    with suppress(sqlite3.Error, sqlite3.Warning, UnicodeDecodeError):
                        connection.execute(statement)  # a statement that does not fit leaves the file as it is
            return connection.serialize()

    return damaged


def _table_and_column(connection: sqlite3.Connection, chance: Random) -> tuple[str, str]:
    connection.text_factory = lambda raw: raw.decode(errors="replace")
    with suppress(sqlite3.Error):
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
        table = str(chance.choice(tables)[0])
        columns = connection.execute(f'PRAGMA table_info("{table}")').fetchall()
        return table, str(chance.choice(columns)[1]) if columns else "start"
    return "StringIds", "id"  # a schema that cannot be read any more


def _update(chance: Random, table: str, column: str) -> list[str]:
    where = chance.choice(("", " WHERE rowid = 1", " WHERE rowid % 2 = 0", " WHERE rowid = 3"))
    return [f'UPDATE "{table}" SET "{column}" = {chance.choice(_SQL_VALUES)}{where}']


def _likely(chance: Random, table: str, column: str) -> list[str]:
    where = chance.choice(("", "", " WHERE rowid = 1", " WHERE rowid % 2 = 0", " WHERE rowid = 3"))
    changed = [f'UPDATE "{table}" SET "{column}" = {chance.choice(_LIKELY)}{where}']
    if column == "start" and chance.random() < 0.8:
        changed.append(f'UPDATE "{table}" SET "end" = start + (rowid * 31) % 997 WHERE "end" < start')
    return changed


def _rows(chance: Random, table: str, column: str) -> list[str]:
    copies = f'INSERT INTO "{table}" SELECT * FROM "{table}"'
    return [chance.choice((copies, f'DELETE FROM "{table}"', f'DELETE FROM "{table}" WHERE rowid % 2 = 0'))]


def _shape(chance: Random, table: str, column: str) -> list[str]:
    value = chance.choice(_SQL_VALUES)
    return chance.choice(
        (
            [f'DROP TABLE "{table}"'],
            [f'ALTER TABLE "{table}" DROP COLUMN "{column}"'],
            [f'ALTER TABLE "{table}" RENAME COLUMN "{column}" TO "{column}_"'],
            [
                f'ALTER TABLE "{table}" DROP COLUMN "{column}"',
                f'ALTER TABLE "{table}" ADD COLUMN "{column}" AS ({value})',
            ],
            [f'ALTER TABLE "{table}" RENAME TO kept', f'CREATE VIEW "{table}" AS SELECT * FROM kept'],
            [
                f'ALTER TABLE "{table}" RENAME TO kept',
                f'CREATE VIEW "{table}" AS {_ENDLESS} SELECT x AS "{column}" FROM n',
            ],
            [f'ALTER TABLE "{table}" RENAME TO kept', f'CREATE VIEW "{table}" AS SELECT * FROM "{table}"'],
            [f'ALTER TABLE "{table}" RENAME TO kept', f'CREATE TABLE "{table}" AS SELECT *, 5 AS extra FROM kept'],
            [f'CREATE TRIGGER t AFTER INSERT ON "{table}" BEGIN INSERT INTO "{table}" SELECT * FROM "{table}"; END'],
            [f'CREATE INDEX i ON "{table}" (abs("{column}"))'],
            [f'CREATE TABLE EPLB_RECORD AS SELECT * FROM "{table}"'],
        )
    )


def _schema(chance: Random, table: str, column: str) -> list[str]:
    column = chance.choice(("sql", "name", "tbl_name", "rootpage", "type"))
    texts = (
        "'CREATE TABLE x ('", "'CREATE VIEW x AS SELECT 1'", "'CREATE VIRTUAL TABLE x USING fts5(a)'", "'a''b\"c'",
        "replace(sql, 'end', 'end AS (randomblob(9))')", "replace(sql, '(', '(start PRIMARY KEY, ')", "'table'",
        "replace(sql, ')', ') WITHOUT ROWID')", "substr(sql, 1, length(sql) / 2)", *_SQL_VALUES,
    )  # fmt: skip
    return [f"UPDATE sqlite_master SET {column} = {chance.choice(texts)} WHERE name = '{table}'"]


_STATEMENTS: tuple[Callable[[Random, str, str], list[str]], ...] = (
    *(_likely,) * 6, *(_update,) * 3, _rows, _shape, _schema,
)  # fmt: skip


def _sql_bytes(sample: str) -> Callable[[Random], bytes]:
    def damaged(chance: Random) -> bytes:
        content = bytearray(samples()[sample])
        for _ in range(chance.randint(1, 8)):
            chance.choice((_header, _page, _page, _cell, _cell))(chance, content)
        return bytes(content)

    return damaged


def _header(chance: Random, content: bytearray) -> None:
    """Page size, counts of pages, freelist, schema version, encoding and the rest of the first hundred bytes."""
    at = chance.choice((16, 18, 19, 20, 21, 24, 28, 32, 36, 44, 48, 52, 56, 60, 64, 68, 92, 96))
    content[at : at + 2] = struct.pack(">H", chance.choice((0, 1, 2, 3, 512, 4096, 0x7FFF, 0xFFFF)))


def _page(chance: Random, content: bytearray) -> None:
    """The kind, the freeblock, the number of cells, or a pointer of some page."""
    page = chance.randrange(max(1, len(content) // 4096)) * 4096
    at = min(page + (100 if not page else 0) + chance.randint(0, 24), len(content) - 1)
    content[at] = chance.choice((0, 1, 2, 5, 10, 13, 127, 128, 255))


def _cell(chance: Random, content: bytearray) -> None:
    """Bytes where cells are, some as huge lengths in SQLite's own way of writing numbers."""
    page = (chance.randrange(max(1, len(content) // 4096)) + 1) * 4096
    at = max(100, page - chance.randint(1, 600))
    long = b"\xff\xff\xff\xff\x7f", b"\x87\xff\xff\xff\x7f", b"\xff" * 9, b"\x81\x80\x80\x80\x80\x00"
    piece = chance.choice((*long, bytes([chance.randrange(256)]), bytes([chance.randrange(256)])))
    content[at : at + len(piece)] = piece


# -- JSON ----------------------------------------------------------------------------------------------------------


def _json_values(chance: Random) -> bytes:
    document = json.loads(samples()["json"])
    tokens: list[str] = []
    for _ in range(chance.randint(1, 5)):
        _replace(chance, document, f"{_MARK}{len(tokens)}")
        likely = str(chance.randint(-1, 3000)), f"{chance.randint(0, 3000)}.25", str(chance.choice((7, 20, 10**12)))
        tokens.append(chance.choice((*likely, *likely, *likely, *likely, chance.choice(_JSON_TOKENS))))
    bare = chance.random() < 0.1
    text = json.dumps(document["traceEvents"] if bare else document, indent=chance.choice((None, 1)))
    for number, token in enumerate(tokens):
        text = text.replace(f'"{_MARK}{number}"', token)
    return text.encode("latin-1")


def _replace(chance: Random, document: dict[str, Any], mark: str) -> None:
    """Put a mark in the place of a value, under a key that is there or could be."""
    events = document["traceEvents"]
    if chance.random() < 0.15 or not isinstance(events, list) or not events:
        document[chance.choice((*document, "baseTimeNanoseconds", "x"))] = mark
        return
    at = chance.randrange(len(events))
    event = events[at]
    if not isinstance(event, dict) or chance.random() < 0.05:
        events[at] = mark
        return
    within = event.get("args")
    if isinstance(within, dict) and chance.random() < 0.4:
        event = within
    keys = ("ph", "cat", "name", "ts", "dur", "tid", "pid", "args", "graph node id", "bytes")
    event[chance.choice((*event, *keys))] = mark


def _json_text(chance: Random) -> bytes:
    return _damaged_text(chance, samples()["json"])


def _damaged_text(chance: Random, whole: bytes) -> bytes:
    content = bytearray(whole)
    for _ in range(chance.randint(1, 5)):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(6):
            case 0:
                del content[at:]
            case 1:
                del content[at : at + chance.randint(1, 400)]
            case 2:
                piece = (b"\xff", b"\xed\xa0\x80", b"\0", b"[" * 3000, b'{"a":' * 50, b"]", b"}", b'"', b"\\", b",")
                content[at:at] = chance.choice(piece)
            case 3:
                content[at:at] = content[: chance.randint(0, 3000)]
            case 4:
                content[at : at + 1] = bytes([chance.randrange(256)])
            case _:
                content[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(content)


# -- gzip ----------------------------------------------------------------------------------------------------------


def _gzip(chance: Random) -> bytes:
    whole = samples()[chance.choice(("json", "json", "nsys", "records"))]
    inner = chance.choice((lambda: whole, lambda: _json_values(chance), lambda: _damaged_text(chance, whole)))()
    packed = gzip.compress(inner, 1, mtime=0)
    match chance.randrange(7):
        case 0:
            half = chance.randrange(len(inner) + 1)
            packed = b"".join(gzip.compress(part, 1) for part in (inner[:half], inner[half:]))
        case 1:
            packed += chance.choice((b"\0" * 700, b"more", gzip.compress(b""), packed, b"\x1f\x8b"))
        case 2:
            packed = packed[: chance.randrange(len(packed))] or b"\x1f\x8b"
        case 3:
            at = chance.randrange(len(packed) - 8, len(packed))  # checksum and length
            packed = packed[:at] + bytes([packed[at] ^ (1 << chance.randrange(8))]) + packed[at + 1 :]
        case 4:
            packed = packed[:3] + bytes([chance.randrange(256)]) + packed[4:]  # flags
        case 5:
            packed = _damaged_text(chance, packed)
        case _:
            packed = _bomb(chance)
    return packed


def _bomb(chance: Random) -> bytes:
    """A few KB that unpack to some MB."""
    start = chance.choice(
        (b"", b"{", b'{"a": "', b'{"traceEvents": [', b'{"traceEvents": [{"ph": "', b"SQLite format 3\0")
    )
    filler = chance.choice((b" ", b"\0", b"[", b'"', b'{"ph":"M"},', b'{"a":'))
    packer = zlib.compressobj(9, wbits=31)
    return packer.compress(start + filler * (3_000_000 // len(filler))) + packer.flush()


FORMS: dict[str, Callable[[Random], bytes]] = {
    "nsys tables": _sql("nsys"),
    "nsys pages": _sql_bytes("nsys"),
    "records tables": _sql("records"),
    "records pages": _sql_bytes("records"),
    "json values": _json_values,
    "json text": _json_text,
    "gzip": _gzip,
}
"""What is damaged, and how."""

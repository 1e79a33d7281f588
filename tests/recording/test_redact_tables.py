"""Redaction of databases: names of tables and definitions that tell of somebody go, captures lose nothing."""

from __future__ import annotations

import lzma
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from eplbctl.cli import invoke
from moe_eplb.analysis.readers.nsys import TABLES as READ
from moe_eplb.analysis.writers import sqlite_schema
from moe_eplb.recording import nsys_schema
from moe_eplb.recording.redact import redact
from moe_eplb.recording.redact_schema import is_known
from tests.support.planted import plant_export

RECORDED = sorted((Path(__file__).parents[2] / "traces" / "recorded").glob("*.nsys.sqlite.xz"))
DEFINITIONS = {
    "table": "CREATE TABLE runs_of_qqalice (start INTEGER)",
    "table with an index": "CREATE TABLE qqalice (start INTEGER PRIMARY KEY, end INTEGER UNIQUE)",
    "table in quotes": """CREATE TABLE "a ""qqalice'; --" (start INTEGER)""",
    "column in quotes": """CREATE TABLE CUDA_EVENTS ("a ""qqalice" TEXT, start INTEGER)""",
    "enum": "CREATE TABLE ENUM_QQALICE (id INTEGER, name TEXT)",
    "view": "CREATE VIEW seen_by_qqalice AS SELECT start FROM NVTX_EVENTS",
    "view in quotes": 'CREATE VIEW "a ""qqalice" AS SELECT start FROM NVTX_EVENTS',
    "column": "ALTER TABLE NVTX_EVENTS ADD COLUMN qqaliceTime INTEGER",
    "column of a known table": "CREATE TABLE CUDA_EVENTS (start INTEGER, qqalice TEXT)",
    "default": "CREATE TABLE CUDA_EVENTS (start INTEGER, name TEXT DEFAULT 'qqalice')",
    "check": "CREATE TABLE CUDA_EVENTS (start INTEGER, name TEXT CHECK (name <> 'qqalice'))",
    "type": "CREATE TABLE CUDA_EVENTS (start QQALICE_INT)",
    "comment": "CREATE TABLE CUDA_EVENTS (start INTEGER -- REFERENCES StringIds(id) for qqalice\n)",
    "constraint": "CREATE TABLE CUDA_EVENTS (id INTEGER CONSTRAINT qqalice PRIMARY KEY)",
    "generated": "CREATE TABLE CUDA_EVENTS (start INTEGER, end INTEGER AS (start + length('qqalice')))",
    "index": "CREATE INDEX of_qqalice ON NVTX_EVENTS (start)",
    "condition": "CREATE INDEX NVTX_EVENTS_TEXT ON NVTX_EVENTS (start) WHERE text <> 'qqalice'",
    "expression": "CREATE INDEX NVTX_EVENTS_TEXT ON NVTX_EVENTS (start || 'qqalice')",
    "trigger": "CREATE TRIGGER qqalice AFTER UPDATE ON NVTX_EVENTS BEGIN SELECT 1; END",
    "numbers": "CREATE TABLE qqalice (id INTEGER PRIMARY KEY AUTOINCREMENT); INSERT INTO qqalice DEFAULT VALUES",
    "statistics": "CREATE TABLE qqalice (id INTEGER UNIQUE); INSERT INTO qqalice VALUES (1); ANALYZE",
    "search": "CREATE VIRTUAL TABLE NVTX_TEXT USING fts5(text); INSERT INTO NVTX_TEXT VALUES ('qqalice')",
    "search by name": "CREATE VIRTUAL TABLE qqalice USING fts5(text)",
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_no_name_and_no_definition_keeps_it(name: str, tmp_path: Path) -> None:
    path = tmp_path / "nsys.sqlite"
    plant_export(path, "harmless")
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(DEFINITIONS[name])
        connection.commit()
    assert b"qqalice" in path.read_bytes().lower()
    removed = redact(path)
    assert b"qqalice" not in path.read_bytes().lower() + str(removed).lower().encode()
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT start, text FROM NVTX_EVENTS WHERE domainId = 1").fetchall() == [
            (0, "moe_eplb"), (3, "route/3")
        ]  # fmt: skip
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert redact(path) == []


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    path = tmp_path / "nsys.sqlite"
    plant_export(path, "harmless")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE CUDA_EVENTS (start INTEGER, qqalice TEXT)")
        connection.execute("CREATE TABLE qqalice (start INTEGER)")
        connection.commit()
    assert {"tables that are not known: 1", "columns that are not known: 1"} <= set(redact(path))


def test_rows_keep_their_types_and_order(tmp_path: Path) -> None:
    path = tmp_path / "nsys.sqlite"
    rows = [(3, 1.5, "7", 7, None), (1, 2.0, "x", "8", b"\x00")]
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TABLE CUDA_EVENTS (id INT PRIMARY KEY, rate DOUBLE, name VARCHAR(9), value, data BLOB)"
        )
        connection.execute("CREATE INDEX CUDA_EVENT_ORDER ON CUDA_EVENTS (rate, id)")
        connection.executemany("INSERT INTO CUDA_EVENTS VALUES (?, ?, ?, ?, ?)", rows)
        connection.commit()
    redact(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT * FROM CUDA_EVENTS").fetchall() == rows
        assert connection.execute("PRAGMA index_info(CUDA_EVENT_ORDER)").fetchall() == [(0, 1, "rate"), (1, 0, "id")]


def test_every_name_that_is_read_or_written_is_known() -> None:
    for tables in (nsys_schema.TABLES, sqlite_schema.TABLES):
        assert [name for table, columns in tables.items() for name in (table, *columns) if not is_known(name)] == []
    assert [table for table in READ if not is_known(table)] == []


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.name)
def test_recorded_captures_lose_nothing(path: Path, tmp_path: Path) -> None:
    plain = tmp_path / "nsys.sqlite"
    plain.write_bytes(lzma.decompress(path.read_bytes()))
    with closing(sqlite3.connect(plain)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        before = {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in tables}
    assert redact(plain) == []
    with closing(sqlite3.connect(plain)) as connection:
        assert {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in tables} == before


@pytest.mark.parametrize("path", RECORDED[:1] + RECORDED[-1:], ids=lambda path: path.name)
def test_a_report_says_the_same_of_a_redacted_capture(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = Path("nsys.sqlite")
    plain.write_bytes(lzma.decompress(path.read_bytes()))
    with closing(sqlite3.connect(plain)) as connection:
        connection.execute("CREATE TABLE qqalice (start INTEGER)")
        connection.execute("UPDATE META_DATA_CAPTURE SET value = 'tcp://qqnode17:29500' WHERE rowid = 1")
        connection.commit()
    code = invoke(["report", str(plain)])
    before = capsys.readouterr().out
    assert "Overlap" in before
    assert redact(plain) != []
    assert invoke(["report", str(plain)]) == code
    assert capsys.readouterr().out == before

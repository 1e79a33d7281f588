"""Exports of Nsight Systems with a text planted wherever one can be."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

__all__ = ["plant_export"]


def plant_export(path: Path, text: str, encoding: str = "UTF-8") -> None:
    """Write an export that holds `text` in every column of text, beside ranges of our own domain."""
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            f"""
            PRAGMA encoding = '{encoding}';
            CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
            CREATE TABLE META_DATA_CAPTURE (name TEXT NOT NULL, value TEXT);
            CREATE TABLE PROCESSES (globalPid INTEGER, pid INTEGER, name TEXT);
            CREATE TABLE DIAGNOSTIC_EVENT (timestamp INTEGER, text TEXT);
            CREATE TABLE ENUM_NSYS_EVENT_TYPE (id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT);
            CREATE TABLE NVTX_EVENTS (
                start INTEGER NOT NULL, end INTEGER, eventType INTEGER, text TEXT, globalTid INTEGER, textId INTEGER,
                domainId INTEGER, jsonText TEXT, binaryData TEXT
            );
            INSERT INTO NVTX_EVENTS VALUES (0, NULL, 75, 'moe_eplb', 16777216, NULL, 1, NULL, NULL);
            INSERT INTO NVTX_EVENTS VALUES (3, 4, 59, 'route/3', 16777216, NULL, 1, NULL, NULL);
            """
        )
        insert = connection.execute
        insert("INSERT INTO StringIds VALUES (1, ?), (2, ?)", (text, text))
        insert("INSERT INTO META_DATA_CAPTURE VALUES (?, '1'), ('NOTE', ?)", (text, text))
        insert("INSERT INTO PROCESSES VALUES (16777216, 1, ?)", (text,))
        insert("INSERT INTO DIAGNOSTIC_EVENT VALUES (1, ?)", (text,))
        insert("INSERT INTO ENUM_NSYS_EVENT_TYPE VALUES (1, ?, ?)", (text, text))
        nested = json.dumps({"note": text, text: 1})
        row = (5, 6, 59, text, 16777216, 1, 2, nested, text.encode())
        insert("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.commit()

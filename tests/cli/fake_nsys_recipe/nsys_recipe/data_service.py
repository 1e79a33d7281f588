"""Tables of a report as pandas frames, out of an export that lies beside the report."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas as pd

from nsys_recipe.log import logger


class DataService:
    """As documented: tables are queued, and read together; there is no answer if one of them cannot be read."""

    def __init__(self, report_path: str, parsed_args: Any = None) -> None:
        self._report_path = report_path
        self._queued: dict[str, list[str] | None] = {}

    def queue_table(self, table: str, columns: list[str] | None = None) -> None:
        """Ask for a table, whole if no columns are named."""
        self._queued[table] = columns

    def read_queued_tables(
        self, refine: bool = True, clear_queued_tables: bool = True, hints: dict[str, Any] | None = None
    ) -> dict[str, pd.DataFrame] | None:
        """All queued tables, or None. Refining would take numbers of threads apart."""
        assert not refine, "globalTid is needed whole"
        queued = dict(self._queued)
        if clear_queued_tables:
            self._queued.clear()
        found = {}
        with closing(
            sqlite3.connect(f"{Path(self._report_path).with_suffix('.sqlite').as_uri()}?mode=ro", uri=True)
        ) as c:
            for table, columns in queued.items():
                try:
                    frame = pd.read_sql_query(f'SELECT * FROM "{table}"', c)
                    found[table] = frame[columns].copy() if columns else frame.copy()
                except (pd.errors.DatabaseError, sqlite3.Error, KeyError) as error:
                    logger.error("%s: %s", self._report_path, error)
                    return None
        return found

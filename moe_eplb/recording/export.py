"""A run folder's event logs as one SQLite file with the tables of an Nsight Systems export."""

from __future__ import annotations

import datetime
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import STREAMS
from moe_eplb.recording import nsys_schema
from moe_eplb.recording.aligned_log import AlignedLog, align
from moe_eplb.recording.log_format import read_log
from moe_eplb.recording.rows import Strings, kernel_rows, nvtx_rows, record_rows

__all__ = ["write_trace"]

SCHEMA_VERSION = "3.11.0"


def write_trace(folder: Path) -> Path:
    """Write ``trace.sqlite`` from ``events.rank*.bin`` and ``meta.json``, replacing an older one.

    The same logs give the same rows in the same order. Times are ns since the earliest rank's log was opened.

    Raises:
        TraceError: there is no log, or one of the files is damaged.
    """
    paths = sorted(folder.glob("events.rank*.bin"))
    if not paths:
        raise TraceError("E051", "the run folder holds no event log", why="no events.rank*.bin", where=str(folder))
    logs, epoch = align([read_log(path) for path in paths])
    meta = _read_meta(folder / "meta.json")
    target = folder / "trace.sqlite"
    partial = folder / "trace.sqlite.partial"
    partial.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(partial)) as connection:
            _write(connection, logs, epoch, meta)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TraceError("E054", "meta.json is damaged", why=str(error), where=str(path)) from error
    if not isinstance(meta, dict):
        raise TraceError("E054", "meta.json is no object", why=type(meta).__name__, where=str(path))
    return meta


def _write(connection: sqlite3.Connection, logs: list[AlignedLog], epoch: int, meta: dict[str, Any]) -> None:
    for statement in nsys_schema.create_statements():
        connection.execute(statement)
    strings = Strings()
    _insert(connection, "ENUM_NSYS_EVENT_TYPE", [(key, *names) for key, names in nsys_schema.EVENT_TYPES.items()])
    _insert(connection, "META_DATA_CAPTURE", _capture(logs, meta))
    _insert(connection, "META_DATA_EXPORT", [("EXPORT_SCHEMA_VERSION", SCHEMA_VERSION), ("EXPORT_TOOL", "moe_eplb")])
    utc = datetime.datetime.fromtimestamp(epoch / 1e9, datetime.UTC).isoformat()
    _insert(connection, "TARGET_INFO_SESSION_START_TIME", [(epoch, utc, utc)])
    for log in logs:
        _write_rank(connection, log, strings)
    _insert(connection, "StringIds", strings.rows())
    connection.execute("CREATE INDEX EPLB_RECORD_ORDER ON EPLB_RECORD (rank, seq)")
    connection.commit()


def _write_rank(connection: sqlite3.Connection, log: AlignedLog, strings: Strings) -> None:
    rank, pid = log.rank, log.header.pid
    _insert(connection, "TARGET_INFO_GPU", [(rank, f"rank {rank}", 0)])
    streams = sorted({int(s) for s in np.unique(log.records["stream"])} & set(range(len(STREAMS))))
    _insert(connection, "TARGET_INFO_CUDA_STREAM", [(s, 0, rank, pid, 1, 0, 0) for s in streams])
    _insert(connection, "TARGET_INFO_NVTX_CUDA_STREAM", [(s, 0, rank, pid, 1, STREAMS[s]) for s in streams])
    _insert(connection, "PROCESSES", [(log.global_pid, pid, f"moe_eplb rank {rank}")])
    threads = sorted({int(t) for t in np.unique(log.records["thread"])})
    names = [(strings.id(f"thread {t}" if t != pid else "model"), 0, log.global_tid(t)) for t in threads]
    _insert(connection, "ThreadNames", names)
    _insert(connection, "NVTX_EVENTS", nvtx_rows(log, strings))
    _insert(connection, "CUPTI_ACTIVITY_KIND_KERNEL", kernel_rows(log, strings))
    _insert(connection, "EPLB_RECORD", record_rows(log))


def _insert(connection: sqlite3.Connection, table: str, rows: list[tuple[Any, ...]]) -> None:
    marks = ", ".join("?" * len(nsys_schema.TABLES[table]))
    connection.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)


def _capture(logs: list[AlignedLog], meta: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the trace comes from, and for each rank what the recording cost and lost."""
    rows = [("EPLB_RANKS", " ".join(str(log.rank) for log in logs))]
    for log in logs:
        prefix = f"EPLB_RANK_{log.rank}_"
        overhead = log.header.overhead_ps
        rows += [
            (prefix + "RECORDS", str(len(log.records))),
            (prefix + "DROPPED", str(log.header.dropped + log.holes)),
            (prefix + "CLOSED", str(int(log.header.closed))),
            (prefix + "OVERHEAD_NS_PER_RECORD", str(overhead / 1000) if overhead >= 0 else "unknown"),
            (prefix + "CLOCK_OFFSET_NS", str(log.header.clock.utc - log.header.clock.monotonic)),
        ]
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in sorted(meta.items())}
    return rows + [(f"EPLB_META_{key.upper()}", value) for key, value in values.items()]

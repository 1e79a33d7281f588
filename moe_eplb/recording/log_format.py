"""Layout of a rank's event log, and reading it back, also while the rank that writes it is alive or already dead."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import HOST, KINDS, RECORD, STREAMS, UPDATER

__all__ = ["HEADER", "HEADER_BYTES", "Clock", "LastEvent", "LogHeader", "last_event", "read_log", "sample_clock"]

MAGIC = b"EPLBLOG\0"
VERSION = 1
HEADER_BYTES = 4096
"""Rows start on a page boundary."""
HEADER = struct.Struct("<8sIIQqqQqQQ")
DROPPED_OFFSET = 40
CLOSED_OFFSETS = struct.Struct("<QqQQ")
"""The fields from `DROPPED_OFFSET` on, rewritten when the log is closed: dropped, overhead, pid, closed."""

_NAMES = {int(kind): info.name for kind, info in KINDS.items()}


_STREAM_NAMES = {HOST: "the host", UPDATER: "the updater", **dict(enumerate(STREAMS))}


class Clock(NamedTuple):
    """Two clocks read at one moment, both in ns: CLOCK_MONOTONIC of the host and UTC since the epoch."""

    monotonic: int
    utc: int


class LogHeader(NamedTuple):
    """First bytes of a log. `overhead_ps` is picoseconds per record, -1 while it was never measured."""

    rank: int
    capacity: int
    clock: Clock
    dropped: int
    overhead_ps: int
    pid: int
    closed: bool

    def pack(self) -> bytes:
        """The header as it stands in the file."""
        return HEADER.pack(
            MAGIC,
            VERSION,
            self.rank,
            self.capacity,
            *self.clock,
            self.dropped,
            self.overhead_ps,
            self.pid,
            self.closed,
        )


class LastEvent(NamedTuple):
    """The record that was opened last in a log; `open` is true while its range has no end.

    `age_ns` is the time since that record began or, once it ended, since its end.
    """

    sequence: int
    name: str
    layer: int
    iteration: int
    stream: int
    open: bool
    age_ns: int

    def __str__(self) -> str:
        where = f"layer {self.layer}, " if self.layer >= 0 else ""
        state = "begun" if self.open else "ended"
        stream = _STREAM_NAMES.get(self.stream, f"stream {self.stream}")
        return f"{self.name}, {where}iteration {self.iteration}, on {stream}, {state} {self.age_ns / 1e6:.1f} ms ago"


def sample_clock() -> Clock:
    """Both clocks at one moment: the tightest of a few bracketed readings, so that a preemption does not skew them."""
    readings = []
    for _ in range(5):
        before = time.perf_counter_ns()
        utc = time.time_ns()
        after = time.perf_counter_ns()
        readings.append((after - before, (before + after) // 2, utc))
    _, monotonic, utc = min(readings)
    return Clock(monotonic, utc)


def read_log(path: Path) -> tuple[LogHeader, np.ndarray]:
    """Header and used rows (`RECORD`, copied) of a log, closed or not.

    Rows that a killed rank had claimed but not begun to write keep a start of 0.

    Raises:
        TraceError: the file is missing, not a log, or its size does not fit its header.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise TraceError("E051", "an event log is missing", where=str(path)) from error
    header = _unpack_header(data, path)
    body = len(data) - HEADER_BYTES
    rows, rest = divmod(body, RECORD.itemsize)
    if rest or rows > header.capacity or (not header.closed and rows != header.capacity):
        raise TraceError(
            "E052",
            "an event log is truncated or damaged",
            why=f"{body} bytes of rows, a row has {RECORD.itemsize}, capacity {header.capacity} rows",
            where=str(path),
        )
    records = np.frombuffer(data, RECORD, rows, HEADER_BYTES)
    return header, records[: _used(records)].copy()


def last_event(path: Path) -> LastEvent | None:
    """What a rank was doing last, read from another process; None when it has recorded nothing."""
    _, records = read_log(path)
    if not len(records):
        return None
    row = records[-1]
    name = _NAMES.get(int(row["kind"]), str(row["kind"]))
    is_open = int(row["end"]) == 0
    age = time.perf_counter_ns() - int(row["start"] if is_open else row["end"])
    place = (int(row["layer"]), int(row["iteration"]), int(row["stream"]))
    return LastEvent(len(records) - 1, name, *place, is_open, age)


def _used(records: np.ndarray) -> int:
    written = np.flatnonzero(records["start"])
    return int(written[-1]) + 1 if len(written) else 0


def _unpack_header(data: bytes, path: Path) -> LogHeader:
    if len(data) < HEADER_BYTES:
        raise TraceError(
            "E052", "an event log has no header", why=f"{len(data)} of {HEADER_BYTES} bytes", where=str(path)
        )
    magic, version, rank, capacity, monotonic, utc, dropped, overhead, pid, closed = HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        why = f"magic {magic!r} version {version}, expected {MAGIC!r} version {VERSION}"
        raise TraceError("E052", "this is no event log of this version", why=why, where=str(path))
    return LogHeader(rank, capacity, Clock(monotonic, utc), dropped, overhead, pid, bool(closed))

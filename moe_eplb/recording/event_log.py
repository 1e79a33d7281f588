"""A rank's event log: fixed rows in a memory-mapped file, so that nothing recorded is lost when the rank is killed."""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import struct
import threading
import time
from pathlib import Path
from types import TracebackType

from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import HOST, RECORD, Kind
from moe_eplb.recording import nvtx_ranges
from moe_eplb.recording.log_format import (
    CLOSED_OFFSETS,
    DROPPED_OFFSET,
    HEADER_BYTES,
    LastEvent,
    LogHeader,
    last_event,
    sample_clock,
)

__all__ = ["EventLog", "LastEvent", "last_event"]

_LOG = logging.getLogger(__name__)

# Bound once: this runs twice a record, and attribute look-ups would be a third of its cost.
_now = time.perf_counter_ns
_pack_row = struct.Struct("<qqHHiiIqq").pack_into
_pack_times = struct.Struct("<qq").pack_into
_pack_int64 = struct.Struct("<q").pack_into
_ROW_BYTES = RECORD.itemsize
_END = HEADER_BYTES + 8
_A = HEADER_BYTES + 32
_B = HEADER_BYTES + 40
_NONE = -1
_RESERVED_ROWS = 1 << 15
"""Rows (1.5 MiB) whose disk space is reserved at a time: a page that finds the disk full would kill the process."""


class _Thread(threading.local):
    """The kernel's number of the calling thread, asked for once because asking is a system call."""

    def __init__(self) -> None:
        self.number = threading.get_native_id()


_thread = _Thread()


class _Rows:
    """The recording itself, over any writable buffer of `HEADER_BYTES` plus `capacity` rows.

    Rows are claimed with one atomic step, so the model's thread and the updater's write without a lock.
    A range must be closed by the thread that opened it, innermost first (NVTX pops the innermost).
    """

    def __init__(self, buffer: mmap.mmap | bytearray, capacity: int, nvtx: nvtx_ranges.NvtxRanges | None) -> None:
        self._buffer = buffer
        self._room = capacity
        self._claimed = itertools.count()
        self._claim = self._claimed.__next__
        self._count_dropped = itertools.count(1).__next__
        self._nvtx = nvtx

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        """Open a range and return its token, which is the row's number; -1 when the log is full."""
        row = self._claim()
        if row >= self._room and not self._reserve(row):
            return self._drop()
        if self._nvtx is not None:
            self._nvtx.push(kind, layer, iteration)
        _pack_row(
            self._buffer,
            HEADER_BYTES + row * _ROW_BYTES,
            _now(),
            0,
            kind,
            stream,
            layer,
            iteration,
            _thread.number,
            a,
            b,
        )
        return row

    def end(self, token: int, a: int | None = None, b: int | None = None) -> None:
        """Close a range; payloads that were not known at its start may be given now."""
        now = _now()
        if token < 0:
            return
        offset = token * _ROW_BYTES
        _pack_int64(self._buffer, _END + offset, now)
        if a is not None:
            _pack_int64(self._buffer, _A + offset, a)
        if b is not None:
            _pack_int64(self._buffer, _B + offset, b)
        if self._nvtx is not None:
            self._nvtx.pop()

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        """Record a moment: a row whose end is its start."""
        row = self._claim()
        if row >= self._room and not self._reserve(row):
            self._drop()
            return
        if self._nvtx is not None:
            self._nvtx.mark(kind, layer, iteration)
        now = _now()
        offset = HEADER_BYTES + row * _ROW_BYTES
        _pack_row(self._buffer, offset, now, now, kind, stream, layer, iteration, _thread.number, a, b)

    def place(self, token: int, start: int, end: int) -> None:
        """Put the times at which a device did the work of a closed range in place of those of its submission."""
        if token >= 0:
            _pack_times(self._buffer, HEADER_BYTES + token * _ROW_BYTES, start, end)

    def record(
        self, kind: Kind, layer: int, iteration: int, stream: int, start: int, end: int, a: int = 0, b: int = 0
    ) -> None:
        """Add what a device did on its own, under the thread that learns of it. NVTX hears nothing: there a range says
        what the host did when, and a reader would take this one for a call."""
        row = self._claim()
        if row >= self._room and not self._reserve(row):
            self._drop()
            return
        offset = HEADER_BYTES + row * _ROW_BYTES
        _pack_row(self._buffer, offset, start, end, kind, stream, layer, iteration, _thread.number, a, b)

    def _reserve(self, row: int) -> bool:
        """Make room for a row that has none yet; False when there is no more."""
        return False

    def _drop(self) -> int:
        _pack_int64(self._buffer, DROPPED_OFFSET, self._count_dropped())
        return _NONE


class EventLog(_Rows):
    """An `EventSink` over a file. What was recorded survives the rank's death by any signal.

    What the host does also goes to NVTX (domain ``moe_eplb``, payload = iteration) when a profiler listens. A full log,
    or a log on a full disk, keeps counting what it drops; a log with dropped records never yields a valid call order.

    Args:
        path: File to create; an existing one is replaced.
        rank: Rank that records.
        capacity: Rows (48 bytes each). The file is sparse: unused rows take no disk.

    Raises:
        TraceError: the capacity is below 1 or the file cannot be created.
    """

    def __init__(self, path: Path, rank: int, capacity: int = 1 << 20) -> None:
        if capacity < 1:
            raise TraceError("E053", "an event log needs room for at least one record", why=f"capacity {capacity}")
        self.path = path
        self._capacity = capacity
        self._header = LogHeader(rank, capacity, sample_clock(), 0, -1, os.getpid(), False)
        self._file, buffer = _create(path, self._header)
        super().__init__(buffer, 0, nvtx_ranges.attach())
        self._growing = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Cut the file to the rows used and state the measured cost of a record. Closing twice does nothing.

        No other thread may be recording any more.
        """
        if self._closed:
            return
        self._closed = True
        claimed = self._claim()
        dropped = self._count_dropped() - 1
        buffer = self._buffer
        CLOSED_OFFSETS.pack_into(buffer, DROPPED_OFFSET, dropped, _overhead_ps(), os.getpid(), 1)
        assert isinstance(buffer, mmap.mmap)
        buffer.flush()
        buffer.close()
        os.ftruncate(self._file, HEADER_BYTES + min(claimed, self._room) * _ROW_BYTES)
        os.close(self._file)

    def _reserve(self, row: int) -> bool:
        with self._growing:
            while self._room <= row and self._room < self._capacity:
                rows = min(_RESERVED_ROWS, self._capacity - self._room)
                try:
                    os.posix_fallocate(self._file, HEADER_BYTES + self._room * _ROW_BYTES, rows * _ROW_BYTES)
                except OSError as error:  # what follows is dropped, counted and never part of a valid call order
                    self._capacity = self._room
                    _LOG.error("%s takes no more records: %s", self.path, error.strerror or error)
                else:
                    self._room += rows
            return row < self._room

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _create(path: Path, header: LogHeader) -> tuple[int, mmap.mmap]:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cannot_create(path, error) from error
    try:
        os.ftruncate(file, HEADER_BYTES + header.capacity * _ROW_BYTES)
        os.posix_fallocate(file, 0, HEADER_BYTES)
        buffer = mmap.mmap(file, 0)
    except OSError as error:
        os.close(file)
        raise _cannot_create(path, error) from error
    packed = header.pack()
    buffer[: len(packed)] = packed
    return file, buffer


def _cannot_create(path: Path, error: OSError) -> TraceError:
    return TraceError("E053", "an event log cannot be created", why=error.strerror or str(error), where=str(path))


def _overhead_ps(rounds: int = 9, pairs: int = 200) -> int:
    """Picoseconds that one begin/end pair takes here, without NVTX, into throw-away memory: median of rounds."""
    rows = _Rows(bytearray(HEADER_BYTES + rounds * pairs * _ROW_BYTES), rounds * pairs, None)
    costs = []
    for _ in range(rounds):
        before = _now()
        for _ in range(pairs):
            rows.end(rows.begin(Kind.STEP, 0, 0, HOST))
        costs.append((_now() - before) * 1000 // pairs)
    return sorted(costs)[rounds // 2]

"""A rank's event log: fixed rows in a memory-mapped file, so that nothing recorded is lost when the rank is killed."""

from __future__ import annotations

import itertools
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

# Bound once: this runs twice a record, and attribute look-ups would be a third of its cost.
_now = time.perf_counter_ns
_pack_row = struct.Struct("<qqHHiiIqq").pack_into
_pack_int64 = struct.Struct("<q").pack_into
_ROW_BYTES = RECORD.itemsize
_END = HEADER_BYTES + 8
_A = HEADER_BYTES + 32
_B = HEADER_BYTES + 40
_NONE = -1


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
        self._capacity = capacity
        self._claimed = itertools.count()
        self._claim = self._claimed.__next__
        self._nvtx = nvtx

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        """Open a range and return its token, which is the row's number; -1 when the log is full."""
        row = self._claim()
        if row >= self._capacity:
            return self._drop(row)
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
        if row >= self._capacity:
            self._drop(row)
            return
        if self._nvtx is not None:
            self._nvtx.mark(kind, layer, iteration)
        now = _now()
        offset = HEADER_BYTES + row * _ROW_BYTES
        _pack_row(self._buffer, offset, now, now, kind, stream, layer, iteration, _thread.number, a, b)

    def _drop(self, row: int) -> int:
        _pack_int64(self._buffer, DROPPED_OFFSET, row - self._capacity + 1)
        return _NONE


class EventLog(_Rows):
    """An `EventSink` over a file. What was recorded survives the rank's death by any signal.

    Ranges also go to NVTX (domain ``moe_eplb``, payload = iteration) when a profiler listens. A full log keeps counting
    what it drops; a log with dropped records never yields a valid call order.

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
        self._header = LogHeader(rank, capacity, sample_clock(), 0, -1, os.getpid(), False)
        super().__init__(_create(path, self._header), capacity, nvtx_ranges.attach())
        self._closed = False

    def close(self) -> None:
        """Cut the file to the rows used and state the measured cost of a record. Closing twice does nothing.

        No other thread may be recording any more.
        """
        if self._closed:
            return
        self._closed = True
        claimed = self._claim()
        dropped = max(0, claimed - self._capacity)
        buffer = self._buffer
        CLOSED_OFFSETS.pack_into(buffer, DROPPED_OFFSET, dropped, _overhead_ps(), os.getpid(), 1)
        assert isinstance(buffer, mmap.mmap)
        buffer.flush()
        buffer.close()
        os.truncate(self.path, HEADER_BYTES + min(claimed, self._capacity) * _ROW_BYTES)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _create(path: Path, header: LogHeader) -> mmap.mmap:
    try:
        with path.open("w+b") as file:
            file.truncate(HEADER_BYTES + header.capacity * _ROW_BYTES)
            buffer = mmap.mmap(file.fileno(), 0)
    except OSError as error:
        raise TraceError("E053", "an event log cannot be created", why=str(error), where=str(path)) from error
    packed = header.pack()
    buffer[: len(packed)] = packed
    return buffer


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

"""Reader of our own traces: every record says what it is, so roles, layers and iterations need no guessing."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Names, Table, filled
from moe_eplb.analysis.ranges import RangeIndex
from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS, Limits
from moe_eplb.analysis.trace import OPEN, Records, Trace, read_trace
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import HOST, KINDS, STREAMS, UPDATER, Kind, Role

__all__ = ["DOMAIN", "FLAGS", "capture_of", "read_records"]

DOMAIN = "moe_eplb"
"""The NVTX domain in which the same ranges stand when another tool records them."""
FLAGS = "flags "
"""What begins the category of a call's range; its flags follow, see `moe_eplb.core.events`."""
_TIMED = [int(kind) for kind, info in KINDS.items() if info.role is not Role.OTHER]


def read_records(path: Path, limits: Limits = DEFAULT_LIMITS) -> Capture:
    """Read a run folder's ``trace.sqlite``.

    Raises:
        TraceError: E055, E056, E064, see `moe_eplb.analysis.trace.read_trace`; E062 a value is beyond its column.
    """
    trace = read_trace(path, limits)
    try:
        return capture_of(trace)
    except OverflowError as error:
        raise TraceError("E062", "a trace has damaged values", why=str(error), where=str(path)) from error


def capture_of(trace: Trace) -> Capture:
    """A trace that was read, in the model of captures."""
    records, names = trace.records, Names()
    work = records.where((records.stream < HOST) & np.isin(records.kind, _TIMED) & (records.end != OPEN))
    told = records.where((records.stream == HOST) | ~np.isin(records.kind, _TIMED))
    ranges, calls = _ranges(told, names), _calls(told, names)
    streams = np.unique(np.stack([work.rank, work.stream]), axis=1).T.tolist() if len(work) else []
    gpu = _gpu(work, ranges, calls, names)
    named = {(rank, rank, stream): STREAMS[stream] for rank, stream in streams if 0 <= stream < len(STREAMS)}
    return Capture(
        source=str(trace.path), form="moe_eplb", names=tuple(names), gpu=gpu, calls=calls, ranges=ranges, streams=named,
        incomplete=trace.incomplete(),
    ).in_order()  # fmt: skip


def _gpu(work: Records, ranges: Table, calls: Table, names: Names) -> Table:
    codes = {int(kind): c.ROLE_CODE[info.role] for kind, info in KINDS.items()}
    around = RangeIndex(ranges).around(work.rank, work.start, work.thread)
    updater = work.stream == UPDATER
    return filled(
        c.GPU, len(work), start=work.start, end=work.end, stream=work.stream, layer=work.layer,
        correlation=np.where((around >= 0) & ~updater, calls["correlation"][around] if len(calls) else -1, c.UNKNOWN),
        iteration=work.iteration, process=work.rank, rank=work.rank, device=work.rank,
        name=np.array([names[_name(kind)] for kind in work.kind.tolist()], np.int64),
        kind=np.where(updater, c.UPDATER_WORK, c.KERNEL),
        role=np.array([codes[kind] for kind in work.kind.tolist()], np.int64),
    )  # fmt: skip


def _ranges(told: Records, names: Names) -> Table:
    labels = [f"{_name(k)}/{layer}" if layer >= 0 else _name(k) for k, layer in _pairs(told)]
    mark = told.end == told.start
    return filled(
        c.RANGE, len(told), start=told.start, end=told.end, thread=told.thread, process=told.rank, rank=told.rank,
        payload=told.iteration, domain=names[DOMAIN], text=np.array(names.numbers(labels), np.int64),
        category=np.array([names[text] if text else c.UNKNOWN for text in _besides(told)], np.int64),
        kind=np.where(mark, c.MARK, c.PUSH_POP),
    )  # fmt: skip


def _besides(told: Records) -> list[str]:
    """What a record says besides: the flags of a call, and which work did not wait for which."""
    columns = (told.kind, told.stream, told.a, told.b)
    return [_beside(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _beside(kind: int, stream: int, a: int, b: int) -> str:
    if kind <= Kind.DONE_SET_CPU_STAGE:
        return f"{FLAGS}{a}"
    if kind == Kind.UNORDERED:
        return f"{_name(a)} on {_stream(stream)} did not wait for {_name(b >> 8)} on {_stream(b & 255)}"
    return ""


def _stream(number: int) -> str:
    return STREAMS[number] if 0 <= number < len(STREAMS) else f"stream {number}"


def _calls(told: Records, names: Names) -> Table:
    """The host's own records once more, as the calls that put work on streams."""
    return filled(
        c.CALL, len(told), start=told.start, end=np.maximum(told.end, told.start), thread=told.thread,
        process=told.rank, rank=told.rank, correlation=told.seq + 1,
        name=np.array([names[_name(kind)] for kind in told.kind.tolist()], np.int64),
    )  # fmt: skip


def _pairs(told: Records) -> list[tuple[int, int]]:
    return list(zip(told.kind.tolist(), told.layer.tolist(), strict=True))


def _name(kind: int) -> str:
    try:
        return KINDS[Kind(kind)].name
    except ValueError:
        return f"kind {kind}"

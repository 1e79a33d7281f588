"""What a trace is: who wrote it, what it holds, what it lacks, before anything is concluded from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.dependencies import Dependencies
from moe_eplb.analysis.grouping import known_numbers
from moe_eplb.analysis.merge import Alignment, align
from moe_eplb.analysis.readers.any import read_capture
from moe_eplb.analysis.roles import RoleTime, prepare, role_times, unknown_names

__all__ = ["DomainRow", "StreamRow", "TraceInfo", "trace_info"]


@dataclass(frozen=True, slots=True)
class StreamRow:
    """A stream of a device, its declared name (empty without one), and what ran on it."""

    rank: int
    device: int
    stream: int
    name: str
    events: int
    total_ns: int


@dataclass(frozen=True, slots=True)
class DomainRow:
    """Host ranges and marks of one domain and category; texts are those that occur most often."""

    domain: str
    category: str
    ranges: int
    texts: tuple[str, ...]


@dataclass(frozen=True)
class TraceInfo:
    """One trace.

    Attributes:
        counts: Rows of each table.
        span_ns: From the first to the last moment of anything.
        iterations, layers: Numbers that its ranges or records give, without -1.
        waits_recorded: Whether it tells which stream waited for which event of which stream.
        alignment: What is added to its times to be on the first trace's clock; None for the first.
    """

    source: str
    form: str
    file_bytes: int
    ranks: tuple[int, ...]
    rank_source: str
    counts: dict[str, int]
    span_ns: int
    utc: int | None
    iterations: tuple[int, ...]
    layers: tuple[int, ...]
    streams: tuple[StreamRow, ...]
    domains: tuple[DomainRow, ...]
    roles: tuple[RoleTime, ...]
    unknown: tuple[RoleTime, ...]
    waits_recorded: bool
    incomplete: str
    notes: tuple[str, ...]
    alignment: Alignment | None = None


def trace_info(paths: Sequence[Path], role_tables: Sequence[Path] = ()) -> list[TraceInfo]:
    """About every trace, and how the clocks of several lie to the first one's.

    Raises:
        TraceError: a trace cannot be read, see `moe_eplb.analysis.readers.any`.
    """
    captures = [read_capture(path) for path in paths]
    found = [_about(path, prepare(one, tables=role_tables)) for path, one in zip(paths, captures, strict=True)]
    if len(found) == 1:
        return found
    clocks = [None, *align(captures)[1:]]
    return [replace(one, alignment=clock) for one, clock in zip(found, clocks, strict=True)]


def _about(path: Path, capture: Capture) -> TraceInfo:
    gpu = capture.gpu
    return TraceInfo(
        source=str(path), form=capture.form, file_bytes=_size(path), ranks=tuple(capture.ranks),
        rank_source=capture.rank_source, counts={name: len(table) for name, table in capture.tables().items()},
        span_ns=_span(capture), utc=capture.utc, iterations=known_numbers(gpu["iteration"]),
        layers=known_numbers(gpu["layer"]), streams=_streams(capture), domains=_domains(capture),
        roles=_by_role(capture),
        unknown=tuple(unknown_names(capture, gpu["role"])),
        waits_recorded=Dependencies(capture).waits_recorded, incomplete=capture.incomplete, notes=capture.notes,
    )  # fmt: skip


def _size(path: Path) -> int:
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _span(capture: Capture) -> int:
    """Ranges that were never closed count by their start."""
    tables = [table for name, table in capture.tables().items() if len(table) and name != "nodes"]
    if not tables:
        return 0
    latest = max(max(int(table["end"].max()), int(table["start"].max())) for table in tables)
    return latest - min(int(table["start"].min()) for table in tables)


def _streams(capture: Capture) -> tuple[StreamRow, ...]:
    gpu = capture.gpu[capture.gpu["kind"] != c.UPDATER_WORK]
    rows = []
    for rank, device, stream in np.unique(gpu[["rank", "device", "stream"]]).tolist():
        mine = gpu[(gpu["rank"] == rank) & (gpu["device"] == device) & (gpu["stream"] == stream)]
        name = capture.streams.get((rank, device, stream), "")
        rows.append(StreamRow(rank, device, stream, name, len(mine), int((mine["end"] - mine["start"]).sum())))
    return tuple(rows)


def _domains(capture: Capture) -> tuple[DomainRow, ...]:
    ranges, names, rows = capture.ranges, capture.names, []
    for domain, category in np.unique(ranges[["domain", "category"]]).tolist():
        mine = ranges["text"][(ranges["domain"] == domain) & (ranges["category"] == category)]
        texts, counts = np.unique(mine, return_counts=True)
        most = texts[np.argsort(-counts, kind="stable")][:5].tolist()
        label, sort = (names[number] if number >= 0 else "" for number in (domain, category))
        rows.append(DomainRow(label, sort, len(mine), tuple(names[number] for number in most)))
    return tuple(sorted(rows, key=lambda row: (-row.ranges, row.domain, row.category)))


def _by_role(capture: Capture) -> tuple[RoleTime, ...]:
    """The roles' sums, under their own names."""
    sums: dict[str, RoleTime] = {}
    for time in role_times(capture, capture.gpu["role"]):
        before = sums.get(time.role, RoleTime(time.role.value, time.role, 0, 0))
        total = before.total_ns + time.total_ns
        sums[time.role] = RoleTime(time.role.value, time.role, before.events + time.events, total)
    return tuple(sorted(sums.values(), key=lambda time: (-time.total_ns, time.name)))

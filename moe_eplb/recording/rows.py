"""Rows of the exported tables, in the order of the log that they come from."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_eplb.core.events import HOST, KINDS, UPDATER, Role
from moe_eplb.recording import nsys_schema
from moe_eplb.recording.aligned_log import AlignedLog
from moe_eplb.recording.nvtx_ranges import DOMAIN

__all__ = ["Strings", "kernel_rows", "nvtx_rows", "record_rows"]

_DOMAIN_ID = 1
_NAMES = {int(kind): info.name for kind, info in KINDS.items()}
_NOT_WORK = {int(kind) for kind, info in KINDS.items() if info.role is Role.OTHER}
"""Kinds that enclose or note work, on whatever stream they were recorded: never kernels."""
_EMPTY_KERNEL = dict.fromkeys(nsys_schema.TABLES["CUPTI_ACTIVITY_KIND_KERNEL"])
_LAUNCH_ZERO = {
    name: 0 for name in _EMPTY_KERNEL if name.startswith(("grid", "block", "launch", "registers", "static", "dynamic"))
}


class Strings:
    """The ``StringIds`` table: numbers in the order of first use."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def id(self, value: str) -> int:
        """The number of a string."""
        return self._ids.setdefault(value, len(self._ids))

    def rows(self) -> list[tuple[Any, ...]]:
        """All strings by number."""
        return [(number, value) for value, number in self._ids.items()]


def nvtx_rows(log: AlignedLog, strings: Strings) -> list[tuple[Any, ...]]:
    """Records that are no device work as ranges and marks of our domain; ``int64Value`` is the iteration.

    ``rangeId`` is the record's row number plus one, which device records name as their correlation.
    """
    columns = nsys_schema.TABLES["NVTX_EVENTS"]
    blank = dict.fromkeys(columns)
    created = blank | {
        "start": 0, "eventType": nsys_schema.DOMAIN_CREATE, "text": DOMAIN, "globalTid": log.global_pid,
        "domainId": _DOMAIN_ID,
    }  # fmt: skip
    rows = [tuple(created.values())]
    for sequence, record in zip(log.sequence.tolist(), log.records.tolist(), strict=True):
        start, end, kind, stream, layer, iteration, thread, _, _ = record
        if not _is_range(kind, stream):
            continue
        name = _name(kind)
        row = blank | {
            "start": start,
            "end": None if end in (-1, start) else end,
            "eventType": nsys_schema.MARK if end == start else nsys_schema.PUSH_POP,
            "rangeId": sequence + 1,
            "globalTid": log.global_tid(thread),
            "textId": strings.id(name if layer < 0 else f"{name}/{layer}"),
            "domainId": _DOMAIN_ID,
            "int64Value": iteration,
        }
        rows.append(tuple(row.values()))
    return rows


def kernel_rows(log: AlignedLog, strings: Strings) -> list[tuple[Any, ...]]:
    """Finished device records as kernels: device = rank, and as correlation the host range around them."""
    rows = []
    around = _enclosing_host_ranges(log)
    for sequence, record in zip(log.sequence.tolist(), log.records.tolist(), strict=True):
        start, end, kind, stream, _, _, _, _, _ = record
        if _is_range(kind, stream) or end == -1:
            continue
        name = strings.id(_name(kind))
        row = (
            _EMPTY_KERNEL
            | _LAUNCH_ZERO
            | {
                "start": start,
                "end": end,
                "deviceId": log.rank,
                "contextId": 1,
                "streamId": stream,
                "correlationId": around.get(sequence, 0),
                "globalPid": log.global_pid,
                "demangledName": name,
                "shortName": name,
            }
        )
        rows.append(tuple(row.values()))
    return rows


def record_rows(log: AlignedLog) -> list[tuple[Any, ...]]:
    """Every record as it was; ``end`` is NULL for a range that was never closed."""
    records: np.ndarray = log.records
    return [
        (
            log.rank,
            sequence,
            start,
            None if end == -1 else end,
            kind,
            _name(kind),
            stream,
            thread,
            layer,
            iteration,
            a,
            b,
        )
        for sequence, (start, end, kind, stream, layer, iteration, thread, a, b) in zip(
            log.sequence.tolist(), records.tolist(), strict=True
        )
    ]


def _enclosing_host_ranges(log: AlignedLog) -> dict[int, int]:
    """For each device record's row the ``rangeId`` of the innermost host range of its thread that was open."""
    open_ranges: dict[int, list[tuple[int, int]]] = {}
    around = {}
    for sequence, record in zip(log.sequence.tolist(), log.records.tolist(), strict=True):
        start, end, kind, stream, _, _, thread, _, _ = record
        ranges = open_ranges.setdefault(thread, [])
        while ranges and ranges[-1][0] != -1 and ranges[-1][0] <= start:
            ranges.pop()
        if _is_range(kind, stream):
            ranges.append((end, sequence + 1))
        elif ranges:
            around[sequence] = ranges[-1][1]
    return around


def _is_range(kind: int, stream: int) -> bool:
    return stream in (HOST, UPDATER) or kind in _NOT_WORK


def _name(kind: int) -> str:
    return _NAMES.get(kind, f"kind {kind}")

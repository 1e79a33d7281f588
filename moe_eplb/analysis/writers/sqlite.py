"""Writes a capture as an SQLite file in the layout of Nsight Systems' exports, so that tools for those can read it.

The same capture gives the same bytes. Processes and threads get numbers as that layout needs them, where they have
others; everything else reads back as it was, but for what `losses` names.
"""

from __future__ import annotations

import datetime
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.readers.nsys import SAYS_LOSS
from moe_eplb.analysis.readers.nsys_ranges import TID_BITS
from moe_eplb.analysis.readers.written_by_us import NOTE_KEY, RANK_KEY
from moe_eplb.analysis.writers.rows import rows_of
from moe_eplb.analysis.writers.sqlite_schema import COPY_KINDS, TABLES, VERSION

__all__ = ["losses", "write_sqlite"]

_EVENT_TYPES = {c.PUSH_POP: 59, c.START_END: 60, c.MARK: 34, c.OPERATOR: 59}
_NAMES = {
    33: ("NvtxCategory", "NVTX Category"), 34: ("NvtxMark", "NVTX Mark"),
    59: ("NvtxPushPopRange", "NVTX Push/Pop Range"), 60: ("NvtxStartEndRange", "NVTX Start/End Range"),
    75: ("NvtxDomainCreate", "NVTX Domain Create"),
}  # fmt: skip
_ERROR = 3

Row = dict[str, Any]


def losses(capture: Capture) -> list[str]:
    """What of a capture this format cannot hold, in words with numbers."""
    gpu, ranges, found = capture.gpu, capture.ranges, []
    updater = int((gpu["kind"] == c.UPDATER_WORK).sum())
    operators = int((ranges["kind"] == c.OPERATOR).sum())
    renamed = [name for name in _names_of(capture, c.MEMCPY) if name not in COPY_KINDS and name != "Memcpy unknown"]
    renamed += [name for name in _names_of(capture, c.MEMSET) if name != "Memset"]
    if updater:
        found.append(f"{updater} pieces of the updater's work, which ran on no stream, are left out")
    if operators:
        found.append(f"{operators} operators of a framework become ranges")
    if renamed:
        found.append(f"{len(renamed)} names of copies lose what they say beyond the direction")
    return found


def write_sqlite(capture: Capture, path: Path) -> None:
    """Write a new file; the caller sees to it that `path` is free and puts it where it belongs."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        writer = _Writer(capture)
        rows = writer.rows()
        for table, columns in TABLES.items():
            found = rows.get(table, [])
            if not found:
                continue  # as in a real export, where a table is there only if something was captured for it
            connection.execute(
                f"CREATE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in columns.items())})"
            )
            values = ([row.get(name) for name in columns] for row in found)
            connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", values)
        connection.commit()


class _Writer:
    """Rows of each table, with the numbers of processes, threads, domains and categories."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._process = _process_numbers(capture)
        self._threads = _thread_numbers(capture, self._process)
        self._domains: dict[tuple[int, int], int] = {}
        self._categories: dict[tuple[int, int, int], int] = {}

    def rows(self) -> dict[str, list[Row]]:
        """Everything."""
        capture = self._capture
        syncs, events = self._syncs()
        return {
            "StringIds": [{"id": n, "value": _storable(text)} for n, text in enumerate(capture.names or ("",))],
            "ENUM_NSYS_EVENT_TYPE": [{"id": key, "name": a, "label": b} for key, (a, b) in _NAMES.items()],
            "ENUM_CUDA_MEMCPY_OPER": [{"id": k, "name": n, "label": n} for n, k in COPY_KINDS.items()],
            "META_DATA_EXPORT": [
                {"name": "EXPORT_SCHEMA_VERSION", "value": VERSION}, {"name": "EXPORT_TOOL", "value": "moe_eplb"}
            ],
            "META_DATA_CAPTURE": [*self._ranks(), *_notes(capture)],
            "DIAGNOSTIC_EVENT": _diagnostics(capture.incomplete),
            "TARGET_INFO_SESSION_START_TIME": _start(capture.utc),
            "TARGET_INFO_NVTX_CUDA_STREAM": self._streams(),
            "NVTX_EVENTS": self._ranges(),
            "CUPTI_ACTIVITY_KIND_KERNEL": list(self._gpu(c.KERNEL)),
            "CUPTI_ACTIVITY_KIND_MEMCPY": list(self._gpu(c.MEMCPY)),
            "CUPTI_ACTIVITY_KIND_MEMSET": list(self._gpu(c.MEMSET)),
            "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": list(self._gpu(c.GRAPH)),
            "CUPTI_ACTIVITY_KIND_RUNTIME": [self._call(r) for r in rows_of(capture.calls)],
            "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": syncs,
            "CUPTI_ACTIVITY_KIND_CUDA_EVENT": events,
            "CUDA_GRAPH_NODE_EVENTS": [self._node(r) for r in rows_of(capture.nodes)],
            "PROFILER_OVERHEAD": self._spans(c.OVERHEAD),
            "CUDA_HOST_CALLBACK": self._spans(c.CALLED_WORK),
        }  # fmt: skip

    def _gpu(self, kind: int) -> Iterator[Row]:
        names = self._capture.names
        for r in rows_of(self._capture.gpu[self._capture.gpu["kind"] == kind]):
            row: Row = {
                "start": r["start"], "end": r["end"], "deviceId": r["device"], "contextId": 1, "streamId": r["stream"],
                "correlationId": _known(r["correlation"]), "globalPid": self._process[r["process"]],
                "graphNodeId": _known(r["graph_node"]), "eplbRole": r["role"] if r["role"] != c.UNSET_ROLE else None,
                "eplbLayer": _known(r["layer"]), "eplbIteration": _known(r["iteration"]),
            }  # fmt: skip
            if kind == c.KERNEL:
                row |= {"demangledName": r["name"], "shortName": r["name"], "mangledName": r["name"]}
            else:
                row["bytes"] = r["bytes"]
                row["copyKind"] = COPY_KINDS.get(names[r["name"]], 0)
            yield row

    def _call(self, r: Row) -> Row:
        row = {"start": r["start"], "end": r["end"], "globalTid": self._tid(r), "nameId": r["name"]}
        return row | {"correlationId": _known(r["correlation"])}

    def _node(self, r: Row) -> Row:
        row = {"start": r["start"], "end": r["start"], "globalTid": self._tid(r), "graphNodeId": r["node"]}
        return row | {"originalGraphNodeId": _known(r["original"])}

    def _ranges(self) -> list[Row]:
        found = []
        for r in rows_of(self._capture.ranges):
            process = self._process[r["process"]]
            domain = self._domain(process, r["domain"])
            category = self._category(process, domain, r["category"])
            payload = None if r["payload"] == c.NO_PAYLOAD else r["payload"]
            found.append({
                "start": r["start"], "end": _known(r["end"]) if r["kind"] != c.MARK else None,
                "eventType": _EVENT_TYPES[r["kind"]], "globalTid": self._tid(r), "textId": r["text"],
                "domainId": domain, "category": category, "int64Value": payload,
            })  # fmt: skip
        return [*self._declarations(), *found]

    def _declarations(self) -> Iterator[Row]:
        for (process, text), number in self._domains.items():
            if text >= 0:
                yield {"start": 0, "eventType": 75, "textId": text, "globalTid": process, "domainId": number}
        for (process, domain, text), number in self._categories.items():
            row = {"start": 0, "eventType": 33, "textId": text, "globalTid": process}
            yield row | {"domainId": domain, "category": number}

    def _domain(self, process: int, text: int) -> int:
        """0 is the default domain, which has no name."""
        if text < 0:
            return 0
        mine = sum(key[0] == process for key in self._domains) + 1
        return self._domains.setdefault((process, text), mine)

    def _category(self, process: int, domain: int, text: int) -> int | None:
        if text < 0:
            return None
        return self._categories.setdefault((process, domain, text), len(self._categories) + 1)

    def _syncs(self) -> tuple[list[Row], list[Row]]:
        """Waits, and for those that wait for an event its record, under a number that both have."""
        waits, records = [], []
        for number, r in enumerate(rows_of(self._capture.syncs), 1):
            known = r["on_stream"] >= 0 or r["on_correlation"] >= 0
            process = self._process[r["process"]]
            waits.append({
                "start": r["start"], "end": r["end"], "deviceId": _known(r["device"]), "streamId": _known(r["stream"]),
                "correlationId": _known(r["correlation"]), "globalPid": process, "syncType": r["kind"],
                "eventSyncId": number if known else 0,
            })  # fmt: skip
            if known:
                records.append({
                    "streamId": _known(r["on_stream"]), "correlationId": _known(r["on_correlation"]),
                    "globalPid": process, "eventSyncId": number,
                })  # fmt: skip
        return waits, records

    def _spans(self, kind: int) -> list[Row]:
        spans = self._capture.spans[self._capture.spans["kind"] == kind]
        return [{"start": r["start"], "end": r["end"], "globalTid": self._tid(r)} for r in rows_of(spans)]

    def _streams(self) -> list[Row]:
        gpu, found = self._capture.gpu, []
        for (rank, device, stream), name in sorted(self._capture.streams.items()):
            here = (gpu["rank"] == rank) & (gpu["device"] == device) & (gpu["stream"] == stream)
            for process in np.unique(gpu["process"][here]).tolist():
                pid = self._process[process] >> TID_BITS & (1 << TID_BITS) - 1
                found.append({"streamId": stream, "processId": pid, "name": _storable(name)})
        return found

    def _ranks(self) -> list[Row]:
        """The rank of each process, where the source states it."""
        if self._capture.rank_source != "stated":
            return []
        ranks: dict[int, int] = {}
        for table in (table for name, table in self._capture.tables().items() if name != "nodes"):
            for process, rank in np.unique(table[["process", "rank"]]).tolist():
                ranks.setdefault(self._process[process], rank)
        return [{"name": f"{RANK_KEY}{process}", "value": str(rank)} for process, rank in sorted(ranks.items())]

    def _tid(self, row: Row) -> int:
        return self._threads[row["process"], row["thread"]]


def _process_numbers(capture: Capture) -> dict[int, int]:
    """A global process number for each process: its own if it is one."""
    processes = np.unique(np.concatenate([table["process"] for table in capture.tables().values()])).tolist()
    low = (1 << TID_BITS) - 1
    if all(process > low and process & low == 0 for process in processes):
        return {process: process for process in processes}
    return {process: (1 << 48) + (number << TID_BITS) for number, process in enumerate(processes, 1)}


def _thread_numbers(capture: Capture, processes: dict[int, int]) -> dict[tuple[int, int], int]:
    """A global thread number for each thread: its own number within the process if that fits, else a counted one."""
    tables = [t[["process", "thread"]] for t in capture.tables().values() if "thread" in (t.dtype.names or ())]
    pairs = np.unique(np.concatenate(tables)).tolist()
    low = (1 << TID_BITS) - 1
    own = {pair: pair[1] & low if pair[1] >= 0 else -1 for pair in pairs}
    taken = {(pair[0], number) for pair, number in own.items()}
    if -1 in own.values() or len(taken) != len(pairs) or any(pair[1] > low and not _global(pair) for pair in pairs):
        own = {pair: number for number, pair in enumerate(pairs, 1)}
    return {pair: processes[pair[0]] + number for pair, number in own.items()}


def _global(pair: tuple[int, int]) -> bool:
    """Whether a thread's number has its process in it already."""
    return pair[1] >> TID_BITS << TID_BITS == pair[0]


def _names_of(capture: Capture, kind: int) -> list[str]:
    return [capture.names[number] for number in np.unique(capture.gpu["name"][capture.gpu["kind"] == kind]).tolist()]


def _known(value: int) -> int | None:
    return None if value == c.UNKNOWN else value


def _storable(text: str) -> str:
    """Text that SQLite holds: half a surrogate pair is none."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _diagnostics(incomplete: str) -> list[Row]:
    if not incomplete:
        return []
    text = incomplete if SAYS_LOSS.search(incomplete) else f"incomplete: {incomplete}"
    return [{"timestamp": 0, "severity": _ERROR, "text": _storable(text)}]


def _notes(capture: Capture) -> list[Row]:
    return [{"name": f"{NOTE_KEY}{number}", "value": _storable(note)} for number, note in enumerate(capture.notes)]


def _start(utc: int | None) -> list[Row]:
    if utc is None or utc <= 0:
        return []
    text = datetime.datetime.fromtimestamp(utc / 1e9, datetime.UTC).isoformat()
    return [{"utcEpochNs": utc, "utcTime": text, "localTime": text}]

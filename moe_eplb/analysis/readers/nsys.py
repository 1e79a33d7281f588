"""Reader of Nsight Systems' SQLite exports, schema 3.x.

Tables are there only if something was captured for them and columns come and go with versions, so both are looked for
and never assumed. Row order means nothing. Correlation numbers count within a process.
Source of the layout: Nsight Systems User Guide, "SQLite Schema Reference".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Table, filled
from moe_eplb.analysis.grouping import distinct_rows, members
from moe_eplb.analysis.readers import written_by_us
from moe_eplb.analysis.readers.columns import ColumnTables, InMemory, Tables
from moe_eplb.analysis.readers.limits import DEFAULT_LIMITS, Limits
from moe_eplb.analysis.readers.nsys_ranges import TID_BITS, Columns, Strings, in_time, process_of, read_ranges
from moe_eplb.analysis.readers.sound import require_sound
from moe_eplb.analysis.readers.sqlite_tables import open_database
from moe_eplb.core.errors import TraceError
from moe_eplb.core.events import Role

__all__ = ["COPIES", "NODE_TABLE", "SAYS_LOSS", "TABLES", "read_columns", "read_nsys"]

NODE_TABLE = "CUDA_GRAPH_NODE_EVENTS"
_ACTIVITY = "CUPTI_ACTIVITY_KIND_"
COPIES = {
    1: "HtoD",
    2: "DtoH",
    3: "HtoA",
    4: "AtoH",
    5: "AtoA",
    6: "AtoD",
    7: "DtoA",
    8: "DtoD",
    9: "HtoH",
    10: "PtoP",
}
TABLES = (
    "StringIds", "META_DATA_EXPORT", "META_DATA_CAPTURE", "DIAGNOSTIC_EVENT", "TARGET_INFO_SESSION_START_TIME",
    "TARGET_INFO_NVTX_CUDA_STREAM", "NVTX_EVENTS", f"{_ACTIVITY}KERNEL", f"{_ACTIVITY}MEMCPY", f"{_ACTIVITY}MEMSET",
    f"{_ACTIVITY}RUNTIME", f"{_ACTIVITY}SYNCHRONIZATION", f"{_ACTIVITY}CUDA_EVENT", f"{_ACTIVITY}GRAPH_TRACE",
    NODE_TABLE, "PROFILER_OVERHEAD", "CUDA_HOST_CALLBACK",
)  # fmt: skip
"""All that is read; of these only `StringIds` is in every export."""
_OURS = {"eplbRole": c.UNSET_ROLE, "eplbLayer": c.UNKNOWN, "eplbIteration": c.UNKNOWN}
"""Columns of exports that were converted from a format in which the source says these itself."""
_RANK_TEXT = re.compile(r"rank\s*[=:]\s*(\d{1,6})(?!\d)")
_FIRST_RANGES = 8
"""How many of a process's ranges may say its rank."""
_WARNING, _VERBOSE = 2, 4
_LONGEST_LOSS = 200
_WHOLE_GRAPH = "CUDA graph, traced as a whole"
_HOW = "record with nsys profile --cuda-graph-trace=node"
SAYS_LOSS = re.compile(r"drop|lost|missing|incomplete|overflow|out of memory|not all|fail", re.IGNORECASE)


def read_nsys(path: Path, limits: Limits = DEFAULT_LIMITS) -> Capture:
    """Read an export.

    A process is a rank: the one that a converted export or its first range named ``rank=N`` states, else processes are
    counted.

    Raises:
        TraceError: the file is missing, cut off, damaged, empty, too large, or of another schema.
    """
    with open_database(path, limits) as database:
        return _capture(database)


def read_columns(path: Path, tables: InMemory, limits: Limits = DEFAULT_LIMITS) -> Capture:
    """The same for an export whose tables, of those that `TABLES` names, were read from `path` by somebody else.

    Raises:
        TraceError: E060 it is of another schema, E062 it is damaged, E063 it is empty, E064 it is too large.
    """
    found = _capture(ColumnTables(path, tables))
    if not len(found.gpu) and not len(found.ranges):
        why = f"no GPU events and no ranges ({found.form})"
        raise TraceError("E063", "a trace is empty", why=why, where=str(path))
    require_sound(found, limits)
    return found


def _capture(tables: Tables) -> Capture:
    where = str(tables.path)
    version = tables.pairs("META_DATA_EXPORT").get("EXPORT_SCHEMA_VERSION", "")
    if not tables.has("StringIds", "id", "value") or (version and not version.startswith("3.")):
        why = f"schema {version[:40]}" if version else "it has no table StringIds"
        raise TraceError("E060", "this is no export of Nsight Systems with schema 3.x", why=why, where=where)
    try:
        return _Export(tables).capture(f"nsys {version}".strip())
    except (OverflowError, ValueError) as error:
        raise TraceError("E062", "a trace has damaged values", why=str(error), where=where) from error


class _Export:
    """An export, and the numbers that its texts get."""

    def __init__(self, database: Tables) -> None:
        self._database, self._strings = database, Strings(database)

    def capture(self, form: str) -> Capture:
        """All tables."""
        gpu = np.concatenate([self._kernels(), self._copies("MEMCPY"), self._copies("MEMSET"), self._graphs()])
        calls, ranges, syncs = self._calls(), read_ranges(self._database, self._strings), self._syncs()
        ours = self._database.pairs("META_DATA_CAPTURE")
        ranks, stated = self._ranks(gpu, ranges, written_by_us.ranks(ours))
        for table in (gpu, calls, ranges, syncs):
            table["rank"] = _lookup(table["process"], ranks)
        spans = self._spans()
        spans["rank"] = _lookup(spans["process"], ranks)
        notes = [] if stated or len(ranks) < 2 else [f"{len(ranks)} processes are counted as ranks, by process number"]
        notes = list(dict.fromkeys([*written_by_us.notes(ours), *notes]))
        return Capture(
            source=str(self._database.path), form=form, names=tuple(self._strings.pool), gpu=gpu, calls=calls,
            ranges=ranges, syncs=syncs, nodes=self._nodes(), spans=spans, streams=self._streams(gpu), utc=self._utc(),
            incomplete=self._incomplete(gpu), notes=tuple(notes), rank_source="stated" if stated else "counted",
        ).in_order()  # fmt: skip

    # -- GPU events ------------------------------------------------------------------------------------------------

    def _kernels(self) -> Table:
        table = f"{_ACTIVITY}KERNEL"
        name = "demangledName" if self._database.has(table, "demangledName") else "shortName"
        columns = self._activity(table, (name,), {"graphNodeId": 0})
        return self._events(columns, c.KERNEL, self._strings.names(columns[name]))

    def _copies(self, which: str) -> Table:
        columns = self._activity(f"{_ACTIVITY}{which}", (), {"bytes": 0, "copyKind": 0, "graphNodeId": 0})
        if which == "MEMSET":
            return self._events(columns, c.MEMSET, np.full(len(columns["start"]), self._strings.pool["Memset"]))
        kinds, inverse = np.unique(columns["copyKind"], return_inverse=True)
        numbers = [self._strings.pool[f"Memcpy {COPIES.get(kind, 'unknown')}"] for kind in kinds.tolist()]
        return self._events(columns, c.MEMCPY, np.array(numbers, np.int64)[inverse] if numbers else inverse)

    def _graphs(self) -> Table:
        """Replays that were traced as a whole: GPU time of which nobody knows what it was."""
        table, optional = f"{_ACTIVITY}GRAPH_TRACE", {"deviceId": 0, "streamId": c.UNKNOWN, "correlationId": 0}
        columns = self._database.integers(table, ("start", "end"), optional | {"globalPid": 0} | _OURS)
        count = len(columns["start"])
        columns |= {"graphNodeId": np.zeros(count, np.int64)}
        name = self._strings.pool[_WHOLE_GRAPH] if count else 0
        found = self._events(in_time(columns, table), c.GRAPH, np.full(count, name))
        found["role"] = c.ROLE_CODE[Role.UNKNOWN]
        return found

    def _activity(self, table: str, required: tuple[str, ...], optional: dict[str, int]) -> Columns:
        always = ("start", "end", "deviceId", "streamId", *required)
        columns = self._database.integers(table, always, {"correlationId": 0, "globalPid": 0} | _OURS | optional)
        roles = columns["eplbRole"]
        if ((roles != c.UNSET_ROLE) & ((roles < 0) | (roles >= len(c.ROLES)))).any():
            raise ValueError(f"{table}: a role that does not exist")
        return in_time(columns, table)

    def _events(self, columns: Columns, kind: int, names: NDArray[Any]) -> Table:
        node = columns["graphNodeId"]
        return filled(
            c.GPU, len(names), start=columns["start"], end=columns["end"], stream=columns["streamId"],
            correlation=columns["correlationId"], graph_node=np.where(node > 0, node, c.UNKNOWN),
            bytes=columns.get("bytes"), process=columns["globalPid"], name=names, device=columns["deviceId"], kind=kind,
            role=columns["eplbRole"], layer=columns["eplbLayer"], iteration=columns["eplbIteration"],
        )  # fmt: skip

    # -- host side -------------------------------------------------------------------------------------------------

    def _calls(self) -> Table:
        table = f"{_ACTIVITY}RUNTIME"
        columns = self._database.integers(table, ("start", "end", "nameId"), {"globalTid": 0, "correlationId": 0})
        in_time(columns, table)
        thread = columns["globalTid"]
        return filled(
            c.CALL, len(thread), start=columns["start"], end=columns["end"], thread=thread, process=process_of(thread),
            correlation=columns["correlationId"], name=self._strings.names(columns["nameId"]),
        )  # fmt: skip

    def _nodes(self) -> Table:
        optional = {"globalTid": 0, "originalGraphNodeId": c.UNKNOWN}
        columns = self._database.integers(NODE_TABLE, ("start", "graphNodeId"), optional)
        thread = columns["globalTid"]
        made = filled(
            c.NODE, len(thread), start=columns["start"], thread=thread, process=process_of(thread),
            node=columns["graphNodeId"], original=columns["originalGraphNodeId"],
        )  # fmt: skip
        return made[np.lexsort((made["start"], made["original"] <= 0))]

    def _spans(self) -> Table:
        tables = {"PROFILER_OVERHEAD": c.OVERHEAD, "CUDA_HOST_CALLBACK": c.CALLED_WORK}
        found = []
        for table, kind in tables.items():
            columns = in_time(self._database.integers(table, ("start", "end"), {"globalTid": 0}), table)
            thread, times = columns["globalTid"], {name: columns[name] for name in ("start", "end")}
            process = process_of(thread)
            found.append(filled(c.HOST_SPAN, len(thread), **times, thread=thread, process=process, kind=kind))
        return np.concatenate(found)

    def _syncs(self) -> Table:
        ids = {"eventId": 0, "eventSyncId": 0, "globalPid": 0, "streamId": c.UNKNOWN, "correlationId": 0}
        table = f"{_ACTIVITY}SYNCHRONIZATION"
        waits = in_time(
            self._database.integers(table, ("start", "end", "syncType"), ids | {"deviceId": c.UNKNOWN}), table
        )
        records = self._database.integers(f"{_ACTIVITY}CUDA_EVENT", (), ids | {"deviceId": c.UNKNOWN})
        found = _match((waits["globalPid"], waits["eventSyncId"]), (records["globalPid"], records["eventSyncId"]))
        found[waits["eventSyncId"] == 0] = c.UNKNOWN
        known = np.flatnonzero(found >= 0)
        table_of = filled(
            c.SYNC, len(found), start=waits["start"], end=waits["end"], stream=waits["streamId"],
            correlation=waits["correlationId"], process=waits["globalPid"], device=waits["deviceId"],
            kind=np.clip(waits["syncType"], 0, 255),
        )  # fmt: skip
        table_of["on_stream"][known] = records["streamId"][found[known]]
        table_of["on_correlation"][known] = records["correlationId"][found[known]]
        # An export says device 0 of waits whatever it was; the record knows, and few streams wait for another GPU's.
        told = known[records["deviceId"][found[known]] >= 0]
        table_of["device"][told] = records["deviceId"][found[told]]
        return table_of

    # -- about the capture -----------------------------------------------------------------------------------------

    def _ranks(self, gpu: Table, ranges: Table, written: dict[int, int]) -> tuple[dict[int, int], bool]:
        """The rank of each process that used a GPU, or of every process if none did; whether all of them state it."""
        used = np.unique(gpu["process"] if len(gpu) else ranges["process"]).tolist()
        said = self._stated_ranks(ranges) | written
        stated = {process: said[process] for process in used if process in said}
        if len(set(stated.values())) == len(used):
            return written | stated, bool(used)
        return {process: rank for rank, process in enumerate(used)}, False

    def _stated_ranks(self, ranges: Table) -> dict[int, int]:
        """The rank that one of the first ranges of a process says, for those in which one does."""
        texts, found = list(self._strings.pool), dict[int, int]()
        processes, group = np.unique(ranges["process"], return_inverse=True)
        for process, rows in zip(processes.tolist(), members(group, len(processes)), strict=True):
            first = ranges["text"][rows[np.argsort(ranges["start"][rows], kind="stable")][:_FIRST_RANGES]]
            matches = (_RANK_TEXT.match(texts[number]) for number in first.tolist())
            if match := next(filter(None, matches), None):
                found[process] = int(match[1])
        return found

    def _streams(self, gpu: Table) -> dict[tuple[int, int, int], str]:
        """Names that the program gave its streams with NVTX, for the devices on which the streams were used."""
        table = "TARGET_INFO_NVTX_CUDA_STREAM"
        numbers = self._database.integers(table, ("rowid", "streamId"), {"processId": 0})
        texts = self._database.texts(table, "rowid", "name")
        pids = (gpu["process"] >> TID_BITS) & ((1 << TID_BITS) - 1)
        used: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for pid, stream, rank, device in distinct_rows([pids, gpu["stream"], gpu["rank"], gpu["device"]])[0].tolist():
            used.setdefault((pid, stream), []).append((rank, device))
        found: dict[tuple[int, int, int], str] = {}
        for row, stream, pid in zip(*(column.tolist() for column in numbers.values()), strict=True):
            if name := texts.get(row):
                found |= {(rank, device, stream): name for rank, device in used.get((pid, stream), ())}
        return found

    def _utc(self) -> int | None:
        begun = self._database.integers("TARGET_INFO_SESSION_START_TIME", (), {"utcEpochNs": 0})["utcEpochNs"]
        return int(begun[0]) if len(begun) and begun[0] > 0 else None

    def _incomplete(self, gpu: Table) -> str:
        table = "DIAGNOSTIC_EVENT"
        severities = self._database.integers(table, ("rowid",), {"severity": 0})
        texts = self._database.texts(table, "rowid", "text")
        serious = severities["rowid"][(severities["severity"] >= _WARNING) & (severities["severity"] < _VERBOSE)]
        said = (texts.get(row, "") for row in serious.tolist())
        lost = [text[:_LONGEST_LOSS] for text in said if SAYS_LOSS.search(text)]
        if count := int((gpu["kind"] == c.GRAPH).sum()):
            what = f"kernels are missing, since graph replays were traced as a whole ({count}): {_HOW}"
            lost += [] if any(what in text for text in lost) else [what]
        return "; ".join(dict.fromkeys(lost))


def _match(
    wanted: tuple[NDArray[np.int64], NDArray[np.int64]], keys: tuple[NDArray[np.int64], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """For each wanted pair the index of the first equal pair of keys, or UNKNOWN."""
    found: dict[tuple[int, int], int] = {}
    for index, key in enumerate(zip(keys[0].tolist(), keys[1].tolist(), strict=True)):
        found.setdefault(key, index)
    pairs = zip(wanted[0].tolist(), wanted[1].tolist(), strict=True)
    return np.array([found.get(pair, c.UNKNOWN) for pair in pairs], np.int64)


def _lookup(values: NDArray[np.int64], numbers: dict[int, int]) -> NDArray[np.int64]:
    kinds, inverse = np.unique(values, return_inverse=True)
    return np.array([numbers.get(kind, c.UNKNOWN) for kind in kinds.tolist()], np.int64)[inverse.reshape(-1)]

"""Small SQLite files in the layout of Nsight Systems' exports, row by row as a test needs them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PID", "PROCESS", "THREAD", "NsysFile", "three_steps_and_two_replays"]

PID = 801
PROCESS = (1 << 48) + (PID << 24)
THREAD = PROCESS + PID
WORKER = PROCESS + 845

_COLUMNS = {
    "StringIds": "id value",
    "META_DATA_EXPORT": "name value",
    "DIAGNOSTIC_EVENT": "timestamp severity text",
    "TARGET_INFO_SESSION_START_TIME": "utcEpochNs",
    "TARGET_INFO_NVTX_CUDA_STREAM": "streamId processId name",
    "NVTX_EVENTS": "start end eventType rangeId category text globalTid textId domainId uint64Value int64Value",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start end deviceId contextId streamId correlationId globalPid demangledName"
    " shortName graphNodeId",
    "CUPTI_ACTIVITY_KIND_MEMCPY": "start end deviceId streamId correlationId globalPid bytes copyKind",
    "CUPTI_ACTIVITY_KIND_MEMSET": "start end deviceId streamId correlationId globalPid bytes",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end globalTid correlationId nameId",
    "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": "start end streamId correlationId globalPid syncType eventId eventSyncId",
    "CUPTI_ACTIVITY_KIND_CUDA_EVENT": "streamId correlationId globalPid eventId eventSyncId",
    "CUDA_GRAPH_NODE_EVENTS": "start end globalTid graphNodeId originalGraphNodeId",
    "PROFILER_OVERHEAD": "start end globalTid nameId",
    "CUDA_HOST_CALLBACK": "start end globalTid",
}


@dataclass
class NsysFile:
    """Rows by table; a table without rows is not written, as in a real export."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    strings: dict[str, int] = field(default_factory=dict)

    def add(self, table: str, **columns: Any) -> None:
        """One row; columns not given are NULL."""
        self.rows.setdefault(table, []).append(columns)

    def string(self, text: str) -> int:
        """The number of a registered text."""
        return self.strings.setdefault(text, len(self.strings) + 10)

    def kernel(self, name: str, start: int, end: int, correlation: int, stream: int = 7, **more: Any) -> None:
        """A kernel."""
        names = {"demangledName": self.string(name), "shortName": self.string(name.split("<")[0])}
        self.add(
            "CUPTI_ACTIVITY_KIND_KERNEL",
            **{"start": start, "end": end, "deviceId": 0, "contextId": 1, "streamId": stream}
            | {"correlationId": correlation, "globalPid": PROCESS} | names | more,
        )  # fmt: skip

    def call(
        self, start: int, end: int, correlation: int, thread: int = THREAD, name: str = "cudaLaunchKernel"
    ) -> None:
        """A runtime call."""
        row = {"start": start, "end": end, "globalTid": thread, "correlationId": correlation}
        self.add("CUPTI_ACTIVITY_KIND_RUNTIME", **row, nameId=self.string(name))

    def range(self, text: str | None, start: int, end: int | None, thread: int = THREAD, **more: Any) -> None:
        """A push/pop range of the default domain, with its text in the row; without a text it is a registered one."""
        row = {"start": start, "end": end, "eventType": 59, "text": text, "globalTid": thread, "domainId": 0}
        self.add("NVTX_EVENTS", **row | more)

    def domain(self, name: str, number: int) -> None:
        """A domain's declaration."""
        self.add("NVTX_EVENTS", start=0, eventType=75, text=name, globalTid=THREAD, domainId=number)

    def write(self, path: Path) -> Path:
        """The file."""
        if "META_DATA_EXPORT" not in self.rows:
            self.add("META_DATA_EXPORT", name="EXPORT_SCHEMA_VERSION", value="3.20.3")
        self.rows["StringIds"] = [{"id": number, "value": text} for text, number in self.strings.items()]
        with closing(sqlite3.connect(path)) as connection:
            for table, rows in self.rows.items():
                columns = _COLUMNS[table].split()
                connection.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
                values = [[row.get(column) for column in columns] for row in rows]
                unknown = {key for row in rows for key in row} - set(columns)
                assert not unknown, unknown
                connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", values)
            connection.commit()
        return path


def three_steps_and_two_replays() -> NsysFile:
    """Three eager steps of two kernels, then a graph of two kernels replayed twice inside a range.

    What ``nsys stats`` prints for such a capture can be added up by hand: a step's projection is from its first
    kernel's start to its second's end, 500 ns each; the replays' from the first kernel to the last, 2300 ns, and each
    replay is one launch.
    """
    file = NsysFile()
    file.domain("eplb", 1)
    for step in range(3):
        at = 10_000 + step * 5_000
        file.range(None, at, at + 2_000, textId=file.string("eplb/step"), domainId=1, int64Value=step)
        file.range("a", at + 100, at + 1_900)
        for number, (start, length) in enumerate(((2_100, 200), (2_400, 200))):
            correlation = step * 2 + number + 1
            file.call(at + 200 + number * 100, at + 250 + number * 100, correlation)
            file.kernel(("gemm<1>", "add<2>")[number], at + start, at + start + length, correlation)
    file.range("capture layer 4", 25_000, 26_000)
    for node in (1, 2):
        file.add("CUDA_GRAPH_NODE_EVENTS", start=25_000 + node, end=25_000 + node, globalTid=THREAD, graphNodeId=node)
        row = {"start": 27_000 + node, "end": 27_000 + node, "globalTid": THREAD, "graphNodeId": node + 8}
        file.add("CUDA_GRAPH_NODE_EVENTS", **row)
        file.add("CUDA_GRAPH_NODE_EVENTS", **row | {"originalGraphNodeId": node})
    file.range("replay", 30_000, 31_000)
    for replay in (0, 1):
        file.call(30_100 + replay * 100, 30_150 + replay * 100, 20 + replay, name="cudaGraphLaunch")
        at = 32_000 + replay * 1_200
        file.kernel("gemm<1>", at, at + 700, 20 + replay, graphNodeId=9)
        file.kernel("fill<3>", at + 800, at + 1_100, 20 + replay, graphNodeId=10)
    return file

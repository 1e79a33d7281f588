"""Small SQLite files in the layout of Nsight Systems' exports, row by row as a test needs them."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["PID", "PROCESS", "THREAD", "WORKER", "NsysFile", "export_of_everything", "three_steps_and_two_replays"]

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
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": "start end deviceId streamId correlationId globalPid graphId",
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


def export_of_everything() -> NsysFile:
    """Two ranks with a row in every table that is read: copies, waits, named streams, overhead, callbacks, stages."""
    file = three_steps_and_two_replays()
    file.add("TARGET_INFO_SESSION_START_TIME", utcEpochNs=1_795_397_297_233_041_759)
    file.add("DIAGNOSTIC_EVENT", timestamp=0, severity=2, text="Some events were dropped.")
    file.add("PROFILER_OVERHEAD", start=12_000, end=12_050, globalTid=THREAD, nameId=file.string("flush"))
    file.add("CUDA_HOST_CALLBACK", start=17_000, end=17_200, globalTid=WORKER)
    file.domain("moe_eplb", 2)
    file.add("NVTX_EVENTS", start=0, eventType=33, category=7, text="flags 7", globalTid=THREAD, domainId=2)
    for rank, process in enumerate((PROCESS, PROCESS + (1 << 24))):
        file.range(f"rank={rank}", 100, 200, thread=process + 1)
        file.add("TARGET_INFO_NVTX_CUDA_STREAM", streamId=9, processId=PID + rank, name="MoeBalancer")
        for step in (0, 1):
            _balanced_layer(file, 40_000 + step * 4_000, process, 100 + step * 50, step)
    return file


def _balanced_layer(file: NsysFile, at: int, process: int, correlation: int, step: int) -> None:
    """A layer of one step with the balancer's stages, a reduction that the main stream waits for, and an all-reduce."""
    thread, place = process + 1, {"deviceId": 0, "globalPid": process}
    stages = (
        ("start_wait_gpu_stage", 9, 300), ("done_wait_gpu_stage", 7, 20), ("update_statistic_with_local_ids", 9, 150),
        ("route", 7, 100), ("start_set_cpu_stage", 9, 60), ("done_set_cpu_stage", 7, 20),
    )  # fmt: skip
    file.range("layer 0", at, at + 3_000, thread)
    file.range(f"iteration {step}", at, at + 3_900, thread)
    for number, (stage, stream, length) in enumerate(stages):
        begun = at + 50 + number * 400
        more = {"domainId": 2, "category": 7, "int64Value": step}
        file.range(f"{stage}/0", begun, begun + 100, thread, **more)
        file.call(begun + 10, begun + 30, correlation + number, thread)
        file.kernel(f"_{stage}", begun + 120, begun + 120 + length, correlation + number, stream, globalPid=process)
    sync = {"globalPid": process, "eventId": 4, "eventSyncId": correlation}
    file.call(at + 2_500, at + 2_510, correlation + 10, thread, "cudaEventRecord")
    file.call(at + 2_520, at + 2_530, correlation + 11, thread, "cudaStreamWaitEvent")
    file.add("CUPTI_ACTIVITY_KIND_CUDA_EVENT", streamId=9, correlationId=correlation + 10, **sync)
    wait = {"start": at + 2_520, "end": at + 2_530, "streamId": 7, "correlationId": correlation + 11, "syncType": 2}
    file.add("CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", **wait, **sync)
    file.call(at + 2_540, at + 2_560, correlation + 12, thread)
    file.kernel("ncclDevKernel_AllReduce<8>", at + 2_700, at + 2_900, correlation + 12, globalPid=process)
    copy = {"start": at + 2_600, "end": at + 2_680, "streamId": 9, "correlationId": correlation + 13, "bytes": 64}
    file.call(at + 2_570, at + 2_580, correlation + 13, thread, "cudaMemcpyAsync")
    file.add("CUPTI_ACTIVITY_KIND_MEMCPY", **copy, **place, copyKind=10)
    fill = {"start": at + 2_950, "end": at + 2_960, "streamId": 7, "correlationId": correlation + 14, "bytes": 8}
    file.call(at + 2_590, at + 2_595, correlation + 14, thread, "cudaMemsetAsync")
    file.add("CUPTI_ACTIVITY_KIND_MEMSET", **fill, **place)
    file.call(at + 3_000, at + 3_200, correlation + 15, thread, "cudaDeviceSynchronize")

"""A job that was played, as the files of three recorders. The same job gives the same bytes."""

from __future__ import annotations

import gzip
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from moe_eplb.core.events import HOST, KINDS, RECORD, STREAMS, Kind
from moe_eplb.recording.export import write_trace
from moe_eplb.recording.log_format import HEADER_BYTES, Clock, LogHeader
from traces.job import Job
from traces.play import MAIN, Played, Range, Step, Work

__all__ = ["SUFFIX", "write"]

SUFFIX = {"ours": ".trace.sqlite.gz", "nsys": ".nsys.sqlite.gz", "chrome": ".chrome.json.gz"}
_VERSION_AT = slice(92, 100)
"""Where SQLite writes which version wrote the file."""
_CLOCK = Clock(1_000, 1_700_000_000_000_000_000)
_KERNELS = {
    Kind.START_WAIT_GPU_STAGE: "_take_over", Kind.UPDATE_LOCAL_STATISTIC: "_histogram",
    Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS: "_histogram", Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS: "_histogram",
    Kind.START_SET_CPU_STAGE: "_hand_over", Kind.LOAD_UPDATE: "_fold", Kind.ROUTE: "_route", Kind.TOPK: "_top_k",
    Kind.EXPERTS: "void cutlass::device_kernel<moe_gemm_grouped>(Params)",
    Kind.STATISTIC_REDUCE: "ncclDevKernel_AllReduce_Sum_i32_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    Kind.PREPARE: "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
    Kind.DISPATCH: "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
    Kind.COMBINE: "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)",
}  # fmt: skip
_TENSORRT_LLM = {
    Kind.START_WAIT_GPU_STAGE: "tensorrt_llm::kernels::moeWaitSignalForGpuStageKernel(Signal*, int*)",
    Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS: "void tensorrt_llm::kernels::statisticKernel<int>(MetaInfo, int*, int)",
    Kind.LOAD_UPDATE: "tensorrt_llm::kernels::updateLoadFactorKernel(MetaInfo, StatisticInfo, int*, int*)",
    Kind.ROUTE: "void tensorrt_llm::kernels::moeComputeRouteKernel<1024, 256, 4>(MetaInfo, PlacementInfo, int*, int*)",
    Kind.START_SET_CPU_STAGE: "tensorrt_llm::kernels::moeSetSignalForCpuStageKernel(Signal*)",
}
_BY_HOST = Kind.ABORT_ITER


def write(job: Job, form: str, path: Path) -> None:
    """Write a job's trace, packed with gzip."""
    written = {"ours": _ours, "nsys": _nsys, "chrome": _chrome}[form](job)
    path.write_bytes(gzip.compress(written, 9, mtime=0))


def _text(step: Step, job: Job) -> str:
    name = KINDS[step.kind].name
    if job.tensorrt_llm and step.kind < Kind.START_ITER:
        return f"SingleLayerMoeLoadBalancer.{name} layer {step.layer}"
    if job.tensorrt_llm and step.kind <= _BY_HOST:
        return f"MoeLoadBalancer.{name}"
    return name if step.layer < 0 else f"{name}/{step.layer}"


def _kernel(work: Work, job: Job) -> str:
    known = (
        _TENSORRT_LLM | {k: v for k, v in _KERNELS.items() if k not in _TENSORRT_LLM} if job.tensorrt_llm else _KERNELS
    )
    return work.name or known[work.kind]


def _kept(job: Job, played: Played) -> list[Work]:
    """The work that is in the trace; the kernel that gets lost is one of the middle."""
    if job.lost_hand_over:
        last = max(work.correlation for work in played.work)
        return [w for w in played.work if w.kind is not Kind.START_SET_CPU_STAGE or w.correlation != last]
    lost = len(played.work) // 2 if job.lost_kernel and played.rank == 0 else -1
    return [work for number, work in enumerate(played.work) if number != lost]


# -- our own trace -----------------------------------------------------------------------------------------------------


def _ours(job: Job) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        for played in job.play():
            rows = sorted(_records(job, played), key=lambda row: (row[0], -row[1]))
            table = np.array(rows, RECORD)
            header = LogHeader(
                played.rank, len(rows), _CLOCK, job.dropped, 700_000 if job.closed else -1, 1, job.closed
            )
            content = header.pack().ljust(HEADER_BYTES, b"\0") + table.tobytes()
            Path(folder, f"events.rank{played.rank}.bin").write_bytes(content)
        trace = write_trace(Path(folder))
        if job.lost_record:
            with closing(sqlite3.connect(trace)) as connection:
                connection.execute("DELETE FROM EPLB_RECORD WHERE rank = 0 AND seq = 20")
                connection.commit()
        return _sqlite(trace)


def _records(job: Job, played: Played) -> Iterator[tuple[int, ...]]:
    for one in played.ranges:
        step = one.step
        if not one.inner and step.kind <= _BY_HOST:
            end = one.end if step.closes else 0
            yield (one.start, end, step.kind, HOST, step.layer, step.iteration, 1, step.flags, 0)
    for work in played.work:
        yield (work.start, work.end, work.kind, work.stream, work.layer, work.iteration, 1, 0, 0)
    if job.unordered:
        route = next(work for work in played.work if work.kind is Kind.ROUTE)
        earlier = Kind.START_WAIT_GPU_STAGE << 8 | STREAMS.index("MoeBalancer")
        at = route.start - 500
        yield (at, at, Kind.UNORDERED, MAIN, route.layer, route.iteration, 1, Kind.ROUTE, earlier)


def _sqlite(path: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[_VERSION_AT] = bytes(8)
    return bytes(content)


# -- Nsight Systems ----------------------------------------------------------------------------------------------------

_COLUMNS = {
    "META_DATA_EXPORT": "name value",
    "StringIds": "id value",
    "TARGET_INFO_NVTX_CUDA_STREAM": "streamId processId name",
    "NVTX_EVENTS": "start end eventType text globalTid textId domainId int64Value",
    "CUPTI_ACTIVITY_KIND_KERNEL": "start end deviceId streamId correlationId globalPid demangledName shortName"
    " graphNodeId",
    "CUDA_GRAPH_NODE_EVENTS": "start end globalTid graphNodeId",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end globalTid correlationId nameId",
    "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": "start end streamId correlationId globalPid syncType eventId eventSyncId",
    "CUPTI_ACTIVITY_KIND_CUDA_EVENT": "streamId correlationId globalPid eventId eventSyncId",
    "DIAGNOSTIC_EVENT": "timestamp severity text",
}
_DOMAIN, _CREATED, _PUSHED, _MARKED = 1, 75, 59, 34
_WAITED = 2


class _Rows(dict[str, list[tuple[Any, ...]]]):
    """Rows by table; texts get their number when they are first used."""

    def __init__(self) -> None:
        super().__init__({table: [] for table in _COLUMNS})
        self._strings: dict[str, int] = {}

    def text(self, value: str) -> int:
        """The number of a text."""
        if value not in self._strings:
            self._strings[value] = len(self._strings)
            self["StringIds"].append((self._strings[value], value))
        return self._strings[value]


def _nsys(job: Job) -> bytes:
    rows = _Rows()
    rows["META_DATA_EXPORT"].append(("EXPORT_SCHEMA_VERSION", "3.20.3"))
    if job.diagnostic:
        rows["DIAGNOSTIC_EVENT"].append((0, 2, job.diagnostic))
    for played in job.play():
        _nsys_rank(job, played, rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.sqlite"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA page_size = 1024")
            for table, content in rows.items():
                columns = _COLUMNS[table].split()
                connection.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
                connection.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))})", content)
            connection.commit()
        return _sqlite(path)


def _nsys_rank(job: Job, played: Played, rows: _Rows) -> None:
    pid = 800 + played.rank
    process = pid << 24
    thread = process | pid
    rows["NVTX_EVENTS"].append((0, None, _CREATED, "moe_eplb", thread, None, _DOMAIN, None))
    rows["NVTX_EVENTS"].append((1, 2, _PUSHED, f"rank={played.rank}", thread, None, 0, None))
    for one in played.ranges:
        rows["NVTX_EVENTS"].append(_nvtx(job, one, thread, rows))
    for api in played.api:
        call = (api.start, api.end, thread, api.correlation, rows.text(f"{api.name}_v3020"))
        rows["CUPTI_ACTIVITY_KIND_RUNTIME"].append(call)
    for work in _kept(job, played):
        name, node = rows.text(_kernel(work, job)), work.node or None
        place = (played.rank, 7 + work.stream, work.correlation, process)
        rows["CUPTI_ACTIVITY_KIND_KERNEL"].append((work.start, work.end, *place, name, name, node))
    for made in played.nodes:
        rows["CUDA_GRAPH_NODE_EVENTS"].append((made.start, made.end, thread, made.node))
    for number, wait in enumerate(played.waits if job.syncs else (), 1):
        at, event = played.api[wait.waited - 1].start, (process, number, number)
        rows["CUPTI_ACTIVITY_KIND_CUDA_EVENT"].append((7 + wait.on, wait.recorded, *event))
        waited = (at, at + 500, 7 + wait.stream, wait.waited, process, _WAITED, number, number)
        rows["CUPTI_ACTIVITY_KIND_SYNCHRONIZATION"].append(waited)
    for stream in (0, 4) if not job.tensorrt_llm else ():
        rows["TARGET_INFO_NVTX_CUDA_STREAM"].append((7 + stream, pid, STREAMS[stream]))


def _nvtx(job: Job, one: Range, thread: int, rows: _Rows) -> tuple[Any, ...]:
    mark = one.start == one.end
    end = None if mark or not one.step.closes else one.end
    payload = None if job.tensorrt_llm else one.step.iteration
    domain = 0 if job.tensorrt_llm else _DOMAIN
    text = rows.text(_text(one.step, job))
    return (one.start, end, _MARKED if mark else _PUSHED, None, thread, text, domain, payload)


# -- PyTorch profiler --------------------------------------------------------------------------------------------------


def _chrome(job: Job) -> bytes:
    (played,) = job.play()
    events = [*_annotations(job, played), *_runtime(job, played)]
    head = {
        "schemaVersion": 1, "distributedInfo": {"backend": "nccl", "rank": played.rank, "world_size": 1},
        "traceEvents": events, "displayTimeUnit": "ms",
    }  # fmt: skip
    return json.dumps(head, separators=(",", ":")).encode()


def _annotations(job: Job, played: Played) -> Iterable[dict[str, Any]]:
    steps = [one.step.iteration for one in played.ranges]
    for iteration in dict.fromkeys(i for i in steps if i >= 0):
        mine = [one for one in played.ranges if one.step.iteration == iteration and one.step.works]
        if mine:
            start, end = min(one.start for one in mine), max(one.end for one in mine)
            yield _slice("user_annotation", f"ProfilerStep#{iteration}", start, end, 801)
    for one in played.ranges:
        yield _slice("user_annotation", _text(one.step, job), one.start, one.end, 801)


def _runtime(job: Job, played: Played) -> Iterable[dict[str, Any]]:
    for api in played.api:
        yield _slice("cuda_runtime", api.name, api.start, api.end, 801, correlation=api.correlation)
    for work in _kept(job, played):
        about = {"device": 0, "stream": 7 + work.stream, "correlation": work.correlation}
        yield _slice("kernel", _kernel(work, job), work.start, work.end, 7 + work.stream, pid=0, **about)
    for wait in played.waits if job.syncs else ():
        at = played.api[wait.waited - 1].start
        about = {"stream": 7 + wait.stream, "correlation": wait.waited, "device": 0, "wait_on_stream": 7 + wait.on}
        about["wait_on_cuda_event_record_corr_id"] = wait.recorded
        yield _slice("cuda_sync", "Stream Wait Event", at, at + 1_000, 7 + wait.stream, pid=0, **about)


def _slice(category: str, name: str, start: int, end: int, tid: int, pid: int = 801, **args: Any) -> dict[str, Any]:
    event: dict[str, Any] = {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid}
    return event | {"ts": start // 1_000, "dur": (end - start) // 1_000} | ({"args": args} if args else {})

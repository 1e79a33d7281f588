"""Tables and columns of Nsight Systems' SQLite export, schema 3.x, as far as a capture fills them.

The columns whose names begin with ``eplb`` are ours: what a source itself said of an event, which no column of theirs
holds. Source of the layout: Nsight Systems User Guide, "SQLite Schema Reference".
"""

from __future__ import annotations

from moe_eplb.analysis.readers.nsys import COPIES

__all__ = ["COPY_KINDS", "TABLES", "VERSION"]

VERSION = "3.20.3"
COPY_KINDS = {f"Memcpy {name}": number for number, name in COPIES.items()}

_ACTIVITY = "start end deviceId contextId streamId correlationId globalPid"
_OURS = "eplbRole eplbLayer eplbIteration"
_TEXTS = {"value", "name", "label", "text", "utcTime"}
_COLUMNS = {
    "StringIds": "id value",
    "ENUM_NSYS_EVENT_TYPE": "id name label",
    "ENUM_CUDA_MEMCPY_OPER": "id name label",
    "META_DATA_CAPTURE": "name value",
    "META_DATA_EXPORT": "name value",
    "DIAGNOSTIC_EVENT": "timestamp timestampType source severity text globalPid",
    "TARGET_INFO_SESSION_START_TIME": "utcEpochNs utcTime localTime",
    "TARGET_INFO_NVTX_CUDA_STREAM": "streamId hwId vmId processId contextId name",
    "NVTX_EVENTS": "start end eventType rangeId category color text globalTid endGlobalTid textId domainId uint64Value"
    " int64Value doubleValue uint32Value int32Value floatValue jsonTextId jsonText binaryData",
    "CUPTI_ACTIVITY_KIND_KERNEL": f"{_ACTIVITY} demangledName shortName mangledName launchType registersPerThread gridX"
    f" gridY gridZ blockX blockY blockZ staticSharedMemory dynamicSharedMemory graphNodeId {_OURS}",
    "CUPTI_ACTIVITY_KIND_MEMCPY": f"{_ACTIVITY} bytes copyKind srcKind dstKind graphNodeId {_OURS}",
    "CUPTI_ACTIVITY_KIND_MEMSET": f"{_ACTIVITY} value bytes memKind graphNodeId {_OURS}",
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": f"{_ACTIVITY} graphId {_OURS}",
    "CUPTI_ACTIVITY_KIND_RUNTIME": "start end eventClass globalTid correlationId nameId returnValue callchainId",
    "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": f"{_ACTIVITY} syncType eventId eventSyncId",
    "CUPTI_ACTIVITY_KIND_CUDA_EVENT": "deviceId contextId streamId correlationId globalPid eventId eventSyncId",
    "CUDA_GRAPH_NODE_EVENTS": "start end eventClass globalTid nameId graphNodeId originalGraphNodeId",
    "PROFILER_OVERHEAD": "start end globalTid correlationId nameId returnValue",
    "CUDA_HOST_CALLBACK": "start end globalTid",
}  # fmt: skip
_KEYS = {("StringIds", "id"), ("ENUM_NSYS_EVENT_TYPE", "id"), ("ENUM_CUDA_MEMCPY_OPER", "id")}


def _type(table: str, column: str) -> str:
    if (table, column) in _KEYS:
        return "INTEGER PRIMARY KEY"
    named = column in _TEXTS and not (table == "CUPTI_ACTIVITY_KIND_MEMSET" and column == "value")
    return "TEXT" if named or column in ("localTime", "jsonText", "binaryData") else "INTEGER"


TABLES: dict[str, dict[str, str]] = {
    table: {column: _type(table, column) for column in columns.split()} for table, columns in _COLUMNS.items()
}
"""Type of each column, by table."""

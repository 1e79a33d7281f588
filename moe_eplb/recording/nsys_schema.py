"""Table and column names of Nsight Systems' SQLite export (schema 3.x), as far as this project writes them.

Tools that read an Nsight Systems export find ranges, kernels, streams and session times here where they expect them.
`EPLB_RECORD` is ours: everything that was recorded, with the payloads that the other tables have no column for.
"""

from __future__ import annotations

__all__ = ["EVENT_TYPES", "MARK", "PUSH_POP", "TABLES", "create_statements"]

MARK = 34
PUSH_POP = 59
DOMAIN_CREATE = 75
EVENT_TYPES = {
    MARK: ("NvtxMark", "NVTX Mark"),
    PUSH_POP: ("NvtxPushPopRange", "NVTX Push/Pop Range"),
    DOMAIN_CREATE: ("NvtxDomainCreate", "NVTX Domain Create"),
}

_INT, _TEXT, _REAL = "INTEGER", "TEXT", "REAL"


def _integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), _INT)


TABLES: dict[str, dict[str, str]] = {
    "StringIds": {"id": "INTEGER PRIMARY KEY", "value": "TEXT NOT NULL"},
    "ENUM_NSYS_EVENT_TYPE": {"id": "INTEGER PRIMARY KEY", "name": _TEXT, "label": _TEXT},
    "META_DATA_CAPTURE": {"name": _TEXT, "value": _TEXT},
    "META_DATA_EXPORT": {"name": _TEXT, "value": _TEXT},
    "TARGET_INFO_SESSION_START_TIME": {"utcEpochNs": _INT, "utcTime": _TEXT, "localTime": _TEXT},
    "TARGET_INFO_GPU": {"id": _INT, "name": _TEXT, "vmId": _INT},
    "TARGET_INFO_CUDA_STREAM": _integers("streamId hwId vmId processId contextId priority flag"),
    "TARGET_INFO_NVTX_CUDA_STREAM": _integers("streamId hwId vmId processId contextId") | {"name": _TEXT},
    "PROCESSES": {"globalPid": _INT, "pid": _INT, "name": _TEXT},
    "ThreadNames": {"nameId": _INT, "priority": _INT, "globalTid": _INT},
    "NVTX_EVENTS": (
        _integers("start end eventType rangeId category color")
        | {"text": _TEXT}
        | _integers("globalTid endGlobalTid textId domainId uint64Value int64Value")
        | {"doubleValue": _REAL}
        | _integers("uint32Value int32Value")
        | {"floatValue": _REAL}
        | _integers("jsonTextId")
        | {"jsonText": _TEXT, "binaryData": _TEXT}
    ),
    "CUPTI_ACTIVITY_KIND_KERNEL": _integers(
        "start end deviceId contextId greenContextId streamId correlationId globalPid demangledName shortName"
        " mangledName launchType cacheConfig registersPerThread gridX gridY gridZ blockX blockY blockZ"
        " staticSharedMemory dynamicSharedMemory localMemoryPerThread localMemoryTotal gridId sharedMemoryExecuted"
        " graphNodeId sharedMemoryLimitConfig"
    ),
    "EPLB_RECORD": (
        _integers("rank seq start end kind") | {"name": _TEXT} | _integers("stream thread layer iteration a b")
    ),
}


def create_statements() -> list[str]:
    """One ``CREATE TABLE`` for each table."""
    return [
        f"CREATE TABLE {table} ({', '.join(f'{name} {kind}' for name, kind in columns.items())})"
        for table, columns in TABLES.items()
    ]

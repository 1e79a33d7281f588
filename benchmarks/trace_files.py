"""Made-up traces of any size, as the benchmarks of the readers need them: honest in layout, dull in content.

A step launches kernels from one thread; every tenth kernel is communication on a stream of its own and overlaps what
comes after it. Nothing is random, so a size always gives the same file.
"""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

__all__ = ["write_chrome", "write_nsys"]

_GEMM = "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x256_32x3_tn_align8>(Params)"
_NORM = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3> >"
_COMM = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
_KERNELS = (_GEMM, _NORM, "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float> >", _GEMM) * 2 + (
    _NORM,
    _COMM,
)
_STEP = 2000
"""Kernels of a step."""
_APART_NS = 9_000


def _kernels(count: int) -> Iterator[tuple[int, int, int, str, int]]:
    """(number, start ns, duration ns, name, stream) of each kernel."""
    for number in range(count):
        name = _KERNELS[number % len(_KERNELS)]
        communication = name == _COMM
        duration = 40_000 if communication else 6_000 + number % 7 * 321
        yield number, 1_000_000 + number * _APART_NS, duration, name, 20 if communication else 7


def write_chrome(path: Path, events: int) -> None:
    """A gzip Chrome trace in Kineto's layout: for each kernel an operator, a call and the kernel."""
    text = _chrome_events(events)
    with gzip.open(path, "wb", compresslevel=1) as file:
        head = {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "GPU"}], "distributedInfo": {"rank": 0}}
        file.write(json.dumps(head, indent=2)[:-2].encode() + b',\n  "traceEvents": [\n')
        first = True
        while piece := list(islice(text, 2000)):
            file.write((b"" if first else b",\n") + b",\n".join(piece))
            first = False
        file.write(b'\n  ],\n  "traceName": "made up"\n}\n')


def _chrome_events(count: int) -> Iterator[bytes]:
    for number, start, duration, name, stream in _kernels(-(-count // 3)):
        before = start - 20_000
        step = {"External id": number, "Record function id": 0, "Ev Idx": number}
        grid = {"grid": [132, 1, 1], "block": [256, 1, 1], "registers per thread": 168, "shared memory": 49152}
        launch = {"External id": number, "cbid": 211, "correlation": number + 1}
        kernel: dict[str, Any] = {"External id": number, "queued": 0, "device": 0, "context": 1, "stream": stream}
        kernel |= {"correlation": number + 1, **grid, "blocks per SM": 1, "warps per SM": 8}
        yield _event("cpu_op", f"aten::op{number % 50}", 801, 801, before - 3_000, 8_000, step)
        if number * 3 + 1 < count:
            yield _event("cuda_runtime", "cudaLaunchKernel", 801, 801, before, 4_000, launch)
        if number * 3 + 2 < count:
            yield _event("kernel", name, 0, stream, start, duration, kernel)


def _event(category: str, name: str, pid: int, tid: int, start: int, duration: int, args: dict[str, Any]) -> bytes:
    said = ", ".join(f'"{key}": {json.dumps(value)}' for key, value in args.items())
    return (
        f'  {{\n    "ph": "X", "cat": "{category}", "name": {json.dumps(name)}, "pid": {pid}, "tid": {tid},\n'
        f'    "ts": {start // 1000}.{start % 1000:03}, "dur": {duration // 1000}.{duration % 1000:03},\n'
        f'    "args": {{\n      {said}\n    }}\n  }}'
    ).encode()


def write_nsys(path: Path, kernels: int) -> None:
    """An SQLite file in the layout of an Nsight Systems export: kernels, their calls, and a range for each step."""
    path.unlink(missing_ok=True)
    thread = (1 << 48) + (801 << 24) + 801
    process = thread >> 24 << 24
    names = sorted(set(_KERNELS))
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(_SCHEMA)
        strings = [*enumerate(names), (50, "cudaLaunchKernel_v7000"), (51, "step")]
        connection.executemany("INSERT INTO StringIds VALUES (?, ?)", strings)
        connection.execute("INSERT INTO META_DATA_EXPORT VALUES ('EXPORT_SCHEMA_VERSION', '3.20.3')")
        connection.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, 0, 1, ?, ?, ?, ?, ?, ?, 168, 132, NULL)",
            (
                (start, start + duration, stream, n + 1, process, names.index(name), names.index(name), 0)
                for n, start, duration, name, stream in _kernels(kernels)
            ),
        )
        connection.executemany(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, 1, ?, ?, 50, 0)",
            ((start - 20_000, start - 16_000, thread, n + 1) for n, start, _, _, _ in _kernels(kernels)),
        )
        starts = range(980_000, 1_000_000 + kernels * _APART_NS, _STEP * _APART_NS)
        connection.executemany(
            "INSERT INTO NVTX_EVENTS VALUES (?, ?, 59, NULL, ?, 51, 0)",
            ((start, start + _STEP * _APART_NS - 1_000, thread) for start in starts),
        )
        connection.commit()


_SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE META_DATA_EXPORT (name TEXT NOT NULL, value TEXT);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
 contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
 demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, launchType INTEGER, registersPerThread INTEGER NOT NULL,
 gridX INTEGER NOT NULL, graphNodeId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
 globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, text TEXT,
 globalTid INTEGER, textId INTEGER, domainId INTEGER);
"""

"""Made-up traces of the PyTorch profiler: expert-parallel training as Kineto writes it down.

Two streams, a forward launched by the main thread and a backward launched by autograd's own, whole microseconds. A
kernel starts when it has been launched, the one before it on its stream has ended, and what it waits for is done.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

__all__ = [
    "COMPUTE",
    "MAIN_THREAD",
    "MOVING",
    "WAITING",
    "Lane",
    "ProfilerTrace",
    "expert_parallel",
    "nccl_beside_compute",
    "unrelated_streams",
]

MAIN_THREAD, BACKWARD_THREAD = 801, 845
MAIN, COMM = 7, 20
GROUPED = "void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u, 4096u, 7168u, 1u, 128u, 128u, 128u, 128u, 5u>(float*, int*)"
ATTENTION = "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false, false> >(Flash_fwd_params)"
ACTIVATION = "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>(int, at::native::silu_kernel)"
COMPUTE = (GROUPED, ATTENTION, ACTIVATION)
NOTIFY = "void deep_ep::intranode::notify_dispatch<8>(int const*, int*, int const*, int*, int, int, bool const*, int)"
CACHED_NOTIFY = "void deep_ep::intranode::cached_notify_combine<8>(void**, int*, int, int, int, int)"
WAITING = (NOTIFY, CACHED_NOTIFY)
DISPATCH = "void deep_ep::intranode::dispatch<8, 512>(int4*, float*, int*, long*, float*, int*, int*, int const*, int)"
COMBINE = "void deep_ep::intranode::combine<__nv_bfloat16, 8, 768>(__nv_bfloat16*, float*, __nv_bfloat16 const*)"
MOVING = (DISPATCH, COMBINE)
LAYOUT = "void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*, int*, int*, int*, bool*, int, int, int)"
ALL_REDUCE = "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
GATHER = "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)"
SEND = "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclWorkElem)"


@dataclass
class Lane:
    """A stream: when it is free again."""

    number: int
    free: int = 0


@dataclass
class ProfilerTrace:
    """Events of one rank, in us."""

    rank: int
    events: list[dict[str, Any]] = field(default_factory=list)
    now: int = 1_000
    correlation: int = 0

    def slice(self, category: str, name: str, start: int, duration: int, tid: int, **args: Any) -> None:
        """Add one event of the host."""
        event = {"ph": "X", "cat": category, "name": name, "pid": 801, "tid": tid, "ts": start, "dur": duration}
        self.events.append(event | {"args": args})

    def call(self, name: str, thread: int, duration: int = 3) -> int:
        """A runtime call now; its correlation."""
        self.correlation += 1
        self.slice("cuda_runtime", name, self.now, duration, thread, correlation=self.correlation)
        self.now += duration + 1
        return self.correlation

    def kernel(self, lane: Lane, name: str, duration: int, thread: int = MAIN_THREAD, after: int = 0) -> int:
        """Launch a kernel; its end."""
        self.slice("cpu_op", "aten::something", self.now - 1, 6, thread)
        correlation = self.call("cudaLaunchKernel", thread)
        start = max(self.now + 4, lane.free + 1, after + 1)
        args = {"device": self.rank, "context": 1, "stream": lane.number, "correlation": correlation}
        self.events.append(
            {
                "ph": "X",
                "cat": "kernel",
                "name": name,
                "pid": self.rank,
                "tid": lane.number,
                "ts": start,
                "dur": duration,
            }
            | {"args": args}
        )
        lane.free = start + duration
        return lane.free

    def wait(self, lane: Lane, on: Lane, thread: int) -> int:
        """Let a lane wait for what another one has got so far; until when that lasts."""
        recorded = self.call("cudaEventRecord", thread, 1)
        waited = self.call("cudaStreamWaitEvent", thread, 1)
        args: dict[str, Any] = {
            "stream": lane.number,
            "correlation": waited,
            "device": self.rank,
            "wait_on_stream": on.number,
        }
        args |= {"wait_on_cuda_event_record_corr_id": recorded, "cuda_sync_kind": "Stream Wait Event"}
        event = {"ph": "X", "cat": "cuda_sync", "name": "Stream Wait Event", "pid": self.rank, "tid": lane.number}
        self.events.append(event | {"ts": self.now, "dur": 1, "args": args})
        return on.free

    def write(self, path: Path, indent: int | None = 2) -> Path:
        """As Kineto does: about the run first, then the events; packed if the name ends so."""
        head = {
            "schemaVersion": 1, "distributedInfo": {"backend": "nccl", "rank": self.rank, "world_size": 8},
            "deviceProperties": [{"id": self.rank, "name": "NVIDIA H200"}], "traceEvents": self.events,
            "traceName": "made up", "displayTimeUnit": "ms",
        }  # fmt: skip
        text = json.dumps(head, indent=indent).encode()
        path.write_bytes(gzip.compress(text, 1, mtime=0) if path.suffix == ".gz" else text)
        return path


def expert_parallel(rank: int = 0, layers: int = 3, steps: int = 2, seed: int = 0) -> ProfilerTrace:
    """A few training steps: per layer and direction one dispatch and one combine with their notifications."""
    trace, chance = ProfilerTrace(rank), Random(seed * 1000 + rank)
    main, comm = Lane(MAIN), Lane(COMM)
    for step in range(steps):
        begun = trace.now
        for thread in (MAIN_THREAD, BACKWARD_THREAD):
            order = range(layers) if thread == MAIN_THREAD else reversed(range(layers))
            for layer in order:
                entered = trace.now
                _layer(trace, main, comm, thread, chance)
                trace.slice("user_annotation", f"layer.{layer}", entered, trace.now - entered, thread)
        trace.call("cudaDeviceSynchronize", MAIN_THREAD, max(1, main.free - trace.now + 5))
        trace.slice("user_annotation", f"ProfilerStep#{step}", begun, trace.now - begun, MAIN_THREAD)
        trace.now += 10
    return trace


def _layer(trace: ProfilerTrace, main: Lane, comm: Lane, thread: int, chance: Random) -> None:
    trace.kernel(main, ATTENTION, chance.randint(30, 60), thread)
    trace.kernel(main, LAYOUT, 3, thread)
    ready = trace.wait(comm, main, thread)
    trace.kernel(comm, NOTIFY, chance.randint(5, 40), thread, ready)
    trace.kernel(comm, DISPATCH, chance.randint(40, 80), thread)
    trace.kernel(main, ACTIVATION, chance.randint(20, 70), thread)
    ready = trace.wait(main, comm, thread)
    trace.kernel(main, GROUPED, chance.randint(60, 120), thread, ready)
    ready = trace.wait(comm, main, thread)
    trace.kernel(comm, CACHED_NOTIFY, chance.randint(3, 20), thread, ready)
    trace.kernel(comm, COMBINE, chance.randint(40, 80), thread)
    ready = trace.wait(main, comm, thread)
    trace.kernel(main, ACTIVATION, 10, thread, ready)


def nccl_beside_compute(rank: int = 0, kernels: int = 200, seed: int = 0, streams: int = 1) -> ProfilerTrace:
    """NCCL on streams of its own beside compute on another, as every tool recognises it; nothing in step."""
    trace, chance = ProfilerTrace(rank), Random(seed)
    main, others = Lane(MAIN), [Lane(COMM + number) for number in range(streams)]
    for _ in range(kernels):
        if chance.random() < 0.3:
            trace.kernel(chance.choice(others), ALL_REDUCE, chance.randint(5, 90))
        else:
            trace.kernel(main, chance.choice(COMPUTE), chance.randint(2, 25))
        trace.now += chance.randint(0, 20)
    return trace


def unrelated_streams(rank: int, seed: int, fractional: bool) -> ProfilerTrace:
    """Kernels at any times on streams of compute and streams of NCCL: overlapping, touching, nested, without length.

    No rank's times have to do with another's. Copies and fills run among them. Fractional times have three decimals.
    """
    trace, chance = ProfilerTrace(rank), Random(f"{seed} {rank} {fractional}")
    unit = 1000 if fractional else 1
    edges = [2_000 * unit]
    for _ in range(chance.randint(20, 150)):
        near = chance.random() < 0.5
        start = chance.choice(edges) if near else 2_000 * unit + chance.randrange(3_000 * unit)
        length = chance.choice((0, 1, unit, chance.randrange(5 * unit), chance.randrange(40 * unit), 200 * unit))
        edges += [start, start + length]
        kind, name, stream = chance.choice(_UNRELATED)
        trace.correlation += 1
        place = {"device": rank, "context": 1, "stream": stream, "correlation": trace.correlation}
        trace.slice("cuda_runtime", "cudaLaunchKernel", 1_000, 3, MAIN_THREAD, correlation=trace.correlation)
        event = {"ph": "X", "cat": kind, "name": name, "pid": rank, "tid": stream}
        times = {"ts": start / unit, "dur": length / unit} if fractional else {"ts": start, "dur": length}
        trace.events.append(event | times | {"args": place})
    return trace


_UNRELATED = (
    *(("kernel", name, stream) for name in COMPUTE for stream in (MAIN, MAIN + 1)),
    *(("kernel", name, stream) for name in (ALL_REDUCE, GATHER, SEND) for stream in (COMM, COMM + 1)),
    ("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", MAIN), ("gpu_memset", "Memset (Device)", COMM),
)  # fmt: skip

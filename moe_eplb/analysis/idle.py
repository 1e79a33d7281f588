"""Why a GPU had nothing to do: its idle time in parts that do not overlap and sum to all of it.

Idle is what no event covers between a GPU's first and last. A gap is charged by the event that ends it: up to the start
of its launch the host is late, then the launch itself takes its time, and what is left after it is a wait for an event
of another stream if there was one, else latency. Of the host's part, profiler overhead and functions that streams
called are told apart. Without a known launch the reason is unknown.

Of a part of the iterations the idle time is the gaps that their events end. Their span is those gaps and the time in
which their events ran, so that spans of iterations that do not overlap sum to that of the capture.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.dependencies import Dependencies
from moe_eplb.analysis.grouping import distinct_rows, members
from moe_eplb.analysis.intervals import Intervals, coverage, intervals, length, subtract, union
from moe_eplb.analysis.selection import EVERYTHING, Selection

__all__ = ["Cause", "GpuIdle", "gpu_idle"]


class Cause(enum.StrEnum):
    """Why a GPU was idle."""

    HOST = "host"
    OVERHEAD = "profiler_overhead"
    CALLED_WORK = "called_work"
    LAUNCH = "launch"
    EVENT_WAIT = "event_wait"
    LATENCY = "latency"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class GpuIdle:
    """One GPU's idle time in ns.

    Attributes:
        span: From its first event's start to its last event's end; of selected iterations `idle` and what they ran.
        idle: What of it no event covers.
        causes: The idle time by cause; the values sum to `idle`.
        gaps: Every gap [G, 2] that is ended by an event that is asked for.
    """

    rank: int
    device: int
    span: int
    idle: int
    causes: dict[Cause, int]
    gaps: Intervals


def gpu_idle(capture: Capture, selection: Selection = EVERYTHING) -> list[GpuIdle]:
    """The idle time of every GPU that has an event of the selected ranks and iterations; layers are not told apart."""
    dependencies = Dependencies(capture)
    gpu = capture.gpu
    counted = np.flatnonzero(gpu["kind"] != c.UPDATER_WORK)
    asked = replace(selection, layers=None).mask(gpu["rank"], gpu["iteration"], gpu["layer"])
    keys, group = distinct_rows([gpu["rank"][counted], gpu["device"][counted]])
    held = np.zeros(len(gpu), np.bool_)
    held[dependencies.waits[:, 0]] = True
    gpus = [counted[mine] for mine in members(group, len(keys))]
    return [_of_gpu(dependencies, rows, asked, held) for rows in gpus if asked[rows].any()]


def _of_gpu(
    dependencies: Dependencies, rows: NDArray[np.int64], asked: NDArray[np.bool_], held: NDArray[np.bool_]
) -> GpuIdle:
    gpu = dependencies.capture.gpu[rows]
    busy = union(intervals(gpu["start"], gpu["end"]))
    gaps = np.stack([busy[:-1, 1], busy[1:, 0]], axis=1)
    order = np.argsort(gpu["start"], kind="stable")
    lasting = order[gpu["end"][order] > gpu["start"][order]]
    ending = rows[lasting[np.searchsorted(gpu["start"][lasting], gaps[:, 1], side="left")]]
    gaps, ending = gaps[asked[ending]], ending[asked[ending]]
    mine = gpu[asked[rows]]
    idle = length(gaps)
    return GpuIdle(
        rank=int(gpu["rank"][0]), device=int(gpu["device"][0]),
        span=idle + length(union(intervals(mine["start"], mine["end"]))), idle=idle,
        causes=_sums(_parts(dependencies, gaps, ending, held)), gaps=gaps,
    )  # fmt: skip


def _parts(
    dependencies: Dependencies, gaps: Intervals, ending: NDArray[np.int64], held: NDArray[np.bool_]
) -> dict[Cause, NDArray[np.int64]]:
    """Length [G] of each cause in each gap."""
    first, last = gaps[:, 0], gaps[:, 1]
    known = dependencies.call[ending] >= 0
    begun = np.clip(np.where(known, dependencies.launch_start[ending], last), first, last)
    launched = np.clip(np.where(known, dependencies.launch_end[ending], last), begun, last)
    overhead, called = _spans(dependencies.capture, ending)
    cost, work = (coverage(spans, begun) - coverage(spans, first) for spans in (overhead, called))
    unasked = begun - first - cost - work
    rest = last - launched
    return {
        Cause.HOST: np.where(known, unasked, 0),
        Cause.OVERHEAD: cost,
        Cause.CALLED_WORK: work,
        Cause.LAUNCH: launched - begun,
        Cause.EVENT_WAIT: np.where(held[ending], rest, 0),
        Cause.LATENCY: np.where(held[ending], 0, rest),
        Cause.UNKNOWN: np.where(known, 0, unasked),
    }


def _spans(capture: Capture, ending: NDArray[np.int64]) -> tuple[Intervals, Intervals]:
    """Profiler overhead of the process, and without it the functions that its streams called, as unions."""
    spans = capture.spans
    mine = spans[np.isin(spans["process"], np.unique(capture.gpu["process"][ending]))]
    overhead, called = (
        union(intervals(mine["start"][mine["kind"] == kind], mine["end"][mine["kind"] == kind]))
        for kind in (c.OVERHEAD, c.CALLED_WORK)
    )
    return overhead, subtract(called, overhead)


def _sums(parts: dict[Cause, NDArray[np.int64]]) -> dict[Cause, int]:
    return {cause: int(part.sum()) for cause, part in parts.items()}

"""The longest stretches of work that nothing hides, what ran in them and inside which ranges it was launched."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Table, role_codes
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.intervals import EMPTY, Intervals, clip, intervals, subtract, union
from moe_eplb.analysis.overlap import Pair
from moe_eplb.analysis.ranges import Launches, RangeIndex
from moe_eplb.analysis.work import on_main

__all__ = ["Stretch", "exposed_times", "largest_exposed"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """A time without a break in which work of a pair's B ran and none of its C.

    Attributes:
        work: Names of B's events in it with their ns inside, longest first.
        ranges: Texts of the host ranges around the launch of its first event, outermost first; empty if not known.
    """

    rank: int
    device: int
    start: int
    end: int
    iteration: int
    layer: int
    work: tuple[tuple[str, int], ...]
    ranges: tuple[str, ...]

    @property
    def length(self) -> int:
        """Its ns."""
        return self.end - self.start


def largest_exposed(
    capture: Capture, pair: Pair, most: int = 10, only: NDArray[np.bool_] | None = None
) -> list[Stretch]:
    """The longest exposed stretches of a pair over all GPUs, longest first; a capture with roles is needed.

    Args:
        only: Mask [N] of the GPU events that may be B; what hides them is always taken from all.
    """
    found: list[tuple[int, int, int, NDArray[np.int64]]] = []
    main = on_main(capture)
    for rank, device in _gpus(capture):
        rows = np.flatnonzero((capture.gpu["rank"] == rank) & (capture.gpu["device"] == device))
        work, behind = _of_pair(capture.gpu[rows], pair, main[rows])
        work = work if only is None else work & only[rows]
        times = _exposed(capture.gpu[rows], work, behind, pair)
        longest = times[np.argsort(times[:, 0] - times[:, 1], kind="stable")][:most]
        found += [(start - end, start, end, rows[work]) for start, end in longest.tolist()]
    chosen = [
        (start, end, rows[(capture.gpu["start"][rows] < end) & (capture.gpu["end"][rows] > start)])
        for _, start, end, rows in sorted(found, key=lambda one: one[:3])[:most]
    ]
    ranges = _ranges(capture, np.array([inside[0] for *_, inside in chosen], np.int64))
    return [_stretch(capture, *one, around) for one, around in zip(chosen, ranges, strict=True)]


def exposed_times(
    capture: Capture, pair: Pair, only: NDArray[np.bool_] | None = None
) -> dict[tuple[int, int], Intervals]:
    """Every exposed stretch of a pair by (rank, device), as unions; the arguments are those of `largest_exposed`."""
    found, main = {}, on_main(capture)
    for rank, device in _gpus(capture):
        rows = np.flatnonzero((capture.gpu["rank"] == rank) & (capture.gpu["device"] == device))
        work, behind = _of_pair(capture.gpu[rows], pair, main[rows])
        found[rank, device] = _exposed(capture.gpu[rows], work if only is None else work & only[rows], behind, pair)
    return found


def _gpus(capture: Capture) -> list[tuple[int, int]]:
    keys = distinct_rows([capture.gpu["rank"], capture.gpu["device"]])[0].tolist()
    return [(rank, device) for rank, device in keys]


def _of_pair(gpu: Table, pair: Pair, main: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    updater = gpu["kind"] == c.UPDATER_WORK
    work = np.isin(gpu["role"], role_codes(pair.hidden))
    behind = np.isin(gpu["role"], role_codes(pair.behind)) & ~updater
    if (gpu["kind"] == c.GRAPH).any():
        work = np.zeros_like(work)  # see `moe_eplb.analysis.overlap.measure`
    return work if pair.updater else work & ~updater, behind if pair.other_streams else behind & main


def _exposed(gpu: Table, work: NDArray[np.bool_], behind: NDArray[np.bool_], pair: Pair) -> Intervals:
    if not pair.other_streams:
        return subtract(_union(gpu[work]), _union(gpu[behind]))
    hidden = [EMPTY]
    for stream in np.unique(gpu["stream"][work]).tolist():
        mine = gpu["stream"] == stream
        hidden.append(clip(_union(gpu[work & mine]), _union(gpu[behind & ~mine]))[0])
    # What one stream does is not exposed while that of another one is hidden.
    return subtract(_union(gpu[work]), union(np.concatenate(hidden)))


def _union(events: Table) -> Intervals:
    return union(intervals(events["start"], events["end"]))


def _stretch(capture: Capture, start: int, end: int, inside: NDArray[np.int64], ranges: tuple[str, ...]) -> Stretch:
    gpu = capture.gpu
    lengths: dict[str, int] = {}
    for row in inside.tolist():
        name = capture.names[gpu["name"][row]]
        lengths[name] = lengths.get(name, 0) + int(min(gpu["end"][row], end) - max(gpu["start"][row], start))
    first = gpu[inside[0]]
    return Stretch(
        rank=int(first["rank"]), device=int(first["device"]), start=start, end=end, iteration=int(first["iteration"]),
        layer=int(first["layer"]), work=tuple(sorted(lengths.items(), key=lambda item: (-item[1], item[0]))),
        ranges=ranges,
    )  # fmt: skip


def _ranges(capture: Capture, rows: NDArray[np.int64]) -> list[tuple[str, ...]]:
    """Ranges around the launch of each of some events, see `Stretch`; for graph nodes those of the capture.

    Ranges of the launching thread count before those of others.
    """
    few = Capture(capture.source, capture.form, capture.names, capture.gpu[rows], capture.calls, nodes=capture.nodes)
    launches = Launches(few)
    found: list[tuple[str, ...]] = [()] * len(rows)
    for by, made in ((launches.call, capture.calls), (launches.node, capture.nodes)):  # the last that knows counts
        asked = np.flatnonzero(by >= 0)
        process, moment, thread = (made[name][by[asked]] for name in ("process", "start", "thread"))
        for any_thread in (True, False) if len(asked) else ():
            index = RangeIndex(capture.ranges, any_thread)
            around = index.around(process, moment, thread).tolist()
            for event, row in zip(asked.tolist(), around, strict=True):
                if row >= 0:
                    found[event] = tuple(capture.names[capture.ranges["text"][r]] for r in index.path(row))
    return found

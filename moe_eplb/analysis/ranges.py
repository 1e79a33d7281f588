"""Which host ranges were open when something was launched, and where ranges lie on the GPU.

A range on a thread encloses what the thread does while it is open. Work launched by another thread (a backward pass, an
updater) lies in no range of its own thread, so ranges of any thread of the process can be asked for as well, but for
those that hold only what their own thread launches. Kernels of a graph replay carry the replay's correlation; what was
open when the graph was captured is found by their graph node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.grouping import members
from moe_eplb.analysis.intervals import intervals, length, union

__all__ = ["Launches", "Projection", "RangeIndex", "match_pairs", "project"]

Indices = NDArray[np.int64]
_NEVER = np.iinfo(np.int64).max
_FEW = 16
"""Threads up to which looking through all questions for each is cheaper than putting them in order."""


class RangeIndex:
    """Finds the innermost open range at a moment: of those that are open, the one that was opened last.

    Args:
        ranges: A table of type `RANGE`; marks are never open, a range that was not closed stays open.
        any_thread: Look at all ranges of the process and not only at those of the thread.
    """

    def __init__(self, ranges: Table, any_thread: bool = False) -> None:
        self._any_thread = any_thread
        index = np.flatnonzero(ranges["kind"] != c.MARK)
        starts = ranges["start"][index]
        ends = np.where(ranges["end"][index] == c.UNKNOWN, _NEVER, ranges["end"][index])
        thread = np.zeros(len(index), np.int64) if any_thread else ranges["thread"][index]
        order = np.lexsort((-ends, starts, thread, ranges["process"][index]))
        self._index, self._starts, self._ends = index[order], starts[order], ends[order]
        self._process, self._thread = ranges["process"][index][order], thread[order]
        self._groups = _runs(self._process, self._thread)
        self._outer = np.concatenate(
            [np.empty(0, np.int64), *(_later_end_before(self._ends[a:b], a) for a, b in self._groups)]
        )

    @cached_property
    def _strides(self) -> list[Indices]:
        """Where 1, 2, 4, ... steps outward lead to."""
        strides = []
        stride = self._outer
        while (stride >= 0).any():
            strides.append(stride)
            stride = np.where(stride >= 0, stride[stride], c.UNKNOWN)
        return strides

    def around(self, process: Indices, moments: Indices, thread: Indices | None = None) -> Indices:
        """For each moment the row of the innermost open range, or UNKNOWN; of any thread no `thread` is needed."""
        found = np.full(len(moments), c.UNKNOWN, np.int64)
        of_thread = np.zeros(len(moments), np.int64) if self._any_thread or thread is None else thread
        for first, beyond, asked in self._asked(process, of_thread):
            found[asked] = self._climb(first, beyond, moments[asked])
        return np.where(found >= 0, self._index[found] if len(self._index) else found, c.UNKNOWN)

    def _asked(self, process: Indices, thread: Indices) -> Iterator[tuple[int, int, Indices]]:
        """The bounds of each thread's ranges, and which questions are about it."""
        firsts = np.array([first for first, _ in self._groups], np.int64)
        if len(firsts) <= _FEW:
            for first, beyond in self._groups:
                yield first, beyond, np.flatnonzero((process == self._process[first]) & (thread == self._thread[first]))
            return
        group = match_pairs(process, thread, self._process[firsts], self._thread[firsts])
        _, *questions = members(group + 1, len(firsts) + 1)
        for (first, beyond), asked in zip(self._groups, questions, strict=True):
            if len(asked):
                yield first, beyond, asked

    def path(self, row: int) -> list[int]:
        """The rows of the ranges around a row that enclose all of it, outermost first, the row itself last."""
        at = int(np.flatnonzero(self._index == row)[0])
        rows: list[int] = []
        while at >= 0:
            rows.append(int(self._index[at]))
            at = int(self._outer[at])
        return rows[::-1]

    def _climb(self, first: int, beyond: int, moments: Indices) -> Indices:
        at = first + np.searchsorted(self._starts[first:beyond], moments, side="right") - 1
        at = np.where(at >= first, at, -1)
        # Ends only grow on the way out, so ever smaller strides find the last closed range in few looks at any depth.
        for stride in reversed(self._strides):
            further = np.where(at >= 0, stride[at], c.UNKNOWN)
            at = np.where((further >= 0) & (self._ends[further] < moments), further, at)
        return np.where((at >= 0) & (self._ends[at] < moments), self._outer[at], at)


@dataclass(frozen=True)
class Launches:
    """The calls that launched GPU events, and when what they launched was asked for.

    For an event of a graph replay `capture` gives the moment and thread at which its node was made.
    """

    capture: Capture

    @cached_property
    def call(self) -> Indices:
        """Row of the launching call of each GPU event [N], or UNKNOWN."""
        gpu, calls = self.capture.gpu, self.capture.calls
        known = gpu["correlation"] > 0
        rows = match_pairs(gpu["process"], gpu["correlation"], calls["process"], calls["correlation"])
        return np.where(known, rows, c.UNKNOWN)

    @cached_property
    def node(self) -> Indices:
        """Row of the node that each GPU event [N] of a replay was captured as, or UNKNOWN."""
        gpu, nodes = self.capture.gpu, self.capture.nodes
        row = match_pairs(gpu["process"], gpu["graph_node"], nodes["process"], nodes["node"])
        row = np.where(gpu["graph_node"] >= 0, row, c.UNKNOWN)
        for _ in range(8):  # a graph that is instantiated is a clone, and clones can be cloned
            original = np.where(row >= 0, nodes["original"][row] if len(nodes) else row, c.UNKNOWN)
            further = match_pairs(gpu["process"], original, nodes["process"], nodes["node"])
            further = np.where(original > 0, further, c.UNKNOWN)
            if not (further >= 0).any():
                break
            row = np.where(further >= 0, further, row)
        return row

    def around(self, ranges: Table, private: NDArray[np.bool_] | None = None, *, at_capture: bool = False) -> Indices:
        """Row in a table of ranges that was open at each GPU event's launch (or its node's capture), or UNKNOWN.

        A range of the launching thread counts before one of another thread of the same process.

        Args:
            ranges: Ranges to look in.
            private: Mask of the ranges that hold only what their own thread launches, none of them by default.
            at_capture: Ask for the capture of graph nodes; events of no graph then lie in no range.
        """
        made = self.capture.nodes if at_capture else self.capture.calls
        by = self.node if at_capture else self.call
        found = np.full(len(by), c.UNKNOWN, np.int64)
        asked = np.flatnonzero(by >= 0)
        process, moment, thread = (made[name][by[asked]] for name in ("process", "start", "thread"))
        own = RangeIndex(ranges).around(process, moment, thread)
        shared = np.arange(len(ranges)) if private is None else np.flatnonzero(~private)
        other = RangeIndex(ranges[shared], any_thread=True).around(process, moment)
        other = np.where(other >= 0, shared[other] if len(shared) else other, c.UNKNOWN)
        found[asked] = np.where(own >= 0, own, other)
        return found


@dataclass(frozen=True, slots=True)
class Projection:
    """Host ranges of one name, seen on the GPU. `span_ns` is from first start to last end, `busy_ns` only what ran."""

    name: str
    instances: int
    launches: int
    """Launching calls; a graph replay is one, however many kernels it has."""
    events: int
    span_ns: int
    busy_ns: int


def project(capture: Capture, *, any_thread: bool = False, at_capture: bool = False) -> list[Projection]:
    """Every named range projected onto the GPU: from its first event's start to its last event's end.

    By default as Nsight Systems' ``nvtx_gpu_proj_sum`` does it: a range holds what its own thread launched while it was
    open; what is launched at the very moment of its end is not in it. Ranges without GPU events are left out.

    Args:
        capture: What was recorded.
        any_thread: A range holds what any thread of its process launched.
        at_capture: Events of graph replays belong to the ranges that were open when their nodes were captured.
    """
    launches = Launches(capture)
    made = capture.nodes if at_capture else capture.calls
    by = launches.node if at_capture else launches.call
    rows = np.flatnonzero(by >= 0)
    order = np.argsort(made["start"][by[rows]], kind="stable")
    rows = rows[order]
    moments, owners = made["start"][by[rows]], made[by[rows]]
    sums: dict[str, list[Projection]] = {}
    for one in capture.ranges[capture.ranges["kind"] != c.MARK]:
        end = _NEVER if one["end"] == c.UNKNOWN else int(one["end"])
        first, beyond = np.searchsorted(moments, one["start"], "left"), np.searchsorted(moments, end, "left")
        mine = owners["process"][first:beyond] == one["process"]
        if not any_thread:
            mine &= owners["thread"][first:beyond] == one["thread"]
        inside = capture.gpu[rows[first:beyond][mine]]
        if len(inside):
            domain = capture.names[one["domain"]] if one["domain"] >= 0 else ""
            name = f"{domain}:{capture.names[one['text']]}"
            sums.setdefault(name, []).append(_one(name, inside))
    return [_summed(parts) for parts in sums.values()]


def match_pairs(a: Indices, b: Indices, keys_a: Indices, keys_b: Indices) -> Indices:
    """For each pair (a, b) the index of the first equal pair of keys, or UNKNOWN."""
    if not len(keys_a) or not len(a):
        return np.full(len(a), c.UNKNOWN, np.int64)
    _, high = np.unique(np.concatenate([keys_a, a]), return_inverse=True)
    low_values = np.concatenate([keys_b, b])
    low = low_values - low_values.min()
    if int(low.max()) >= 1 << 40 or int(high.max()) >= 1 << 22:  # beyond what one number holds beside the other
        _, low = np.unique(low_values, return_inverse=True)
    packed = high.astype(np.int64) * (int(low.max()) + 1) + low
    keys, wanted = packed[: len(keys_a)], packed[len(keys_a) :]
    order = np.argsort(keys, kind="stable")
    at = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    return np.where(keys[order[at]] == wanted, order[at], c.UNKNOWN)


def _one(name: str, inside: Table) -> Projection:
    calls = len(np.unique(inside["correlation"]))
    span = int(inside["end"].max() - inside["start"].min())
    return Projection(name, 1, calls, len(inside), span, length(union(intervals(inside["start"], inside["end"]))))


def _summed(parts: list[Projection]) -> Projection:
    def total(field: str) -> int:
        return sum(int(getattr(part, field)) for part in parts)

    return Projection(parts[0].name, *(total(f) for f in ("instances", "launches", "events", "span_ns", "busy_ns")))


def _runs(*columns: Indices) -> list[tuple[int, int]]:
    """First and one beyond the last index of each run of equal rows."""
    count = len(columns[0])
    if not count:
        return []
    changes = np.zeros(count, np.bool_)
    changes[0] = True
    for column in columns:
        changes[1:] |= column[1:] != column[:-1]
    firsts = np.flatnonzero(changes)
    return list(zip(firsts.tolist(), [*firsts[1:].tolist(), count], strict=True))


def _later_end_before(ends: Indices, offset: int) -> Indices:
    """For each range, in order of starts, the last one before it that ends later; UNKNOWN if there is none.

    A range that is closed at a moment can be skipped together with all between it and that one, nested or not.
    """
    outer = np.full(len(ends), c.UNKNOWN, np.int64)
    open_rows: list[int] = []
    values = ends.tolist()
    for row, end in enumerate(values):
        while open_rows and values[open_rows[-1]] <= end:
            open_rows.pop()
        if open_rows:
            outer[row] = open_rows[-1] + offset
        open_rows.append(row)
    return outer

"""What a step's length is made of: the chain of work and waits that ends with its last GPU event.

The chain is walked from the end. An event could not start before its launch, the event before it on its stream and the
events it waited for; the last of these is the one that held it back. A launch is held back by what its thread did
before it, up to the last call that blocked until the GPU was done, which leads back to the GPU. The parts tile the
window without gaps, so their lengths sum to its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLES, Capture
from moe_eplb.analysis.dependencies import Dependencies
from moe_eplb.analysis.grouping import distinct_rows, members

__all__ = ["HOST", "LATENCY", "UNEXPLAINED", "CriticalPath", "Part", "critical_path", "iteration_paths"]

HOST, LATENCY, UNEXPLAINED = "host", "latency", "unexplained"
_BLOCKING = "Synchronize"


class Part(NamedTuple):
    """A piece of the path: a role, `HOST`, `LATENCY` or `UNEXPLAINED`, and the row of the GPU event or UNKNOWN."""

    start: int
    end: int
    what: str
    row: int = c.UNKNOWN


@dataclass(frozen=True)
class CriticalPath:
    """Parts in order of time that tile a window. `waits_known` is false where not every wait left a record."""

    parts: tuple[Part, ...]
    waits_known: bool

    @property
    def length(self) -> int:
        """The window's ns."""
        return sum(part.end - part.start for part in self.parts)

    def by_what(self) -> dict[str, int]:
        """ns of each role, of the host and of latency."""
        sums: dict[str, int] = {}
        for part in self.parts:
            sums[part.what] = sums.get(part.what, 0) + part.end - part.start
        return sums

    @property
    def balancer_share(self) -> float | None:
        """The balancer's share of the length; None without a length."""
        balancer = sum(ns for what, ns in self.by_what().items() if what.startswith("eplb_"))
        return balancer / self.length if self.length else None


def iteration_paths(capture: Capture) -> dict[tuple[int, int], CriticalPath]:
    """The path of each (rank, iteration) from its first launch or event to the end of its last event."""
    walker = _Walker(capture)
    gpu = capture.gpu
    on_device = (gpu["kind"] != c.UPDATER_WORK) & (gpu["iteration"] >= 0)
    counted = np.flatnonzero(on_device)
    keys, group = distinct_rows([gpu["rank"][counted], gpu["iteration"][counted]])
    paths = {}
    for (rank, iteration), mine in zip(keys.tolist(), members(group, len(keys)), strict=True):
        rows = counted[mine]
        launched = walker.edges.launch_start[rows[walker.edges.call[rows] >= 0]]
        first = min(int(gpu["start"][rows].min()), int(launched.min(initial=1 << 62)))
        paths[rank, iteration] = walker.walk(int(rows[np.argmax(gpu["end"][rows])]), first)
    return paths


def critical_path(capture: Capture, last: int, begin: int) -> CriticalPath:
    """The path that ends with a GPU event.

    Args:
        capture: One with roles, in order.
        last: Row of that event.
        begin: Start of the window in ns; the path goes no further back.
    """
    return _Walker(capture).walk(last, begin)


class _Walker:
    """Walks back over edges; each step goes to an earlier moment, so it ends."""

    def __init__(self, capture: Capture) -> None:
        self._capture, self.edges = capture, Dependencies(capture)
        columns = capture.gpu["start"], capture.gpu["end"], *self._held_back(), capture.gpu["role"]
        # A path looks at single values by the million, and numpy's own access to those takes several times as long.
        self._start, self._end, self._before, self._ready, self._call, self._role = (
            np.ascontiguousarray(column).data for column in columns
        )

    def walk(self, row: int, begin: int) -> CriticalPath:
        """The path that ends with a GPU event and goes back to `begin`."""
        parts, names = list[Part](), [role.value for role in ROLES]
        until = self._end[row]
        while row >= 0 and until > begin:
            start = min(max(self._start[row], begin), until)
            parts.append(Part(start, until, names[self._role[row]], row))
            if start == begin:
                until = begin
                break
            ready, call = max(self._ready[row], begin), self._call[row]
            if ready < start:
                parts.append(Part(ready, start, LATENCY))
            row, until = (self._before[row], ready) if call < 0 else self._along_the_host(call, ready, begin, parts)
        parts.append(Part(begin, max(until, begin), UNEXPLAINED))
        tiled = tuple(part for part in reversed(parts) if part.end > part.start)
        return CriticalPath(tiled, self.edges.waits_recorded)

    def _held_back(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """For each event [N] the event that held it back or UNKNOWN, until when, and the launching call if that did."""
        gpu, edges = self._capture.gpu, self.edges
        start, end = np.ascontiguousarray(gpu["start"]), np.ascontiguousarray(gpu["end"])
        earlier = (edges.previous >= 0) & (start[edges.previous] < start)
        before = np.where(earlier, edges.previous, c.UNKNOWN)
        ready = np.where(earlier, np.minimum(end[edges.previous], start), start)
        held, on = edges.waits.T
        for event, other in zip(held.tolist(), on.tolist(), strict=True):
            found = (min(int(end[other]), int(start[event])), other)
            if start[other] < start[event] and (before[event] < 0 or found > (ready[event], before[event])):
                ready[event], before[event] = found
        launched = np.minimum(edges.launch_end, start)
        by_call = (edges.call >= 0) & ((before < 0) | (launched > ready))
        return (
            np.where(by_call, c.UNKNOWN, before), np.where(by_call, launched, ready),
            np.where(by_call, edges.call, c.UNKNOWN),
        )  # fmt: skip

    def _along_the_host(self, call: int, until: int, begin: int, parts: list[Part]) -> tuple[int, int]:
        """Back along the launching thread to a blocking call that ended with GPU work; that event, and when."""
        calls = self._capture.calls
        times, rows = self._blocking.get((int(calls["process"][call]), int(calls["thread"][call])), _NOTHING)
        # No later than the moment reached, whatever the call says, so that no blocking call is looked at twice.
        at = int(np.searchsorted(times, min(int(calls["start"][call]), until), side="right")) - 1
        while at >= 0 and times[at] > begin:
            blocked = calls[rows[at]]
            event = self._last_ended(int(blocked["process"]), int(blocked["start"]), int(blocked["end"]))
            if event >= 0 and self._capture.gpu["start"][event] < until:
                ended = max(int(self._capture.gpu["end"][event]), begin)
                parts.append(Part(min(ended, until), until, HOST))
                return event, min(ended, until)
            at -= 1
        parts.append(Part(begin, until, HOST))
        return c.UNKNOWN, begin

    @cached_property
    def _blocking(self) -> dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Ends in order, and rows, of the calls of each process and thread that wait for the GPU."""
        calls, names = self._capture.calls, self._capture.names
        numbers = [number for number, name in enumerate(names) if _BLOCKING in name]
        rows = np.flatnonzero(np.isin(calls["name"], numbers))
        found = {}
        keys, group = distinct_rows([calls["process"][rows], calls["thread"][rows]])
        for (process, thread), of_thread in zip(keys.tolist(), members(group, len(keys)), strict=True):
            mine = rows[of_thread][np.argsort(calls["end"][rows[of_thread]], kind="stable")]
            found[process, thread] = calls["end"][mine], mine
        return found

    @cached_property
    def _ends(self) -> dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        gpu = self._capture.gpu
        found = {}
        for process in np.unique(gpu["process"]).tolist():
            rows = np.flatnonzero((gpu["process"] == process) & (gpu["kind"] != c.UPDATER_WORK))
            rows = rows[np.argsort(gpu["end"][rows], kind="stable")]
            found[process] = gpu["end"][rows], rows
        return found

    def _last_ended(self, process: int, after: int, until: int) -> int:
        """The event of a process that ended last within a time, or UNKNOWN."""
        ends, rows = self._ends.get(process, _NOTHING)
        at = int(np.searchsorted(ends, until, side="right")) - 1
        return int(rows[at]) if at >= 0 and ends[at] > after else c.UNKNOWN


_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int64))

"""Whether one GPU event is sure to end before another begins, by what the streams were told and not by when they ran.

Vector clocks (Mattern 1988) over the host's calls in their order: an event recorded on a stream carries what its stream
has been given so far and what that waits for, a wait merges it into the waiting stream. A host that waits for a
stream or an event orders whatever the same thread launches afterwards.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.dependencies import Dependencies, device_of
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.ranges import match_pairs

__all__ = ["HappensBefore"]

Indices = NDArray[np.int64]
_Histories: TypeAlias = dict[int, tuple[list[int], list[dict[int, int]]]]
_CONTEXT = 4
"""The kind of synchronisation in which the host waits for all streams."""


class _Merge(NamedTuple):
    """From `at` on a lane comes after what another one was given before `upto`. Both are places in the host's order."""

    at: int
    lane: int
    upto: int
    on: int


@dataclass(frozen=True)
class HappensBefore:
    """Order of the GPU events of a capture. A lane is a stream of a process on a device."""

    capture: Capture

    @cached_property
    def waits_recorded(self) -> bool:
        """Whether the source tells of all waits between streams; without, only events of one stream are in order."""
        return Dependencies(self.capture).waits_recorded

    @cached_property
    def lane(self) -> Indices:
        """Number of each event's lane [N]."""
        return self._lanes[1][: len(self.capture.gpu)]

    @cached_property
    def launch(self) -> Indices:
        """Place of each event's launch [N] in the host's order; UNKNOWN where no call is known."""
        return self._places[: len(self.capture.gpu)]

    def before(self, first: Indices, then: Indices) -> NDArray[np.bool_]:
        """For each pair of rows of events whether the first is sure to end before the other one begins."""
        gpu = self.capture.gpu
        same = self.lane[first] == self.lane[then]
        found: NDArray[np.bool_] = same & (gpu["start"][first] < gpu["start"][then])
        asked = np.flatnonzero(~same & (self.launch[first] >= 0) & (self.launch[then] >= 0))
        lanes, group = distinct_rows([self.lane[first[asked]], self.lane[then[asked]]])
        for number, (of_first, of_then) in enumerate(lanes.tolist()):
            mine = asked[group == number]
            places, done = self._growth(of_then, of_first)
            at = np.searchsorted(places, self.launch[then[mine]], side="right") - 1
            found[mine] = (at >= 0) & (done[np.maximum(at, 0)] > self.launch[first[mine]])
        return found

    def _growth(self, lane: int, on: int) -> tuple[Indices, Indices]:
        """When a lane waited, and before which place all of another one is done from then on; at least one row."""
        places, clocks = self._histories.get(lane, ([], []))
        return np.array(places or [0], np.int64), np.array([clock.get(on, 0) for clock in clocks] or [0], np.int64)

    @cached_property
    def _histories(self) -> _Histories:
        """For each lane how its clock grew: places and clocks."""
        histories: _Histories = {}
        for at, lane, upto, on in self._merges:
            places, clocks = histories.setdefault(lane, ([], []))
            merged = clocks[-1].copy() if clocks else {}
            for other, place in _at(histories, on, upto).items():
                if place > merged.get(other, 0) and other != lane:
                    merged[other] = place
            if upto > merged.get(on, 0) and on != lane:
                merged[on] = upto
            places.append(at)
            clocks.append(merged)
        return histories

    # -- the host's order ------------------------------------------------------------------------------------------

    @cached_property
    def _lanes(self) -> tuple[Indices, Indices]:
        """Distinct (process, device, stream), and the lane of every event, of every wait and of what it is for."""
        gpu, syncs = self.capture.gpu, self.capture.syncs
        devices = (device_of(gpu, syncs["process"], syncs[name], syncs["device"]) for name in ("stream", "on_stream"))
        process = np.concatenate([gpu["process"], syncs["process"], syncs["process"]])
        device = np.concatenate([gpu["device"], *devices])
        stream = np.concatenate([gpu["stream"], syncs["stream"], syncs["on_stream"]])
        return distinct_rows([process, device, stream])

    @cached_property
    def _places(self) -> Indices:
        """Places in the host's order of launches [N], then of begins, records and ends [3 * W] of W waits.

        Calls that begin at the same moment of a coarse clock are in the order of their correlation numbers.
        """
        gpu, syncs = self.capture.gpu, self.capture.syncs
        (launched, is_launched), (waited, is_waited), (recorded, is_recorded) = (
            self._began(table, number)
            for table, number in ((gpu, "correlation"), (syncs, "correlation"), (syncs, "on_correlation"))
        )
        waited = np.where(is_waited, waited, syncs["start"])
        moments = np.concatenate([launched, waited, recorded, syncs["end"]])
        known = [is_launched, np.ones(len(syncs), np.bool_), is_recorded, syncs["kind"] != c.SYNC_WAIT]
        numbers = np.concatenate(
            [gpu["correlation"], syncs["correlation"], syncs["on_correlation"], syncs["correlation"]]
        )
        places = np.empty(len(moments), np.int64)
        places[np.lexsort((numbers, moments))] = np.arange(1, len(moments) + 1)
        return np.where(np.concatenate(known), places, c.UNKNOWN)

    @cached_property
    def _merges(self) -> list[_Merge]:
        """Everything that orders lanes, in the host's order."""
        syncs, count = self.capture.syncs, len(self.capture.gpu)
        waits = len(syncs)
        lane, on = self._lanes[1][count : count + waits], self._lanes[1][count + waits :]
        begun, recorded, over = (self._places[count + part * waits : count + (part + 1) * waits] for part in range(3))
        kind = syncs["kind"]
        told = (kind == c.SYNC_WAIT) & (syncs["on_stream"] >= 0) & (recorded >= 0)
        columns = (column[told].tolist() for column in (begun, lane, recorded, on))
        found = [_Merge(*row) for row in zip(*columns, strict=True)]
        for i in np.flatnonzero(kind != c.SYNC_WAIT).tolist():
            if kind[i] == c.SYNC_EVENT:
                waited = [(int(on[i]), int(recorded[i]))] if recorded[i] >= 0 and syncs["on_stream"][i] >= 0 else []
            elif kind[i] == c.SYNC_STREAM:
                waited = [(int(lane[i]), int(begun[i]))]
            else:
                mine = np.unique(self.lane[self.capture.gpu["process"] == syncs["process"][i]]).tolist()
                waited = [(one, int(begun[i])) for one in mine] if kind[i] == _CONTEXT else []
            found += self._by_host(i, waited, int(over[i]))
        return sorted(found, key=lambda merge: merge.at)

    def _by_host(self, sync: int, waited: list[tuple[int, int]], over: int) -> list[_Merge]:
        """What a thread launches after it has waited comes after what it has waited for."""
        calls = self.capture.calls
        if not waited or self._sync_call[sync] < 0:
            return []
        call = calls[self._sync_call[sync]]
        found = []
        for lane, places in self._launched_by.get((int(call["process"]), int(call["thread"])), {}).items():
            at = int(np.searchsorted(places, over))
            if at < len(places):
                found += [_Merge(int(places[at]), lane, upto, on) for on, upto in waited if on != lane]
        return found

    @cached_property
    def _sync_call(self) -> Indices:
        syncs, calls = self.capture.syncs, self.capture.calls
        return match_pairs(syncs["process"], syncs["correlation"], calls["process"], calls["correlation"])

    @cached_property
    def _launched_by(self) -> dict[tuple[int, int], dict[int, Indices]]:
        """Places of launches by process and thread, then lane."""
        gpu, calls = self.capture.gpu, self.capture.calls
        call = Dependencies(self.capture).call
        rows = np.flatnonzero((call >= 0) & (self.launch >= 0))
        thread = calls["thread"][call[rows]]
        keys, group = distinct_rows([gpu["process"][rows], thread, self.lane[rows]])
        found: dict[tuple[int, int], dict[int, Indices]] = {}
        for number, (process, of_thread, lane) in enumerate(keys.tolist()):
            found.setdefault((process, of_thread), {})[lane] = np.sort(self.launch[rows[group == number]])
        return found

    def _began(self, table: Table, number: str) -> tuple[Indices, NDArray[np.bool_]]:
        """When the call with a correlation number began, and whether there is such a call."""
        calls = self.capture.calls
        row = match_pairs(table["process"], table[number], calls["process"], calls["correlation"])
        return calls["start"][row] if len(calls) else row, (row >= 0) & (table[number] > 0)


def _at(histories: _Histories, lane: int, place: int) -> dict[int, int]:
    places, clocks = histories.get(lane, ([], []))
    at = bisect_right(places, place) - 1
    return clocks[at] if at >= 0 else {}

"""What a GPU event had to wait for: its launch, the event before it on its stream, and events of other streams.

A wait of a stream for an event holds back what is launched on that stream afterwards until everything is done that was
launched on the other stream before the event was recorded there. Only sources that record waits tell of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture, Table
from moe_eplb.analysis.grouping import distinct_rows, members
from moe_eplb.analysis.ranges import Launches, match_pairs

__all__ = ["Dependencies", "device_of"]

Indices = NDArray[np.int64]
_SEVERAL = -2


@dataclass(frozen=True)
class Dependencies:
    """Edges between GPU events of a capture in order, see `Capture.in_order`; UNKNOWN where there is none."""

    capture: Capture

    @cached_property
    def waits_recorded(self) -> bool:
        """Whether the source tells which stream waited for which event of which stream, and of all waits.

        It does not if the call that recorded an awaited event is lost, since nobody knows then what was waited for. A
        capture that begins in the middle of a run lacks such calls too: their correlation numbers, which count up
        within a process, lie before that of its first call, and so does the launch of all that they stand behind. Nor
        does it if a process numbers streams of several GPUs alike and a wait does not say which of them it is on, or if
        a rank uses several streams of a GPU and has no wait: its file may not record what those of others do.
        """
        waits = self._stream_waits
        if any((device == _SEVERAL).any() for device in self._devices) or self._a_rank_lacks_waits:
            return False
        unseen = waits[self._record_call < 0]
        before = (unseen["on_correlation"] > 0) & (unseen["on_correlation"] < self._first_correlation(unseen))
        return bool(len(waits)) and bool(before.all())

    @cached_property
    def call(self) -> Indices:
        """Row of the launching call of each event [N]."""
        return Launches(self.capture).call

    @cached_property
    def launch_start(self) -> Indices:
        """When the launching call of each event [N] began; means nothing where `call` is UNKNOWN."""
        return self._of_call("start")

    @cached_property
    def launch_end(self) -> Indices:
        """When it had ended, likewise."""
        return self._of_call("end")

    @cached_property
    def previous(self) -> Indices:
        """Row of the event before each event [N] on its stream."""
        gpu = self.capture.gpu
        order = np.lexsort((np.arange(len(gpu)), gpu["start"], self._lane))
        same = np.zeros(len(gpu), np.bool_)
        same[1:] = self._lane[order][1:] == self._lane[order][:-1]
        found = np.full(len(gpu), c.UNKNOWN, np.int64)
        found[order[1:]] = np.where(same[1:], order[:-1], c.UNKNOWN)
        return found

    @cached_property
    def waits(self) -> Indices:
        """Pairs [W, 2] of an event and one that it waited for on another stream; the last of each wait is enough."""
        syncs = self._stream_waits
        if not len(syncs):
            return np.empty((0, 2), np.int64)
        asked = self._call_start(self._call_row(syncs["process"], syncs["correlation"]), syncs["start"])
        recorded = self._call_start(self._record_call, np.zeros(len(syncs), np.int64))
        device, on_device = self._devices
        held = self._next_launched([syncs["process"], device, syncs["stream"]], asked)
        on = self._last_launched([syncs["process"], on_device, syncs["on_stream"]], recorded)
        known = (held >= 0) & (on >= 0) & (self._record_call >= 0)
        return distinct_rows([held[known], on[known]])[0]

    @cached_property
    def _stream_waits(self) -> Table:
        """Waits [W] of a stream for an event of a stream that is known."""
        syncs = self.capture.syncs
        found: Table = syncs[(syncs["kind"] == c.SYNC_WAIT) & (syncs["on_stream"] >= 0)]
        return found

    @cached_property
    def _devices(self) -> tuple[Indices, Indices]:
        """The device of the stream of each wait [W], and of the one that it waited for."""
        syncs, gpu = self._stream_waits, self.capture.gpu
        waiting, on = (
            device_of(gpu, syncs["process"], syncs[name], syncs["device"]) for name in ("stream", "on_stream")
        )
        return waiting, on

    @cached_property
    def _record_call(self) -> Indices:
        """Row of the call that recorded the event of each wait [W], or UNKNOWN."""
        return self._call_row(self._stream_waits["process"], self._stream_waits["on_correlation"])

    @property
    def _a_rank_lacks_waits(self) -> bool:
        """Whether there is a rank with several streams on one GPU and without a wait."""
        gpu = self.capture.gpu[self.capture.gpu["kind"] != c.UPDATER_WORK]
        streams = distinct_rows([gpu["rank"], gpu["device"], gpu["stream"]])[0]
        gpus, group = distinct_rows([streams[:, 0], streams[:, 1]])
        several = gpus[np.bincount(group, minlength=len(gpus)) > 1, 0]
        return not np.isin(several, self._stream_waits["rank"]).all()

    def _first_correlation(self, waits: Table) -> Indices:
        """The smallest correlation number that a call of each wait's process has; 0 if it has no calls."""
        calls = self.capture.calls[self.capture.calls["correlation"] > 0]
        first = np.zeros(len(waits), np.int64)
        for process in np.unique(waits["process"]).tolist():
            mine = calls["correlation"][calls["process"] == process]
            first[waits["process"] == process] = mine.min() if len(mine) else 0
        return first

    @cached_property
    def _lane(self) -> Indices:
        """A number for each event's process, device and stream."""
        gpu = self.capture.gpu
        return distinct_rows([gpu["process"], gpu["device"], gpu["stream"]])[1]

    @cached_property
    def _by_launch(self) -> dict[tuple[int, ...], tuple[Indices, Indices]]:
        """Launch times in order and rows of the events of each process, device and stream whose launch is known."""
        gpu = self.capture.gpu
        rows = np.flatnonzero(self.call >= 0)
        keys, group = distinct_rows([gpu[name][rows] for name in ("process", "device", "stream")])
        rows, group = (part[np.lexsort((gpu["start"][rows], self.launch_start[rows], group))] for part in (rows, group))
        edges = np.searchsorted(group, np.arange(len(keys) + 1)).tolist()
        pieces = zip(map(tuple, keys.tolist()), edges[:-1], edges[1:], strict=True)
        return {key: (self.launch_start[rows[a:b]], rows[a:b]) for key, a, b in pieces}

    def _next_launched(self, streams: Sequence[Indices], moments: Indices) -> Indices:
        """Row of the first event launched on each of some streams (process, device, number) at or after a moment."""
        return self._launched(streams, moments, shift=0)

    def _last_launched(self, streams: Sequence[Indices], moments: Indices) -> Indices:
        """Row of the last event launched on each of some streams before a moment."""
        return self._launched(streams, moments, shift=-1)

    def _launched(self, streams: Sequence[Indices], moments: Indices, shift: int) -> Indices:
        found = np.full(len(moments), c.UNKNOWN, np.int64)
        keys, group = distinct_rows(streams)
        for key, asked in zip(map(tuple, keys.tolist()), members(group, len(keys)), strict=True):
            times, rows = self._by_launch.get(key, _NOTHING)
            at = np.searchsorted(times, moments[asked], side="left") + shift
            known = (at >= 0) & (at < len(rows))
            found[asked[known]] = rows[at[known]]
        return found

    def _call_start(self, row: Indices, otherwise: Indices) -> Indices:
        calls = self.capture.calls
        return np.where(row >= 0, calls["start"][row] if len(calls) else row, otherwise)

    def _call_row(self, process: Indices, correlation: Indices) -> Indices:
        calls = self.capture.calls
        row = match_pairs(process, correlation, calls["process"], calls["correlation"])
        return np.where(correlation > 0, row, c.UNKNOWN)

    def _of_call(self, column: str) -> Indices:
        calls = self.capture.calls
        return np.where(self.call >= 0, calls[column][self.call] if len(calls) else self.call, c.UNKNOWN)


_NOTHING = (np.empty(0, np.int64), np.empty(0, np.int64))


def device_of(gpu: Table, process: Indices, stream: Indices, said: Indices) -> Indices:
    """The device of each of some streams [N]; numbers of streams count on each device anew.

    Where a process used no stream of that number on the device that is said, it is the only one on which it did: a
    source may say none, or 0 whatever it was.

    Args:
        gpu: GPU events, which know their device.
        process, stream, said: Process, number and device [N] of the streams; the device may be UNKNOWN.

    Returns:
        [N]; UNKNOWN for a stream without events, another number below 0 where it may be any of several devices.
    """
    used: dict[tuple[int, int], list[int]] = {}
    for of_process, number, device in distinct_rows([gpu["process"], gpu["stream"], gpu["device"]])[0].tolist():
        used.setdefault((of_process, number), []).append(device)
    keys, group = distinct_rows([process, stream, said])
    found = [_device(used.get((of_process, number), []), device) for of_process, number, device in keys.tolist()]
    return np.array(found, np.int64)[group]


def _device(used: list[int], said: int) -> int:
    if said in used or not used:
        return said if used else c.UNKNOWN
    return used[0] if len(used) == 1 else _SEVERAL

"""What a trace viewer that draws slices is told of a capture: tracks in which slices nest, launches, counters.

Such viewers draw a slice within another one as its child and cannot draw two that overlap in part, so that a stream
or a thread whose work does gets as many tracks as it needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLES, Capture, Table
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.overlap import Hidden
from moe_eplb.analysis.ranges import Launches, match_pairs
from moe_eplb.analysis.trace_report import TraceReport

__all__ = ["Counter", "Slice", "Track", "counters", "iteration_starts", "nested_tracks", "tracks"]

MOST_TRACKS = 64
_CATEGORIES = {
    c.KERNEL: "kernel",
    c.MEMCPY: "gpu_memcpy",
    c.MEMSET: "gpu_memset",
    c.UPDATER_WORK: "eplb_updater",
    c.GRAPH: "cuda_graph",
}
_FIRST_OF_OTHERS = 1 << 20
"""Number of the first track that does not go by its stream's number."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One slice; an instant has no length. `args` are small whole numbers and texts."""

    start: int
    length: int | None
    name: str
    category: str
    args: dict[str, int | str]
    flow: int | None = None
    """The launch that this slice makes or ends, as a number that both have."""


@dataclass(frozen=True)
class Track:
    """One track of a rank: `number` is unique within it. Slices come by start, the longest first."""

    rank: int
    number: int
    order: int
    name: str
    launches: bool
    """Whether flows begin here, and do not end here."""
    slices: list[Slice]


@dataclass(frozen=True, slots=True)
class Counter:
    """A value from a moment on."""

    at: int
    values: dict[str, float]


def nested_tracks(start: NDArray[np.int64], end: NDArray[np.int64], most: int = MOST_TRACKS) -> NDArray[np.int32]:
    """For each slice, by start and the longest first, the first track in which it overlaps none in part; -1 if none."""
    found = np.zeros(len(start), np.int32)
    reach = np.maximum.accumulate(end[:-1]) if len(end) > 1 else end[:0]
    if (start[1:] >= reach).all():
        return found
    open_ends: list[list[int]] = []
    for index, (begin, finish) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        found[index] = c.UNKNOWN
        for track in range(most):
            if track == len(open_ends):
                open_ends.append([])
            ends = open_ends[track]
            while ends and ends[-1] <= begin:
                ends.pop()
            if not ends or finish <= ends[-1]:
                ends.append(finish)
                found[index] = track
                break
    return found


def tracks(capture: Capture, last: int) -> tuple[list[Track], int]:
    """Tracks of streams, updaters and threads of every rank, and how many events found no place in them.

    Args:
        capture: One with roles.
        last: Where ranges that were never closed end.
    """
    launch = Launches(capture).call
    made, left_out = [], 0
    for parts in (_gpu_parts(capture, launch), _host_parts(capture, launch, last)):
        for part in parts:
            tracks_of_part, lost = part.tracks()
            made += tracks_of_part
            left_out += lost
    return _numbered(made), left_out


def counters(report: TraceReport, starts: dict[int, int]) -> dict[str, list[Counter]]:
    """Exposed us and the hidden share of balancer and communication, from each iteration's start on."""
    series: dict[str, list[Counter]] = {}
    for name in ("balancer", "communication"):
        known = {i: hidden for i, hidden in report.pairs[name].iterations.items() if i in starts}
        for iteration, hidden in sorted(known.items(), key=lambda item: starts[item[0]]):
            for what, value in _values(hidden):
                series.setdefault(f"{name}: {what}", []).append(Counter(starts[iteration], {what: value}))
    return series


def iteration_starts(capture: Capture) -> dict[int, int]:
    """When the first GPU event of each iteration starts, on any rank."""
    gpu = capture.gpu[(capture.gpu["iteration"] >= 0) & (capture.gpu["kind"] != c.UPDATER_WORK)]
    numbers, group = np.unique(gpu["iteration"], return_inverse=True)
    first = np.full(len(numbers), np.iinfo(np.int64).max)
    np.minimum.at(first, group, gpu["start"])
    return dict(zip(numbers.tolist(), first.tolist(), strict=True))


def _values(hidden: Hidden) -> Iterator[tuple[str, float]]:
    yield "exposed_us", hidden.exposed / 1e3
    if hidden.overlap is not None:
        yield "hidden_share", round(hidden.overlap, 6)


@dataclass(frozen=True)
class _Part:
    """The events of one stream or thread, not yet in tracks."""

    rank: int
    wanted: int
    order: int
    name: str
    launches: bool
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    slices: list[Slice]

    def tracks(self) -> tuple[list[Track], int]:
        order = np.lexsort((-self.end, self.start))
        place = nested_tracks(self.start[order], self.end[order])
        made = []
        for track in range(int(place.max()) + 1 if len(place) else 0):
            name = self.name if not track else f"{self.name} ({track + 1})"
            mine = [self.slices[index] for index in order[place == track].tolist()]
            wanted = self.wanted if not track else c.UNKNOWN
            made.append(Track(self.rank, wanted, self.order, name, self.launches, mine))
        return made, int((place < 0).sum())


def _numbered(made: list[Track]) -> list[Track]:
    """Tracks with numbers of their own: a stream's own where it is free, others from a large one on."""
    taken: set[tuple[int, int]] = set()
    counted: dict[int, int] = {}
    numbered = []
    for order, track in enumerate(sorted(made, key=lambda t: (t.rank, t.order))):
        number = track.number
        if not 0 <= number < _FIRST_OF_OTHERS or (track.rank, number) in taken:
            number = counted[track.rank] = counted.get(track.rank, _FIRST_OF_OTHERS - 1) + 1
        taken.add((track.rank, number))
        numbered.append(Track(track.rank, number, order, track.name, track.launches, track.slices))
    return numbered


def _gpu_parts(capture: Capture, launch: NDArray[np.int64]) -> Iterator[_Part]:
    gpu, flows = capture.gpu, _first_of_launch(capture, launch)
    updater = gpu["kind"] == c.UPDATER_WORK
    keys, group = distinct_rows([gpu["rank"], updater, gpu["device"], gpu["stream"]])
    devices = {rank: set(np.unique(gpu["device"][gpu["rank"] == rank]).tolist()) for rank in capture.ranks}
    for (rank, own, device, stream), rows in zip(keys.tolist(), _members(group, len(keys)), strict=True):
        name = "updater" if own else f"{capture.streams.get((rank, device, stream)) or 'stream'} {stream}"
        name += f", device {device}" if len(devices[rank]) > 1 and not own else ""
        slices = _gpu_slices(capture, gpu[rows], flows[rows].tolist())
        wanted, order = (c.UNKNOWN, 1) if own else (stream, 0)
        yield _Part(rank, wanted, order, name, False, gpu["start"][rows], gpu["end"][rows], slices)


def _first_of_launch(capture: Capture, launch: NDArray[np.int64]) -> NDArray[np.int64]:
    """The launching call of each GPU event that is the first of its launch; viewers let a flow end but once."""
    order = np.lexsort((capture.gpu["start"], launch))
    later = np.zeros(len(launch), np.bool_)
    later[order[1:]] = launch[order[1:]] == launch[order[:-1]]
    return np.where(later, c.UNKNOWN, launch)


def _gpu_slices(capture: Capture, gpu: Table, flows: list[int]) -> list[Slice]:
    names = capture.names
    always, positive = ("stream", "correlation", "layer", "iteration"), ("graph_node", "bytes")
    columns = [gpu[name].tolist() for name in (*always, *positive)]
    shown = [*always, "graph node id", "bytes"]
    least = [0] * len(always) + [1] * len(positive)
    rows = zip(
        *(gpu[name].tolist() for name in ("start", "end", "name", "kind", "role", "device")),
        flows,
        *columns,
        strict=True,
    )
    slices = []
    for start, end, name, kind, role, device, flow, *values in rows:
        args: dict[str, int | str] = {"role": ROLES[role].value, "device": device}
        args |= {key: value for key, value, low in zip(shown, values, least, strict=True) if value >= low}
        text = names[name] if name >= 0 else ""
        slices.append(Slice(start, end - start, text, _CATEGORIES[kind], args, flow if flow >= 0 else None))
    return slices


def _host_parts(capture: Capture, launch: NDArray[np.int64], last: int) -> Iterator[_Part]:
    """Ranges and calls by thread. A call that a range says already, as in our own records, is that range."""
    ranges, calls = capture.ranges, capture.calls
    launching = np.unique(launch[launch >= 0])
    same = _range_of_call(ranges, calls)
    flow_of_range = np.full(len(ranges), c.UNKNOWN, np.int64)
    flow_of_range[same[launching][same[launching] >= 0]] = launching[same[launching] >= 0]
    alone = np.flatnonzero(same < 0)
    both = [(ranges["rank"], calls["rank"][alone]), (ranges["thread"], calls["thread"][alone])]
    keys, group = distinct_rows([np.concatenate(pair) for pair in both])
    named: dict[int, int] = {}
    is_launch = np.zeros(len(calls), np.bool_)
    is_launch[launching] = True
    for (rank, thread), members in zip(keys.tolist(), _members(group, len(keys)), strict=True):
        named[rank] = named.get(rank, 0) + 1
        own = members[members < len(ranges)]
        made = alone[members[members >= len(ranges)] - len(ranges)]
        slices = _range_slices(capture, ranges[own], flow_of_range[own].tolist(), last)
        slices += _call_slices(capture, calls[made], np.where(is_launch[made], made, c.UNKNOWN).tolist())
        start = np.array([one.start for one in slices], np.int64)
        end = start + np.array([one.length or 0 for one in slices], np.int64)
        yield _Part(rank, c.UNKNOWN, 2, f"host {named[rank]}, thread {thread}", True, start, end, slices)


def _range_of_call(ranges: Table, calls: Table) -> NDArray[np.int64]:
    """For each call the row of a range of its thread with its start and its end, or UNKNOWN."""
    if not len(ranges) or not len(calls):
        return np.full(len(calls), c.UNKNOWN, np.int64)
    keys = [np.concatenate([ranges[name], calls[name]]).astype(np.int64) for name in ("rank", "thread", "start", "end")]
    _, group = distinct_rows(keys)
    of_range, of_call = group[: len(ranges)], group[len(ranges) :]
    zeros = np.zeros(len(calls), np.int64)
    return match_pairs(zeros, of_call, np.zeros(len(ranges), np.int64), of_range)


def _range_slices(capture: Capture, ranges: Table, flows: list[int], last: int) -> list[Slice]:
    names, slices = capture.names, []
    columns = ("start", "end", "text", "domain", "payload", "kind")
    for start, end, text, domain, payload, kind, flow in zip(
        *(ranges[n].tolist() for n in columns), flows, strict=True
    ):
        args: dict[str, int | str] = {"domain": names[domain]} if domain >= 0 and names[domain] else {}
        args |= {"payload": payload} if payload not in (c.NO_PAYLOAD, c.UNKNOWN) else {}
        args |= {"end": "never closed"} if kind != c.MARK and end < start else {}
        length = None if kind == c.MARK else (last if end < start else end) - start
        category = "cpu_op" if kind == c.OPERATOR else "user_annotation"
        name = names[text] if text >= 0 else ""
        slices.append(Slice(start, length, name, category, args, flow if flow >= 0 else None))
    return slices


def _call_slices(capture: Capture, calls: Table, flows: list[int]) -> list[Slice]:
    names, slices = capture.names, []
    columns = ("start", "end", "name", "correlation")
    for start, end, name, correlation, flow in zip(*(calls[n].tolist() for n in columns), flows, strict=True):
        args: dict[str, int | str] = {"correlation": correlation} if correlation >= 0 else {}
        text = names[name] if name >= 0 else ""
        slices.append(Slice(start, max(end - start, 0), text, "cuda_runtime", args, flow if flow >= 0 else None))
    return slices


def _members(group: NDArray[np.int64], groups: int) -> list[NDArray[np.int64]]:
    order = np.argsort(group, kind="stable")
    return np.split(order, np.searchsorted(group[order], np.arange(1, groups))) if groups else []

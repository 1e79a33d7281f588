"""What a picture of a capture shows, as plain columns: lanes, exposed stretches, iterations, and a map of heat.

A page, an image and a browser's own drawing are made from this one; nothing here knows how they look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.exposed import exposed_times
from moe_eplb.analysis.intervals import Intervals
from moe_eplb.analysis.overlap import PAIRS
from moe_eplb.analysis.selection import EVERYTHING, Selection
from moe_eplb.analysis.timeline_heat import Heat, heat_map
from moe_eplb.analysis.timeline_lanes import RANGE_ROLE, Lane, LaneKind, lanes_of
from moe_eplb.analysis.timeline_merge import merge_events, merge_stretches
from moe_eplb.core.errors import TraceError

__all__ = ["MOST_EVENTS", "RANGE_ROLE", "IterationSpan", "Lane", "LaneKind", "Timeline", "make_timeline"]

MOST_EVENTS = 200_000
_MOST_STRETCHES = 20_000
_LONGEST = 1 << 53
"""Whole ns beyond it cannot be told apart by a program that counts in float64, as browsers do."""


@dataclass(frozen=True, slots=True)
class IterationSpan:
    """From the first start to the last end of an iteration's device work, over all ranks."""

    number: int
    start: int
    end: int


@dataclass(frozen=True)
class Timeline:
    """A picture's content.

    Attributes:
        names: Texts that the lanes' names point into, those of the capture.
        first, last: All that is drawn lies between them, in ns.
        view: The part that is asked for: that of the selected GPU events.
        exposed: Stretches of balancer work that nothing hides, by (rank, device), of the selected events.
        events, drawn: How many events there are, and how many entries of lanes stand for them.
        bucket_ns: Events shorter than this were put together with their neighbours; 0 if none were.
        notes: What the picture leaves out or puts together, in words.
    """

    names: tuple[str, ...]
    first: int
    last: int
    view: tuple[int, int]
    lanes: tuple[Lane, ...]
    exposed: dict[tuple[int, int], Intervals]
    iterations: tuple[IterationSpan, ...]
    heat: Heat
    events: int
    drawn: int
    bucket_ns: int
    notes: tuple[str, ...]


def make_timeline(capture: Capture, selection: Selection = EVERYTHING, most_events: int = MOST_EVENTS) -> Timeline:
    """The picture of a capture that `moe_eplb.analysis.roles.prepare` has been through.

    Every event is drawn; the selection says which of them are asked about: the view, exposed stretches and the heat.

    Args:
        most_events: Above it, neighbours that are short are merged, the shortest first.

    Raises:
        TraceError: E075 the capture spans more ns than a picture can tell apart.
    """
    first, last = _span(capture)
    gpu = capture.gpu
    only = selection.mask(gpu["rank"], gpu["iteration"], gpu["layer"])
    lanes, left_out = lanes_of(capture, last)
    events = sum(int(lane.events["count"].sum()) for lane in lanes)
    lanes, bucket = merge_events(lanes, first, last, most_events)
    exposed, gap = _exposed(capture, only, most_events)
    drawn = sum(len(lane.events) for lane in lanes)
    return Timeline(
        capture.names, first, last, _view(capture, only, first, last), tuple(lanes), exposed, _iterations(capture),
        heat_map(capture, only), events, drawn, bucket, (*left_out, *_merge_notes(events, drawn, bucket, gap)),
    )  # fmt: skip


def _span(capture: Capture) -> tuple[int, int]:
    tables = [table for table in (capture.gpu, capture.ranges) if len(table)]
    if not tables:
        return 0, 1
    first = min(int(table["start"].min()) for table in tables)
    last = max(max(int(table["end"].max()), int(table["start"].max())) for table in tables)
    if last - first >= _LONGEST:
        why = f"{last - first} ns, at most {_LONGEST - 1} can be drawn"
        hint = "is a time in it wrong? `eplbctl report` without a picture says where its work lies"
        raise TraceError("E075", "a trace spans too long for a picture", why=why, hint=hint, where=capture.source)
    return first, max(last, first + 1)


def _view(capture: Capture, only: c.Table, first: int, last: int) -> tuple[int, int]:
    chosen = capture.gpu[only] if only.any() else capture.gpu
    if not len(chosen):
        return first, last
    start, end = int(chosen["start"].min()), int(chosen["end"].max())
    return start, max(end, start + 1)


def _exposed(capture: Capture, only: c.Table, most_events: int) -> tuple[dict[tuple[int, int], Intervals], int]:
    found = exposed_times(capture, PAIRS["balancer"], only)
    return merge_stretches(found, min(_MOST_STRETCHES, most_events))


def _iterations(capture: Capture) -> tuple[IterationSpan, ...]:
    gpu = capture.gpu[(capture.gpu["iteration"] >= 0) & (capture.gpu["kind"] != c.UPDATER_WORK)]
    numbers, group = np.unique(gpu["iteration"], return_inverse=True)
    first, last = np.full(len(numbers), np.iinfo(np.int64).max), np.full(len(numbers), np.iinfo(np.int64).min)
    np.minimum.at(first, group, gpu["start"])
    np.maximum.at(last, group, gpu["end"])
    return tuple(IterationSpan(*row) for row in zip(numbers.tolist(), first.tolist(), last.tolist(), strict=True))


def _merge_notes(events: int, drawn: int, bucket: int, gap: int) -> Sequence[str]:
    notes = []
    if bucket:
        notes.append(
            f"{events} events are drawn as {drawn}: neighbours shorter than {bucket} ns are merged, in the colour of "
            "the role that took most of their time"
        )
    if gap:
        notes.append(f"exposed stretches less than {gap} ns apart are marked as one; the figures are those of each")
    return notes

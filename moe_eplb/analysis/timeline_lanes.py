"""Lanes of a picture: one for each stream, one for each updater, one for each host thread that noted ranges.

Within a lane nothing covers anything else: what runs at the same time, as ranges within ranges do, stands in rows, each
event in the first row that is free.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import ROLE_CODE, ROLES, Capture, Table
from moe_eplb.analysis.grouping import distinct_rows
from moe_eplb.analysis.work import main_streams
from moe_eplb.core.events import KINDS, by_name

__all__ = ["EVENT", "MARKED", "MOST_LANES", "MOST_ROWS", "NOT_CLOSED", "RANGE_ROLE", "Lane", "LaneKind", "lanes_of"]
__all__ += ["rows_of"]

RANGE_ROLE = len(ROLES)
"""Code of a host range that no role belongs to, beside those of `moe_eplb.analysis.capture.ROLES`."""
MOST_ROWS, MOST_LANES = 24, 512
MARKED, NOT_CLOSED = 1, 2
"""Flags of an event: a moment without length, a range that was never closed and is drawn to the end."""

EVENT = np.dtype(
    [
        ("start", "<i8"),
        ("end", "<i8"),
        ("name", "<i4"),
        ("row", "<i4"),
        ("layer", "<i4"),
        ("iteration", "<i4"),
        ("count", "<i4"),  # events that this one stands for
        ("role", "u1"),
        ("flags", "u1"),
    ]
)


class LaneKind(enum.StrEnum):
    """What a lane belongs to."""

    STREAM = "stream"
    UPDATER = "updater"
    HOST = "host"


@dataclass(frozen=True)
class Lane:
    """One lane.

    Attributes:
        number: Number of the stream or thread.
        name: Its declared name, or one made from its number.
        main: Whether it is its GPU's main stream.
        rows: How many rows it has.
        events: Table of type `EVENT`, by row and start; those of a row do not overlap.
    """

    kind: LaneKind
    rank: int
    device: int
    number: int
    name: str
    main: bool
    rows: int
    events: Table


def lanes_of(capture: Capture, last: int) -> tuple[list[Lane], list[str]]:
    """All lanes, by rank: its streams, the main one first, its updater, its threads; and what is left out, in words.

    Args:
        last: Where ranges that were never closed end.
    """
    notes: list[str] = []
    lanes = _stream_lanes(capture, notes) + _thread_lanes(capture, last, notes)
    if len(lanes) > MOST_LANES:
        kept = sorted(lanes, key=lambda lane: -len(lane.events))[:MOST_LANES]
        notes.append(f"{len(lanes) - MOST_LANES} lanes with the fewest events are left out, {MOST_LANES} are drawn")
        lanes = kept
    order = {kind: place for place, kind in enumerate(LaneKind)}
    return sorted(lanes, key=lambda one: (one.rank, order[one.kind], one.device, not one.main, one.number)), notes


def rows_of(start: NDArray[np.int64], end: NDArray[np.int64], most: int = MOST_ROWS) -> NDArray[np.int32]:
    """For each event, by start and the longest first, the first row that is free then; -1 if `most` rows are taken."""
    rows = np.zeros(len(start), np.int32)
    reach = np.maximum.accumulate(end[:-1]) if len(end) > 1 else end[:0]
    if (start[1:] >= reach).all():
        return rows
    free_from: list[int] = []
    for index, (begin, finish) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        row = next((row for row, free in enumerate(free_from) if free <= begin), len(free_from))
        if row == len(free_from):
            if row == most:
                rows[index] = c.UNKNOWN
                continue
            free_from.append(finish)
        free_from[row], rows[index] = finish, row
    return rows


def _stream_lanes(capture: Capture, notes: list[str]) -> list[Lane]:
    mains, gpu = main_streams(capture), capture.gpu
    updater = gpu["kind"] == c.UPDATER_WORK
    keys, group = distinct_rows([gpu["rank"], gpu["device"], gpu["stream"], updater])
    lanes = []
    for (rank, device, stream, own), rows in zip(keys.tolist(), _members(group, len(keys)), strict=True):
        main = not own and mains.get((rank, device)) == stream
        name = "updater" if own else capture.streams.get((rank, device, stream)) or f"stream {stream}"
        kind = LaneKind.UPDATER if own else LaneKind.STREAM
        lanes.append(_lane(kind, rank, device, stream, name, main, _gpu_events(gpu[rows]), notes))
    return lanes


def _gpu_events(gpu: Table) -> Table:
    events = np.zeros(len(gpu), EVENT)
    for name in ("start", "end", "name", "layer", "iteration"):
        events[name] = gpu[name]
    events["role"] = np.minimum(gpu["role"], RANGE_ROLE)
    return events


def _thread_lanes(capture: Capture, last: int, notes: list[str]) -> list[Lane]:
    operators = capture.ranges["kind"] == c.OPERATOR
    if operators.any():
        notes.append(f"{int(operators.sum())} operators that a framework noted for itself are left out")
    ranges = capture.ranges[~operators]
    events = _range_events(capture, ranges, last)
    keys, group = distinct_rows([ranges["rank"], ranges["process"], ranges["thread"]])
    lanes: list[Lane] = []
    of_rank: dict[int, int] = {}
    for (rank, _, thread), rows in zip(keys.tolist(), _members(group, len(keys)), strict=True):
        of_rank[rank] = of_rank.get(rank, 0) + 1
        name = "host" if of_rank[rank] == 1 else f"host {of_rank[rank]}"
        lanes.append(_lane(LaneKind.HOST, rank, c.UNKNOWN, thread, name, False, events[rows], notes))
    return lanes


def _range_events(capture: Capture, ranges: Table, last: int) -> Table:
    events = np.zeros(len(ranges), EVENT)
    marked = (ranges["kind"] == c.MARK) | (ranges["end"] == ranges["start"])
    not_closed = (ranges["end"] == c.UNKNOWN) & ~marked
    events["start"] = ranges["start"]
    events["end"] = np.where(marked, ranges["start"], np.where(not_closed, last, ranges["end"]))
    events["name"] = ranges["text"]
    events["flags"] = marked * MARKED + not_closed * NOT_CLOSED
    texts, inverse = np.unique(ranges["text"], return_inverse=True)
    ours = np.array([_ours(capture.names[text]) for text in texts.tolist()], np.int64).reshape(-1, 2)[inverse]
    own = ranges["domain"] == (capture.names.index("moe_eplb") if "moe_eplb" in capture.names else c.UNKNOWN - 1)
    events["role"] = np.where(own, ours[:, 0], RANGE_ROLE)
    events["layer"] = np.where(own, ours[:, 1], c.UNKNOWN)
    known = own & (ranges["payload"] >= 0) & (ranges["payload"] < 1 << 31)
    events["iteration"] = np.where(known, ranges["payload"], c.UNKNOWN)
    return events


def _ours(text: str) -> tuple[int, int]:
    """Role code and layer of one of our own ranges, named ``kind/layer``."""
    name, _, layer = text.partition("/")
    kind = by_name(name)
    number = int(layer) if layer.isascii() and layer.isdigit() and len(layer) < 9 else c.UNKNOWN
    return RANGE_ROLE if kind is None else ROLE_CODE[KINDS[kind].role], number


def _lane(
    kind: LaneKind, rank: int, device: int, number: int, name: str, main: bool, events: Table, notes: list[str]
) -> Lane:
    events = events[np.lexsort((-events["end"], events["start"]))]
    rows = rows_of(events["start"], events["end"])
    kept = rows >= 0
    if not kept.all():
        notes.append(
            f"rank {rank}, {name}: {int((~kept).sum())} events are left out where more than {MOST_ROWS} overlap"
        )
    events["row"], events["count"] = rows, 1
    events = events[kept]
    events = events[np.argsort(events["row"], kind="stable")]
    return Lane(kind, rank, device, number, name, main, int(events["row"].max()) + 1 if len(events) else 1, events)


def _members(group: NDArray[np.int64], groups: int) -> Sequence[NDArray[np.int64]]:
    """Indices of each group's members, in order."""
    order = np.argsort(group, kind="stable")
    return np.split(order, np.searchsorted(group[order], np.arange(1, groups))) if groups else []

"""A timeline as plain lists that are small as JSON: differences instead of times, numbers instead of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.capture import Table
from moe_eplb.analysis.timeline import Timeline
from moe_eplb.analysis.timeline_lanes import Lane

__all__ = ["MOST_NAMES", "timeline_data"]

MOST_NAMES = 20_000
_OTHER = "another name"


def timeline_data(timeline: Timeline, show: Callable[[str], str] = str) -> dict[str, Any]:
    """What a page embeds. All times count from `first`, in ns.

    A lane's columns are `start` as differences within a row, `length`, `layer` and `iteration` as differences, the
    numbers `name_of` and `role`, and `count` and `flags` where one of them says something. `rows` counts the events
    of each row.

    Args:
        show: Makes a text fit to be shown.
    """
    used, numbers = _names(timeline)
    texts = [show(timeline.names[name]) if name < len(timeline.names) else "no name" for name in used]
    notes = list(timeline.notes)
    if (numbers == len(used)).any():
        texts.append(_OTHER)
        notes.append(f"there are more than {MOST_NAMES} names: the rarer ones are called “{_OTHER}”")
    return {
        "first": str(timeline.first),
        "span": timeline.last - timeline.first,
        "view": [at - timeline.first for at in timeline.view],
        "names": texts,
        "lanes": [_lane(lane, timeline.first, numbers, show) for lane in timeline.lanes],
        "exposed": [
            {"rank": rank, "device": device, "times": _differences(times.reshape(-1) - timeline.first)}
            for (rank, device), times in timeline.exposed.items()
        ],
        "iterations": [[i.number, i.start - timeline.first, i.end - timeline.first] for i in timeline.iterations],
        "heat": _heat(timeline),
        "events": timeline.events,
        "drawn": timeline.drawn,
        "notes": notes,
    }


def _names(timeline: Timeline) -> tuple[list[int], NDArray[np.int32]]:
    """The names that are drawn, the most frequent if there are too many, and the new number of each old one."""
    count = np.zeros(len(timeline.names) + 1, np.int64)  # the last one is for events without a name, numbered -1
    for lane in timeline.lanes:
        np.add.at(count, lane.events["name"], 1)
    used = np.flatnonzero(count)
    if len(used) > MOST_NAMES:
        used = np.sort(used[np.argsort(-count[used], kind="stable")[:MOST_NAMES]])
    numbers = np.where(count > 0, len(used), -1).astype(np.int32)
    numbers[used] = np.arange(len(used))
    return used.tolist(), numbers


def _lane(lane: Lane, first: int, numbers: NDArray[np.int32], show: Callable[[str], str]) -> dict[str, Any]:
    events = lane.events
    return {
        "kind": lane.kind.value, "rank": lane.rank, "device": lane.device, "number": str(lane.number),
        "name": show(lane.name), "main": lane.main,
        "rows": np.bincount(events["row"], minlength=lane.rows).tolist(),
        "start": _starts(events, first),
        "length": (events["end"] - events["start"]).tolist(),
        "name_of": numbers[events["name"]].tolist(),
        "role": events["role"].tolist(),
        "layer": _differences(events["layer"]),
        "iteration": _differences(events["iteration"]),
        "count": events["count"].tolist() if (events["count"] > 1).any() else None,
        "flags": events["flags"].tolist() if events["flags"].any() else None,
    }  # fmt: skip


def _starts(events: Table, first: int) -> list[int]:
    starts = events["start"] - first
    steps = np.diff(starts, prepend=0)
    fresh = np.diff(events["row"], prepend=-1) != 0
    found: list[int] = np.where(fresh, starts, steps).tolist()
    return found


def _differences(values: NDArray[Any]) -> list[int]:
    found: list[int] = np.diff(values.astype(np.int64), prepend=0).tolist()
    return found


def _heat(timeline: Timeline) -> dict[str, Any]:
    heat = timeline.heat
    return {
        "layers": heat.layers, "iterations": heat.iterations, "total": heat.total_ns, "exposed": heat.exposed_ns,
    }  # fmt: skip

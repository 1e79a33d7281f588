"""Fewer entries for a picture that would have too many: short neighbours become one, always the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moe_eplb.analysis.capture import UNKNOWN, Table
from moe_eplb.analysis.intervals import Intervals
from moe_eplb.analysis.timeline_lanes import RANGE_ROLE, Lane

__all__ = ["merge_events", "merge_stretches"]


def merge_events(lanes: Sequence[Lane], first: int, last: int, most: int) -> tuple[list[Lane], int]:
    """Lanes with at most `most` entries, and how long an event must be to stay by itself; 0 if all of them do.

    Time from `first` on is cut into buckets of a power of two of ns, the least that does. Events of one row shorter
    than a bucket that start in the same one become one entry. A bucket that all times up to `last` are in leaves one
    entry of a row, so that there are more than `most` only where there are more rows.
    """
    bucket = 0
    if sum(len(lane.events) for lane in lanes) > most:
        bucket = 2
        while bucket <= last - first and sum(int(_begins(lane.events, first, bucket).sum()) for lane in lanes) > most:
            bucket *= 2
        lanes = [replace(lane, events=_merged(lane.events, first, bucket)) for lane in lanes]
    return list(lanes), bucket


def merge_stretches(found: dict[tuple[int, int], Intervals], most: int) -> tuple[dict[tuple[int, int], Intervals], int]:
    """Unions with at most `most` stretches in all, and the gap in ns below which two became one; 0 if none did."""
    gap = 0
    while sum(len(times) for times in found.values()) > max(most, len(found)):
        gap = gap * 2 or 1
        found = {key: _closed(times, gap) for key, times in found.items()}
    return found, gap


def _begins(events: Table, origin: int, bucket: int) -> NDArray[np.bool_]:
    """Which events are the first of what becomes one entry."""
    begins = np.ones(len(events), np.bool_)
    short = events["end"] - events["start"] < bucket
    place = (events["start"] - origin) // bucket
    joined = short[1:] & short[:-1] & (place[1:] == place[:-1]) & (events["row"][1:] == events["row"][:-1])
    begins[1:] = ~joined
    return begins


def _merged(events: Table, origin: int, bucket: int) -> Table:
    begins = _begins(events, origin, bucket)
    first = np.flatnonzero(begins)
    if len(first) == len(events):
        return events
    group = np.cumsum(begins) - 1
    longest = _longest(events, group, len(first))
    merged = events[first].copy()
    merged["end"] = np.maximum.reduceat(events["end"], first)
    merged["count"] = np.add.reduceat(events["count"], first)
    merged["flags"] = np.bitwise_and.reduceat(events["flags"], first)
    merged["name"] = events["name"][longest]
    merged["role"] = _main_role(events, group, len(first))
    for name in ("layer", "iteration"):
        alike = np.minimum.reduceat(events[name], first) == np.maximum.reduceat(events[name], first)
        merged[name] = np.where(alike, events[name][first], UNKNOWN)
    return merged


def _longest(events: Table, group: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """The first of the longest events of each group."""
    order = np.lexsort((events["start"] - events["end"], group))
    found: NDArray[np.int64] = order[np.searchsorted(group[order], np.arange(groups))]
    return found


def _main_role(events: Table, group: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """The role that took most of each group's time, of equal ones the first."""
    times = np.bincount(
        group * (RANGE_ROLE + 1) + events["role"], events["end"] - events["start"], groups * (RANGE_ROLE + 1)
    )
    found: NDArray[np.int64] = times.reshape(groups, RANGE_ROLE + 1).argmax(axis=1)
    return found


def _closed(times: Intervals, gap: int) -> Intervals:
    """A union whose gaps shorter than `gap` are filled."""
    if len(times) < 2:
        return times
    apart = times[1:, 0] - times[:-1, 1] >= gap
    starts = times[np.concatenate([[True], apart]), 0]
    return np.stack([starts, times[np.concatenate([apart, [True]]), 1]], axis=1)

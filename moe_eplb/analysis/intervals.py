"""Exact sums over sets of half-open time intervals, in integer nanoseconds.

A set is an int64 array [N, 2] of (start, end). `union` sorts and merges, `coverage` says how much of a union lies
before a moment, `clip` cuts intervals along a union; the rest is made from these. A union is in order and disjoint.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_eplb.analysis.grouping import members

__all__ = [
    "EMPTY",
    "Intervals",
    "clip",
    "coverage",
    "grouped_length",
    "intersect_length",
    "intervals",
    "length",
    "subtract",
    "union",
]

Intervals: TypeAlias = NDArray[np.int64]
EMPTY: Intervals = np.empty((0, 2), dtype=np.int64)
_LONGEST = float(1 << 62)
_FIRST, _LAST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def intervals(starts: ArrayLike, ends: ArrayLike) -> Intervals:
    """A set from starts [N] and ends [N]; intervals without length are left out.

    Raises:
        ValueError: an end lies before its start.
    """
    pairs = np.stack([np.asarray(starts, np.int64), np.asarray(ends, np.int64)], axis=1)
    if np.any(pairs[:, 1] < pairs[:, 0]):
        at = int(np.flatnonzero(pairs[:, 1] < pairs[:, 0])[0])
        raise ValueError(f"interval {at} ends at {pairs[at, 1]}, before its start {pairs[at, 0]}")
    return pairs[pairs[:, 1] > pairs[:, 0]]


def union(pairs: Intervals) -> Intervals:
    """The same points as disjoint intervals in order; touching ones are merged."""
    if not len(pairs):
        return EMPTY
    sorted_already = bool((pairs[1:, 0] >= pairs[:-1, 0]).all())
    ordered = pairs if sorted_already else pairs[np.argsort(pairs[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    begins = np.concatenate([[True], ordered[1:, 0] > reach[:-1]])
    ends = reach[np.concatenate([begins[1:], [True]])]
    return np.stack([ordered[begins, 0], ends], axis=1)


def length(disjoint: Intervals) -> int:
    """Total length of a union."""
    return int((disjoint[:, 1] - disjoint[:, 0]).sum())


def coverage(disjoint: Intervals, moments: ArrayLike) -> NDArray[np.int64]:
    """For each moment, how much of a union lies before it."""
    at = np.asarray(moments, np.int64)
    if not len(disjoint):
        return np.zeros(at.shape, np.int64)
    before = np.concatenate([[0], np.cumsum(disjoint[:, 1] - disjoint[:, 0])])
    index = np.searchsorted(disjoint[:, 0], at, side="right")
    last = np.maximum(index - 1, 0)
    beyond = np.where(index > 0, np.maximum(disjoint[last, 1] - at, 0), 0)
    return np.asarray(before[index] - beyond, np.int64)


def intersect_length(a: Intervals, b: Intervals) -> int:
    """Length of what two unions have in common."""
    return int((coverage(b, a[:, 1]) - coverage(b, a[:, 0])).sum())


def clip(pairs: Intervals, cover: Intervals) -> tuple[Intervals, NDArray[np.int64]]:
    """The pieces of each interval that a union covers, and the index [pieces] of the interval they come from."""
    if not len(pairs) or not len(cover):
        return EMPTY, np.empty(0, dtype=np.int64)
    first = np.searchsorted(cover[:, 1], pairs[:, 0], side="right")
    beyond = np.searchsorted(cover[:, 0], pairs[:, 1], side="left")
    counts = np.maximum(beyond - first, 0)
    owner = np.repeat(np.arange(len(pairs)), counts)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    covering = cover[first[owner] + nth]
    starts = np.maximum(pairs[owner, 0], covering[:, 0])
    ends = np.minimum(pairs[owner, 1], covering[:, 1])
    return np.stack([starts, ends], axis=1), owner


def grouped_length(pairs: Intervals, group: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """Length [groups] of each group's own union, for intervals [N, 2] with a group number [N] each.

    Every group is moved to a stretch of time of its own, just as long as it needs, so that one union serves all.
    """
    lengths = np.zeros(groups, dtype=np.int64)
    if not len(pairs):
        return lengths
    first = np.full(groups, np.iinfo(np.int64).max)
    last = np.full(groups, np.iinfo(np.int64).min)
    np.minimum.at(first, group, pairs[:, 0])
    np.maximum.at(last, group, pairs[:, 1])
    spans = np.where(last >= first, last - first + 1, 0)
    if float(spans.sum(dtype=np.float64)) > _LONGEST:
        return _one_by_one(pairs, group, groups)
    begins = np.cumsum(spans) - spans
    moved = union(pairs + (begins - first)[group][:, np.newaxis])
    owner = np.searchsorted(begins, moved[:, 0], side="right") - 1
    np.add.at(lengths, owner, moved[:, 1] - moved[:, 0])
    return lengths


def _one_by_one(pairs: Intervals, group: NDArray[np.int64], groups: int) -> NDArray[np.int64]:
    """The same for groups so far apart or so long that all of them do not fit on one axis."""
    return np.array([length(union(pairs[rows])) for rows in members(group, groups)], np.int64)


def subtract(a: Intervals, b: Intervals) -> Intervals:
    """What of a union another union does not have, as a union."""
    if not len(a) or not len(b):
        return a
    # What lies between the parts of b, with the two ends of time.
    edges = np.concatenate([[_FIRST], b.reshape(-1), [_LAST]]).reshape(-1, 2)
    return clip(a, edges[edges[:, 1] > edges[:, 0]])[0]

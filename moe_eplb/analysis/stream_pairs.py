"""How long every two streams of a GPU ran at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.intervals import Intervals, clip, intervals, length, union

__all__ = ["StreamPair", "stream_pairs"]


@dataclass(frozen=True, slots=True)
class StreamPair:
    """Busy ns of two streams of a GPU, and of both at once."""

    rank: int
    device: int
    first: int
    second: int
    first_ns: int
    second_ns: int
    both_ns: int


def stream_pairs(capture: Capture) -> tuple[StreamPair, ...]:
    """Every two streams of every GPU, those that ran together longest first."""
    gpu = capture.gpu[capture.gpu["kind"] != c.UPDATER_WORK]
    busy: dict[tuple[int, int], dict[int, Intervals]] = {}
    for rank, device, stream in np.unique(gpu[["rank", "device", "stream"]]).tolist():
        mine = gpu[(gpu["rank"] == rank) & (gpu["device"] == device) & (gpu["stream"] == stream)]
        busy.setdefault((rank, device), {})[stream] = union(intervals(mine["start"], mine["end"]))
    rows = []
    for (rank, device), streams in busy.items():
        for first, second in combinations(sorted(streams), 2):
            both = length(clip(streams[first], streams[second])[0])
            ns = length(streams[first]), length(streams[second])
            rows.append(StreamPair(rank, device, first, second, *ns, both))
    return tuple(sorted(rows, key=lambda r: (-r.both_ns, r.rank, r.device, r.first, r.second)))

"""How long every two streams of a GPU ran at the same time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from moe_eplb.analysis import capture as c
from moe_eplb.analysis.capture import Capture
from moe_eplb.analysis.grouping import distinct_rows, members
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
    keys, group = distinct_rows([gpu["rank"], gpu["device"], gpu["stream"]])
    for (rank, device, stream), mine in zip(keys.tolist(), members(group, len(keys)), strict=True):
        of_stream = union(intervals(gpu["start"][mine], gpu["end"][mine]))
        busy.setdefault((rank, device), {})[stream] = of_stream
    rows = []
    for (rank, device), streams in busy.items():
        for first, second in combinations(sorted(streams), 2):
            both = length(clip(streams[first], streams[second])[0])
            ns = length(streams[first]), length(streams[second])
            rows.append(StreamPair(rank, device, first, second, *ns, both))
    return tuple(sorted(rows, key=lambda r: (-r.both_ns, r.rank, r.device, r.first, r.second)))

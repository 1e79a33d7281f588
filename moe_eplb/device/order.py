"""Which work must come after which, checked by what the streams were told and not by when it happened to run.

On a CPU the main stream runs at once, so times alone would show every order as right. Vector clocks (Mattern 1988)
know which work really waits for which: an event's mark carries its stream's clock, a wait merges it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from moe_eplb.core.events import ALL_LAYERS, ROUTE_COUNTS, VOTES, Kind
from moe_eplb.device.base import Stream

__all__ = ["Clock", "StreamOrder", "Unordered"]

Clock = dict[Stream, int]
"""For each stream, how much of its work comes before."""

_READS = (Kind.ROUTE, Kind.EXPERTS)
_RESULTS = (Kind.COMBINE, Kind.SHARED_EXPERT)
_STATISTICS = (
    Kind.UPDATE_LOCAL_STATISTIC, Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS,
)  # fmt: skip
"""What counts; a route may, too."""
_COUNTS = (
    *_STATISTICS, Kind.UPDATE_STATISTIC_WITH_GATHERED_STATISTIC, Kind.STATISTIC_REDUCE, Kind.LOAD_UPDATE, Kind.VOTE,
    Kind.SETTLE_VOTE,
)  # fmt: skip
"""What an update is made from and agreed by."""
_SETTLES = (Kind.LOAD_UPDATE, Kind.SETTLE_VOTE)
"""What decides on the plan of the layer that runs next."""
_BEFORE_HAND_OVER = frozenset(_READS + _COUNTS)


class Unordered(NamedTuple):
    """Work that should have waited for earlier work of another stream and did not."""

    earlier: Kind
    stream: Stream


class _Work(NamedTuple):
    kind: Kind
    stream: Stream
    position: int


class StreamOrder:
    """Follows the work of all streams of a device.

    The rules, for each layer: the wait for the layer comes after its hand-over in the iteration before, after the
    wait for the layer before it, and after every vote that has been settled, of which one is on its plan; route,
    experts and statistics come after the wait for the layer; the vote, which takes the counts along, comes after
    whatever has counted, in all layers where it takes those of all; the hand-over comes after all of them, on
    whatever stream; the next layer's top-k comes after every result of the layer before and after its hand-over.
    """

    def __init__(self) -> None:
        self._clocks: defaultdict[Stream, Clock] = defaultdict(dict)
        self.forget()

    def forget(self) -> None:
        """Drop what the layers have begun, after an iteration that was aborted."""
        self._wait: dict[int, _Work] = {}
        self._handed: dict[int, _Work] = {}
        self._settled: dict[int, _Work] = {}
        self._reads: defaultdict[int, list[_Work]] = defaultdict(list)
        self._results: defaultdict[int, list[_Work]] = defaultdict(list)
        self._counts: defaultdict[int, list[_Work]] = defaultdict(list)
        self._layer, self._input = -1, list[_Work]()

    def mark(self, stream: Stream, *, within: bool = False) -> Clock:
        """What comes before an event that is recorded on `stream` now, `within` its latest work or behind that."""
        clock = self._clocks[stream].copy()
        if within:
            clock[stream] = clock.get(stream, 0) - 1
        return clock

    def wait(self, stream: Stream, mark: Clock) -> None:
        """Later work of `stream` comes after the mark."""
        clock = self._clocks[stream]
        for other, position in mark.items():
            if position > clock.get(other, 0):
                clock[other] = position

    def work(self, stream: Stream, kind: Kind, layer: int, a: int = 0) -> Unordered | None:
        """Put work with payload `a` on a stream; the first thing that it should have waited for and did not."""
        clock = self._clocks[stream]
        position = clock[stream] = clock.get(stream, 0) + 1
        work = _Work(kind, stream, position)
        if kind in _STATISTICS or (kind is Kind.ROUTE and a & ROUTE_COUNTS):
            self._counts[layer].append(work)
        for earlier in self._earlier(work, layer, a):
            if clock.get(earlier.stream, 0) < earlier.position:
                return Unordered(earlier.kind, earlier.stream)
        return None

    def _earlier(self, work: _Work, layer: int, a: int) -> list[_Work]:
        """What `work` must come after, while it takes its place among the layer's work."""
        kind = work.kind
        if kind in _SETTLES:
            self._settled[layer] = work
        if kind in _BEFORE_HAND_OVER:
            self._reads[layer].append(work)
            votes = kind is Kind.VOTE or (kind is Kind.LOAD_UPDATE and a & VOTES)
            counted = self._counted(layer, a) if votes else []
            return [self._wait[layer], *counted] if layer in self._wait else counted
        if kind in _RESULTS:
            self._results[layer].append(work)
        elif kind is Kind.START_WAIT_GPU_STAGE:
            self._wait[layer] = work
            before = (self._handed.get(layer), self._wait.get(layer - 1), *self._settled.values())
            return [earlier for earlier in before if earlier is not None]
        elif kind is Kind.START_SET_CPU_STAGE:
            self._handed[layer] = work
            self._results[layer].append(work)
            return self._reads.pop(layer, [])
        elif kind is Kind.TOPK:
            return self._inputs(layer)
        return []

    def _counted(self, layer: int, a: int) -> list[_Work]:
        """What has counted for a vote."""
        layers = list(self._counts) if a & ALL_LAYERS else [layer]
        return [work for layer in layers for work in self._counts.pop(layer, [])]

    def _inputs(self, layer: int) -> list[_Work]:
        """Results of the layer before, which are this layer's input on whatever stream a chunk of it begins."""
        if layer != self._layer:
            others = [other for other in self._results if other != layer]
            self._layer, self._input = layer, [result for other in others for result in self._results.pop(other)]
        return self._input

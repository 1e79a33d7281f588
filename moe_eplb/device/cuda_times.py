"""At which times a GPU did each piece of work, told to the event sink once that is known."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from moe_eplb.core.events import EventSink, Kind, NullSink
from moe_eplb.device.cuda_graph import CudaGraph, Piece, external_event
from moe_eplb.device.cuda_stream import CudaStream

__all__ = ["CudaTimes", "timing_event"]

T = TypeVar("T")


class _Timed(NamedTuple):
    """A piece of work whose times are not known yet."""

    token: int
    start: torch.cuda.Event
    end: torch.cuda.Event


class CudaTimes:
    """Puts an event on either side of each piece of work, unless nobody records.

    Args:
        sink: Gets the times when `tell` is called.
    """

    def __init__(self, sink: EventSink) -> None:
        self._sink, self._records = sink, not isinstance(sink, NullSink)
        self._timed: list[_Timed] = []
        self._replays: dict[CudaGraph[Any], int] = {}
        self._set_clock()

    def launch(
        self, fn: Callable[[], T], stream: CudaStream, kind: Kind, layer: int, iteration: int, a: int, b: int
    ) -> T:  # fmt: skip
        """Do `fn`, which enqueues work of that kind on the stream."""
        if not self._records:
            return fn()
        start, end = timing_event(), timing_event()
        token = self._sink.begin(kind, layer, iteration, stream.index, a, b)
        try:
            start.record(stream.queue)
            return fn()
        finally:
            end.record(stream.queue)
            self._sink.end(token)
            self._timed.append(_Timed(token, start, end))

    def capture(
        self, fn: Callable[[], T], stream: CudaStream, kind: Kind, layer: int, graph: CudaGraph[Any], a: int
    ) -> T:  # fmt: skip
        """The same while a graph is captured."""
        if not self._records:
            return fn()
        piece = Piece(kind, layer, stream.index, a, external_event(), external_event())
        graph.pieces.append(piece)
        piece.start.record(stream.queue)
        result = fn()
        piece.end.record(stream.queue)
        return result

    def replayed(self, graph: CudaGraph[Any], iteration: int) -> None:
        """A replay was enqueued; its times are told unless another follows before."""
        if graph.pieces:
            self._replays[graph] = iteration

    def tell(self) -> None:
        """All work is done: tell the times of what was enqueued since the last time."""
        for token, start, end in self._timed:
            self._sink.place(token, self._time_of(start), self._time_of(end))
        self._timed.clear()
        for graph, iteration in self._replays.items():
            for piece in graph.pieces:
                times = self._time_of(piece.start), self._time_of(piece.end)
                self._sink.record(piece.kind, piece.layer, iteration, piece.stream, *times, piece.a, -1)
        self._replays.clear()
        self._set_clock()

    def _set_clock(self) -> None:
        """A point that both clocks know, on an idle device; set anew often, since event times are float32."""
        self._origin = timing_event()
        self._origin.record()
        self._origin.synchronize()
        self._origin_ns = time.perf_counter_ns()

    def _time_of(self, event: torch.cuda.Event) -> int:
        milliseconds: float = self._origin.elapsed_time(event)
        return self._origin_ns + round(milliseconds * 1e6)


def timing_event() -> torch.cuda.Event:
    """An event that tells its time."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event

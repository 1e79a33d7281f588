"""How a layer's balancer used the streams before its work was overlapped: what `LayerStream` is compared with.

After TensorRT-LLM's online EPLB as it was before its overlap on Hopper was improved: a stream for taking a layer over
and handing it back, another for statistics, a new event for each step from one stream to another, and all of it only
while a graph is captured. A forward that is launched piece by piece does the balancer's work where it calls for it.

Two things are as in `LayerStream`, since results must not depend on a choreography: every stream that reads the layer
waits for it, and the hand-over waits for each of them. One pair of streams serves all layers: torch has 32 to give out,
and a graph's edges do not tell one stream from another.
"""

from __future__ import annotations

from collections.abc import Callable

from moe_eplb.core.events import Kind
from moe_eplb.device import AuxStreamType, Device, Event, EventType, Stream

__all__ = ["OlderChoreography"]

_LOCK = (Kind.START_WAIT_GPU_STAGE, Kind.START_SET_CPU_STAGE)


class OlderChoreography:
    """Balancer work of one layer, with the calls of `LayerStream`.

    Args:
        device: Where the work runs. One without graphs overlaps always, so that joins can be tested there.
        layer: Index of the layer, for records.
        aux_stream: The stream on which the layer is taken and handed over; a new one if None.
    """

    def __init__(self, device: Device, layer: int, aux_stream: Stream | None) -> None:
        self._device, self._layer = device, layer
        self._lock = aux_stream or device.stream(AuxStreamType.MoeBalancer)
        self._statistic = device.statistic_stream
        self._overlaps = False
        self._last = self._lock
        self._done = self._taken = Event()
        self._readers: list[Stream] = []

    def submit(self, kind: Kind, work: Callable[[], None]) -> None:
        """Put work on the stream for its kind, after what the current stream and the layer have submitted so far."""
        if kind is Kind.START_WAIT_GPU_STAGE:
            self._overlaps = self._device.capturing or not self._device.has_graphs
        elif kind not in _LOCK:
            self.read()
        stream = self._stream_of(kind)
        self._follow(stream, self._device.current)
        if not self._overlaps and kind is not Kind.START_WAIT_GPU_STAGE:
            self._follow(stream, self._last)  # a chunk on another stream has called for it
        self._submit(stream, kind, work)

    def submit_next(self, kind: Kind, work: Callable[[], None], *, collective: bool = False, a: int = 0) -> None:
        """Put work right behind the latest; `a` is its record's payload."""
        self._submit(self._last, kind, work, collective=collective, a=a)

    def mark(self) -> None:
        """The next `join` waits for all work on the stream of the latest."""
        self._done = self._mark(self._last)

    def join(self) -> None:
        """The current stream waits for the marked work."""
        self._device.wait(self._device.current, self._done)

    def begin_reading(self) -> None:
        """The current stream joins, and is from now on the only one that reads the layer's weights and tables."""
        self.join()
        self._taken = self._done
        self._readers = [self._device.current]

    def read(self) -> None:
        """The current stream reads too; it waits for the layer unless it has."""
        if self._device.current not in self._readers:
            self._device.wait(self._device.current, self._taken)
            self._readers.append(self._device.current)

    def end_reading(self) -> None:
        """The hand-over runs after everything that readers and statistics have submitted so far."""
        hand_over = self._stream_of(Kind.START_SET_CPU_STAGE)
        for stream in self._readers:
            self._follow(hand_over, stream)
        self._join_statistics(hand_over)

    def _join_statistics(self, hand_over: Stream) -> None:
        self._follow(hand_over, self._last)

    def _stream_of(self, kind: Kind) -> Stream:
        if not self._overlaps:
            return self._device.current
        return self._lock if kind in _LOCK else self._statistic

    def _submit(
        self, stream: Stream, kind: Kind, work: Callable[[], None], *, collective: bool = False, a: int = 0
    ) -> None:
        self._last = stream
        self._device.submit(stream, kind, self._layer, work, collective=collective, a=a)

    def _follow(self, stream: Stream, other: Stream) -> None:
        if stream is not other:
            self._device.wait(stream, self._mark(other))

    def _mark(self, stream: Stream) -> Event:
        event = self._device.new_event(EventType.MoeBalancer.name)
        self._device.record(event, stream)
        return event

"""One layer's use of the balancer stream and of the recorder: three reusable events and one reusable range."""

from __future__ import annotations

from collections.abc import Callable

from moe_eplb.core.events import EventSink, Kind
from moe_eplb.device import AuxStreamType, Device, EventType, Stream

__all__ = ["CallRange", "LayerStream"]


class CallRange:
    """The open record of a layer's call; one object for all of them, since they never nest."""

    __slots__ = ("_end", "token")

    def __init__(self, sink: EventSink) -> None:
        self._end, self.token = sink.end, -1

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._end(self.token)


class LayerStream:
    """Balancer work of one layer.

    Args:
        device: Where the work runs.
        layer: Index of the layer, for records.
        aux_stream: The balancer stream; a new one if None.

    Attributes:
        joined_by: The last stream that has joined since the last mark, None for none and where other layers' work that
            must be joined was put behind it.
    """

    joined_by: Stream | None = None

    def __init__(self, device: Device, layer: int, aux_stream: Stream | None) -> None:
        self._device, self._layer = device, layer
        self._aux = aux_stream or device.stream(AuxStreamType.MoeBalancer)
        self._main = device.new_event(EventType.Main.name)
        self._done = device.new_event(EventType.MoeBalancer.name)
        self._begin = device.new_event(EventType.Main.name)
        self._marked = False
        self._readers: list[Stream] = []

    def shares(self, other: LayerStream) -> bool:
        """Whether both layers' balancer work is in one queue."""
        return self._aux is other._aux

    def submit(self, kind: Kind, work: Callable[[], None]) -> None:
        """Put work on the balancer stream, after what the current stream has submitted so far."""
        self._follow(self._device.current)
        self._device.submit(self._aux, kind, self._layer, work)

    def follow(self) -> None:
        """Later work on the balancer stream comes after what the current stream has submitted so far."""
        self._follow(self._device.current)

    def mark_within(self) -> None:
        """`follow_mark` follows the current stream up to here, which is in the middle of a piece of its work."""
        self._device.record(self._begin, self._device.current, within=True)
        self._marked = True

    def follow_mark(self) -> None:
        """Later work on the balancer stream comes after what was marked; where nothing was, see `follow`."""
        if self._marked:
            self._device.wait(self._aux, self._begin)
        else:
            self.follow()
        self._marked = False

    def forget_mark(self) -> None:
        """Nothing is marked any more."""
        self._marked = False

    def submit_next(self, kind: Kind, work: Callable[[], None], *, collective: bool = False, a: int = 0) -> None:
        """Put work right behind the latest on the balancer stream; `a` is its record's payload."""
        self._device.submit(self._aux, kind, self._layer, work, collective=collective, a=a)

    def mark(self) -> None:
        """The next `join` waits for all work submitted so far."""
        self._device.record(self._done, self._aux)
        self.joined_by = None

    def join(self) -> None:
        """The current stream waits for the marked work."""
        self._device.wait(self._device.current, self._done)
        self.joined_by = self._device.current

    def begin_reading(self, *, joined: bool = False) -> None:
        """The current stream joins, unless it has, and is from now on the only one that reads the layer's weights and
        tables."""
        if not joined:
            self.join()
        self._readers = [self._device.current]

    def read(self) -> None:
        """The current stream reads too; it joins unless it has."""
        if self._device.current not in self._readers:
            self.join()
            self._readers.append(self._device.current)

    def end_reading(self) -> None:
        """Later balancer work runs after everything that the reading streams have submitted so far."""
        for stream in self._readers:
            self._follow(stream)

    def _follow(self, stream: Stream) -> None:
        self._device.record(self._main, stream)
        self._device.wait(self._aux, self._main)

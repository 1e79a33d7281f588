"""The small interface between the balancer and a device. Nothing outside this package knows what runs behind it."""

from __future__ import annotations

import abc
import contextlib
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import STREAMS, EventSink, Kind
from moe_eplb.device.bell import Bell, CpuBell
from moe_eplb.device.captured import Captured
from moe_eplb.device.copier import Copier, CopierAtOnce
from moe_eplb.device.sharing import Sharing
from moe_eplb.device.streams import AuxStreamType
from moe_eplb.device.symmetric import Symmetric

__all__ = ["Device", "Event", "Stream"]

T = TypeVar("T")


class Stream:
    """A queue of work in order. `index` is its number in `moe_eplb.core.events.STREAMS`."""

    def __init__(self, name: str, index: int) -> None:
        self.name = name
        self.index = index

    def __repr__(self) -> str:
        return f"Stream({self.name})"


class Event:
    """A reusable mark in a stream. Waiting uses the mark of the latest `Device.record`."""

    def __init__(self, name: str = "") -> None:
        self.name = name


class Device(abc.ABC):
    """Streams, events and recorded work of one rank.

    Args:
        sink: Receives one device record for each piece of work, at the time at which it really runs.
    """

    kind: str
    torch_device: torch.device
    """Where tensors of the model live."""
    immediate = True
    """Whether work has run by the time it is joined, so that the host may look at its results at once."""

    has_graphs = False
    """Whether work can be captured."""

    def __init__(self, sink: EventSink) -> None:
        self.sink = sink
        self.iteration = -1
        self.main = self._make_stream("Main", 0)
        self.current = self.main

    @property
    def capturing(self) -> bool:
        """Whether work is being captured into a graph and does not run."""
        return False

    def stream(self, kind: AuxStreamType) -> Stream:
        """A new auxiliary stream of that kind."""
        return self._make_stream(kind.name, list(AuxStreamType).index(kind) + 1)

    @cached_property
    def statistic_stream(self) -> Stream:
        """A second stream of the balancer, for `overlap: before`; made at first use, the same for all layers."""
        return self._make_stream(STREAMS[-1], len(STREAMS) - 1)

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        """Make `stream` current inside the block."""
        previous, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = previous

    @abc.abstractmethod
    def _make_stream(self, name: str, index: int) -> Stream: ...

    @abc.abstractmethod
    def new_event(self, name: str = "") -> Event:
        """A reusable event."""

    @abc.abstractmethod
    def record(self, event: Event, stream: Stream, *, within: bool = False) -> None:
        """Mark the work submitted to `stream` so far. `within`: the latest is not done by then."""

    @abc.abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """Later work on `stream` runs after the marked work. The host does not wait."""

    @abc.abstractmethod
    def run(self, kind: Kind, layer: int, fn: Callable[[], T], *, a: int = 0, b: int = 0) -> T:
        """Do `fn` on the current stream as one recorded piece of work and return what it returns."""

    @abc.abstractmethod
    def submit(
        self,
        stream: Stream,
        kind: Kind,
        layer: int,
        fn: Callable[[], None],
        *,
        collective: bool = False,
        a: int = 0,
        b: int = 0,
    ) -> None:
        """Put `fn` on `stream`. `collective` says that it talks to other ranks, so all must do it at a like point."""

    @abc.abstractmethod
    def synchronize(self) -> None:
        """Return when all submitted work has run."""

    def settle(self) -> None:
        """An iteration is over: record the times of what the device did later than it was told to, and look at it."""
        return None

    def capture(self, work: Callable[[], T]) -> Captured[T]:
        """A graph of what `work` enqueues on all streams; nothing of it runs before a replay.

        Raises:
            BalancerError: E179 where there are no graphs.
        """
        raise BalancerError("E179", f"device {self.kind!r} has no graphs", hint="use execution: eager, or device: cuda")

    def time_mark(self) -> object:
        """A moment in the current stream's work."""
        return time.perf_counter_ns()

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks, once the device has passed them."""
        milliseconds: float = (end - begin) / 1e6
        return milliseconds

    def observe(self, look: Callable[[], None]) -> None:
        """Call `look`, which reads results on the host, once they are there: at once, or when the iteration settles."""
        look()

    def host_visible(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros that host and device both read and write while the other works."""
        return torch.zeros(shape, dtype=dtype)

    def new_bell(self, word: Tensor, *, awake: bool = False) -> Bell:
        """A bell over a host-visible word. `awake`: who waits may use a core, to hear it sooner."""
        return CpuBell(word)

    def submitted(self) -> Callable[[], bool]:
        """A function that returns when what the current stream has been given so far is done; whether it waited."""
        return lambda: False

    def enter_thread(self) -> None:
        """A thread calls this once before it enqueues copies or waits for a bell."""
        return None

    def new_copier(self) -> Copier:
        """What another thread copies with, beside the model's streams."""
        return CopierAtOnce()

    def pin(self, memory: Tensor) -> Callable[[], None]:
        """Let copies from host memory run at full speed; returns what undoes it."""
        return lambda: None

    @abc.abstractmethod
    def new_sharing(self) -> Sharing:
        """How other processes of this node read memory of this device."""

    @abc.abstractmethod
    def symmetric(self, group: dist.ProcessGroup) -> Symmetric:
        """Buffers that the ranks of the group reach into, the same for all layers.

        Raises:
            BalancerError: E211 where they cannot be had.
        """

    @abc.abstractmethod
    def discard(self) -> int:
        """Forget work that has not run yet (after an exception) and return how much it was."""

    @abc.abstractmethod
    def pending(self) -> int:
        """How many pieces of work have not run yet."""

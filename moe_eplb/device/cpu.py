"""The CPU reference backend: auxiliary streams whose work runs late, at seeded legal points.

The main stream runs at once. Work on another stream waits in a queue and runs somewhere between its submission and the
join that needs it. A missing join therefore reads stale data here, without a GPU.

Work that holds a collective may only move at points which every rank passes equally often (the main stream's own
collectives), and its seed is common to all ranks; else two ranks would wait for each other in different collectives.
Purely local work moves at every point, with a seed of the rank's own.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist

from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import KINDS, EventSink, Kind, Role
from moe_eplb.device.base import Device, Event, Stream
from moe_eplb.device.order import Clock, StreamOrder
from moe_eplb.device.sharing import SharedHostMemory, Sharing
from moe_eplb.device.symmetric import HostSymmetric, Symmetric, shared_by_layers

__all__ = ["CpuDevice"]

T = TypeVar("T")


_Work = tuple[Callable[[], None], bool]
"""What to do, and whether it is a collective. A plain tuple and a partial are the cheapest to make, once a call."""


class _CpuStream(Stream):
    def __init__(self, name: str, index: int) -> None:
        super().__init__(name, index)
        self.queue: deque[_Work] = deque()
        self.submitted = 0
        self.done = 0


class _CpuEvent(Event):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.stream: _CpuStream | None = None
        self.position = 0
        self.mark: Clock = {}


class CpuDevice(Device):
    """Reference device.

    Args:
        sink: See `Device`.
        seed: Seed of the reordering, common to all ranks; None runs all work at once, in the order of submission.
        rank: Makes the seed of local work the rank's own.
        check_order: Record work that did not wait for what it must come after, as `Kind.UNORDERED`.
    """

    kind = "cpu"
    torch_device = torch.device("cpu")

    def __init__(self, sink: EventSink, *, seed: int | None = None, rank: int = 0, check_order: bool = False) -> None:
        self._order = StreamOrder() if check_order else None
        self._streams: list[_CpuStream] = []
        self._waiting = 0
        self._eager = seed is None
        self._common = random.Random(f"common {seed}")
        self._local = random.Random(f"rank {rank} {seed}")
        super().__init__(sink)

    def _make_stream(self, name: str, index: int) -> Stream:
        stream = _CpuStream(name, index)
        self._streams.append(stream)
        return stream

    def new_event(self, name: str = "") -> Event:
        return _CpuEvent(name)

    def record(self, event: Event, stream: Stream, *, within: bool = False) -> None:
        assert isinstance(event, _CpuEvent)
        assert isinstance(stream, _CpuStream)
        event.stream, event.position = stream, stream.submitted
        if self._order is not None:
            event.mark = self._order.mark(stream, within=within)

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, _CpuEvent)
        assert isinstance(stream, _CpuStream)
        source, position = event.stream, event.position
        if source is None:
            raise BalancerError(
                "E133", f"stream {stream.name} waits for event {event.name!r}, which was never recorded",
                hint="record the event on the stream whose work is needed, then wait",
            )  # fmt: skip
        if self._order is not None:
            self._order.wait(stream, event.mark)
        if source is stream or source.done >= position:
            return
        if stream is self.main or stream is self.current:  # whose work runs at once
            self._drain(source, position)
        else:
            self._enqueue(stream, partial(self._drain, source, position), collective=False)

    def run(self, kind: Kind, layer: int, fn: Callable[[], T], *, a: int = 0, b: int = 0) -> T:
        if self._waiting:
            self._advance(collectives=KINDS[kind].role is Role.COMM)
            self._catch_up(self.current)
        self._check(self.current, kind, layer, a)
        token = self.sink.begin(kind, layer, self.iteration, self.current.index, a, b)
        try:
            return fn()
        finally:
            self.sink.end(token)

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
        assert isinstance(stream, _CpuStream)
        self._check(stream, kind, layer, a)
        work = partial(self._do, stream, kind, layer, self.iteration, fn, a, b)
        if stream is self.main or self._eager:
            work()
        else:
            self._enqueue(stream, work, collective=collective)

    def synchronize(self) -> None:
        for stream in self._streams:
            self._drain(stream, stream.submitted)

    def new_sharing(self) -> Sharing:
        return SharedHostMemory()

    def symmetric(self, group: dist.ProcessGroup) -> Symmetric:
        return shared_by_layers(HostSymmetric, group, self.torch_device)

    def discard(self) -> int:
        left = self._waiting
        for stream in self._streams:
            stream.queue.clear()
            stream.done = stream.submitted
        self._waiting = 0
        if self._order is not None:
            self._order.forget()
        return left

    def pending(self) -> int:
        return self._waiting

    def _check(self, stream: Stream, kind: Kind, layer: int, a: int) -> None:
        found = None if self._order is None else self._order.work(stream, kind, layer, a)
        if found is not None:
            self.sink.mark(
                Kind.UNORDERED, layer, self.iteration, stream.index, a=kind, b=found.earlier << 8 | found.stream.index
            )

    def _do(
        self, stream: _CpuStream, kind: Kind, layer: int, iteration: int, fn: Callable[[], None], a: int, b: int
    ) -> None:
        token = self.sink.begin(kind, layer, iteration, stream.index, a, b)
        previous, self.current = self.current, stream
        try:
            fn()
        finally:
            self.current = previous
            self.sink.end(token)

    def _catch_up(self, stream: Stream) -> None:
        """Work that runs at once comes after what its own stream still holds."""
        assert isinstance(stream, _CpuStream)
        self._drain(stream, stream.submitted)

    def _enqueue(self, stream: _CpuStream, run: Callable[[], None], *, collective: bool) -> None:
        stream.queue.append((run, collective))
        stream.submitted += 1
        self._waiting += 1

    def _drain(self, stream: _CpuStream, position: int) -> None:
        while stream.done < position:
            self._run_next(stream)

    def _run_next(self, stream: _CpuStream) -> None:
        run, _ = stream.queue.popleft()
        stream.done += 1
        self._waiting -= 1
        run()

    def _advance(self, *, collectives: bool) -> None:
        """Let some of the waiting work run now; which, only the seeds know."""
        for stream in self._streams:
            if collectives:
                self._pass_collectives(stream)
            while stream.queue and not stream.queue[0][1] and self._local.random() < 0.5:
                self._run_next(stream)

    def _pass_collectives(self, stream: _CpuStream) -> None:
        # One draw for each waiting collective: their number is the same on all ranks, that of local work is not.
        ahead = sum(1 for _, collective in stream.queue if collective)
        passing = 0
        while passing < ahead and self._common.random() < 0.5:
            passing += 1
        while passing:
            passing -= stream.queue[0][1]
            self._run_next(stream)

"""CUDA streams and events, in eager mode and captured into graphs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from moe_eplb.core.errors import BalancerError, HostMemoryError
from moe_eplb.core.events import CAPTURED, HOST, STREAMS, EventSink, Kind
from moe_eplb.device.base import Device, Event, Stream
from moe_eplb.device.bell import Bell
from moe_eplb.device.copier import Copier
from moe_eplb.device.cuda_copier import CudaCopier
from moe_eplb.device.cuda_graph import CudaGraph
from moe_eplb.device.cuda_sharing import SharedDeviceMemory
from moe_eplb.device.cuda_stream import CudaEvent, CudaStream
from moe_eplb.device.cuda_times import CudaTimes, timing_event
from moe_eplb.device.environment import CONNECTIONS, GRAPH_MIXING
from moe_eplb.device.nvshmem import NvshmemSymmetric
from moe_eplb.device.order import StreamOrder
from moe_eplb.device.sanitizer import attach
from moe_eplb.device.sharing import Sharing
from moe_eplb.device.streams import AuxStreamType
from moe_eplb.device.symmetric import Symmetric, shared_by_layers
from moe_eplb.device.watching_bell import REST_US, WatchingBell

__all__ = ["CudaDevice"]

T = TypeVar("T")

_COPIES = -3
"""Priority of the stream of copies, which no other stream here has."""
_PRIORITIES = dict.fromkeys((AuxStreamType.MoeBalancer.name, STREAMS[-1]), -1)
"""The balancer's few blocks go before those of a model's kernel that are not yet on a processor."""


class CudaDevice(Device):
    """One GPU; work is enqueued and runs later, streams beside each other.

    Args:
        sink: Gets each piece of work with the times at which the device did it, once `synchronize` has been called.
        index: Number of the GPU.
        check_order: Record work that did not wait for what it must come after, as `Kind.UNORDERED`.
        serial: All streams are one, so that nothing overlaps.

    Attributes:
        graph_pool: A pool, see `torch.cuda.graph_pool_handle`, in which the graphs of later captures share what they
            need while they run; the caller never replays one before the results of the last are read. None for memory
            of each graph's own.
    """

    kind = "cuda"
    immediate = False
    has_graphs = True

    def __init__(self, sink: EventSink, *, index: int = 0, check_order: bool = False, serial: bool = False) -> None:
        self.torch_device = torch.device("cuda", index)
        _take(self.torch_device)
        attach()
        self._order = StreamOrder() if check_order else None
        self._streams: list[CudaStream] = []
        self._serial = serial
        self._looks: list[Callable[[], None]] = []
        self._capture: CudaGraph[Any] | None = None
        self._graphs = 0
        self._replays_end_first, self._replaying = os.environ.get(GRAPH_MIXING) == "0", False
        self.graph_pool: Any = None
        # Else it may have its channel in common with a stream whose kernel waits for the copies.
        self._copies = _new_stream(self.torch_device, _COPIES)
        super().__init__(sink)
        self._times = CudaTimes(sink)

    def _make_stream(self, name: str, index: int) -> Stream:
        shared = index == 0 or self._serial
        queue = torch.cuda.current_stream() if shared else _new_stream(self.torch_device, _PRIORITIES.get(name, 0))
        stream = CudaStream(name, index, queue)
        self._streams.append(stream)
        return stream

    def new_event(self, name: str = "") -> Event:
        return CudaEvent(name)

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        assert isinstance(stream, CudaStream)
        with super().use(stream), torch.cuda.stream(stream.queue):
            yield

    def record(self, event: Event, stream: Stream, *, within: bool = False) -> None:
        assert isinstance(event, CudaEvent)
        assert isinstance(stream, CudaStream)
        event.cuda.record(stream.queue)
        event.stream, event.position = stream, stream.submitted - within
        if self._order is not None:
            event.mark = self._order.mark(stream, within=within)

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        assert isinstance(stream, CudaStream)
        if event.stream is None:
            raise BalancerError(
                "E133", f"stream {stream.name} waits for event {event.name!r}, which was never recorded",
                hint="record the event on the stream whose work is needed, then wait",
            )  # fmt: skip
        stream.queue.wait_event(event.cuda)
        if self._order is not None:
            self._order.wait(stream, event.mark)
        if stream is self.main:  # whose allocations come after the wait from here on
            event.stream.release(event.position)

    def run(self, kind: Kind, layer: int, fn: Callable[[], T], *, a: int = 0, b: int = 0) -> T:
        assert isinstance(self.current, CudaStream)
        return self._do(self.current, kind, layer, fn, a, b)

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
        assert isinstance(stream, CudaStream)
        elsewhere = stream is not self.current
        with self.use(stream):
            self._do(stream, kind, layer, fn, a, b)
        if elsewhere:  # the current stream's own memory is reused in its order
            stream.held.append((stream.submitted, fn))

    def synchronize(self) -> None:
        """Return when all work is done; its times are recorded now."""
        for stream in self._streams:  # not the whole device: other threads may have streams that wait for them
            stream.queue.synchronize()
            stream.release(stream.submitted)
        self._replaying = False
        self._times.tell()

    def settle(self) -> None:
        self.synchronize()
        while self._looks:
            self._looks.pop(0)()

    def capture(self, work: Callable[[], T]) -> CudaGraph[T]:
        """See the base class. Each piece's times are those of the last replay before a synchronisation."""
        self.synchronize()
        graph: CudaGraph[T] = CudaGraph(self, self._graphs)
        self._graphs += 1
        before, self._capture, self.iteration = self.iteration, graph, CAPTURED
        token = self.sink.begin(Kind.CAPTURE, -1, CAPTURED, HOST, graph.number)
        try:
            graph.capture(partial(self._captured, work))
        except BaseException:
            if self._order is not None:
                self._order.forget()
            raise
        finally:
            self.sink.end(token)
            self._capture, self.iteration = None, before
        return graph

    def _captured(self, work: Callable[[], T]) -> T:
        """Do the work with the stream that is captured as the main one."""
        main = self._streams[0].queue
        shared = [stream for stream in self._streams if stream.queue == main]  # all of them, where nothing overlaps
        captured = torch.cuda.current_stream()
        try:
            for stream in shared:
                stream.queue = captured
            return work()
        finally:
            for stream in shared:
                stream.queue = main

    @property
    def capturing(self) -> bool:
        """See the base class."""
        return self._capture is not None

    def replayed(self, graph: CudaGraph[Any]) -> None:
        """A replay was enqueued in this iteration."""
        self._replaying = self._replays_end_first
        self._looks += graph.looks
        self._times.replayed(graph, self.iteration)

    def time_mark(self) -> torch.cuda.Event:
        event = timing_event()
        event.record()
        return event

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        milliseconds: float = begin.elapsed_time(end)
        return milliseconds

    def observe(self, look: Callable[[], None]) -> None:
        (self._looks if self._capture is None else self._capture.looks).append(look)

    def discard(self) -> int:
        """Enqueued work cannot be taken back; it is waited for, so that it is done alike on every rank."""
        self.synchronize()
        self._looks.clear()
        if self._order is not None:
            self._order.forget()
        return 0

    def pending(self) -> int:
        return 0

    # -- memory and threads that the host shares with the device ---------------------------------------------------

    def host_visible(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False):  # the updater's thread writes to it in another mode
            return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def new_bell(self, word: Tensor, *, awake: bool = False) -> Bell:
        return WatchingBell(word, rest_us=0 if awake else REST_US)

    def enter_thread(self) -> None:
        torch.cuda.set_device(self.torch_device)

    def new_copier(self) -> Copier:
        return CudaCopier(self._copies)

    def submitted(self) -> Callable[[], bool]:
        done: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream())
        return partial(_waits_for, done)

    def pin(self, memory: Tensor) -> Callable[[], None]:
        runtime, address, size = torch.cuda.cudart(), memory.data_ptr(), memory.numel()  # type: ignore[no-untyped-call]
        code = int(runtime.cudaHostRegister(address, size, 0))
        if code:
            raise HostMemoryError(
                "E174", f"{size} bytes of host memory could not be pinned", why=f"cudaHostRegister gave {code}",
                hint="raise the limit of locked memory (ulimit -l); `eplbctl doctor` shows it",
            )  # fmt: skip

        def unpin() -> None:
            self._copies.synchronize()
            runtime.cudaHostUnregister(address)

        return unpin

    def new_sharing(self) -> Sharing:
        return SharedDeviceMemory(self.torch_device)

    def symmetric(self, group: dist.ProcessGroup) -> Symmetric:
        return shared_by_layers(NvshmemSymmetric, group, self.torch_device)

    def _do(self, stream: CudaStream, kind: Kind, layer: int, fn: Callable[[], T], a: int, b: int) -> T:
        self._check(stream, kind, layer, a)
        stream.submitted += 1
        if self._capture is not None:
            return self._times.capture(fn, stream, kind, layer, self._capture, a)
        if self._replaying:  # NCCL may hang where a graph is under way, see `GRAPH_MIXING`, whatever streams wait for
            self._streams[0].queue.synchronize()
            self._replaying = False
        return self._times.launch(fn, stream, kind, layer, self.iteration, a, b)

    def _check(self, stream: Stream, kind: Kind, layer: int, a: int) -> None:
        found = None if self._order is None else self._order.work(stream, kind, layer, a)
        if found is not None:
            self.sink.mark(
                Kind.UNORDERED, layer, self.iteration, stream.index, a=kind, b=found.earlier << 8 | found.stream.index
            )


def _take(device: torch.device) -> None:
    """Begin to use a GPU, which is where it may turn out to be full."""
    try:
        torch.cuda.set_device(device)
    except RuntimeError as error:
        raise BalancerError(
            "E216", f"GPU {device.index} takes no further process", why=str(error).partition("\n")[0],
            hint="`nvidia-smi` shows who uses it; where many processes share it and memory is left, give each fewer of "
            f"its channels: {CONNECTIONS}=8 (now {os.environ.get(CONNECTIONS, 'not set')})",
        ) from error  # fmt: skip


def _waits_for(done: torch.cuda.Event) -> bool:
    """Return when the event has happened; whether that took a wait."""
    if done.query():  # type: ignore[no-untyped-call]
        return False
    done.synchronize()
    return True


def _new_stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    stream: torch.cuda.Stream = torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]
    return stream

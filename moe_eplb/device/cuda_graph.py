"""CUDA graphs of an iteration, with the times at which each piece of a replay ran."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from moe_eplb.core.events import HOST, Kind
from moe_eplb.device.captured import Captured
from moe_eplb.device.driver_calls import driver, require_success

if TYPE_CHECKING:
    from moe_eplb.device.cuda import CudaDevice

__all__ = ["CudaGraph", "Piece", "external_event"]

T = TypeVar("T")


class Piece(NamedTuple):
    """A piece of captured work; each replay records its two events anew."""

    kind: Kind
    layer: int
    stream: int
    a: int
    start: torch.cuda.Event
    end: torch.cuda.Event


class CudaGraph(Captured[T]):
    """Made by `CudaDevice.capture`.

    Attributes:
        number: Of the device's graphs, from 0.
        pieces: The work in order of capture; empty where nobody records.
        looks: What reads the results of a replay, see `Device.observe`.
    """

    def __init__(self, device: CudaDevice, number: int) -> None:
        self.number = number
        self.pieces: list[Piece] = []
        self.looks: list[Callable[[], None]] = []
        self._device = device
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], T]) -> None:
        """Capture `work`. Other threads go on meanwhile, so that their calls must not count as part of it."""
        with torch.cuda.graph(self._graph, pool=self._device.graph_pool, capture_error_mode="thread_local"):
            self.result = work()
        self._upload(torch.cuda.current_stream(self._device.torch_device))

    def _upload(self, stream: torch.cuda.Stream) -> None:
        """Give the device its copy of the graph, so that the first replay is like the others.

        A launch that does it itself can hold up the copies of a plan that its kernels wait for.
        """
        executable = ctypes.c_void_p(self._graph.raw_cuda_graph_exec())
        require_success("cuGraphUpload", driver().cuGraphUpload(executable, ctypes.c_void_p(stream.cuda_stream)))
        stream.synchronize()

    def replay(self) -> T:
        """See `Captured`."""
        self._device.sink.mark(Kind.REPLAY, -1, self._device.iteration, HOST, a=self.number)
        self._graph.replay()
        self._device.replayed(self)
        return self.result


def external_event() -> torch.cuda.Event:
    """An event whose record inside a graph is a node of it, so that each replay tells its time."""
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]
    return event

"""Streams and events of a GPU, with what their work still uses and where they were recorded."""

from __future__ import annotations

from collections import deque

import torch

from moe_eplb.device.base import Event, Stream
from moe_eplb.device.order import Clock

__all__ = ["CudaEvent", "CudaStream"]


class CudaStream(Stream):
    """`queue` is CUDA's stream. `held`: what its work still uses, with the work's position in the stream."""

    def __init__(self, name: str, index: int, queue: torch.cuda.Stream) -> None:
        super().__init__(name, index)
        self.queue = queue
        self.submitted = 0
        self.held: deque[tuple[int, object]] = deque()

    def release(self, position: int) -> None:
        """Let go of what work up to `position` uses: nobody can reuse that memory before the work is done."""
        while self.held and self.held[0][0] <= position:
            self.held.popleft()


class CudaEvent(Event):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.cuda: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.stream: CudaStream | None = None
        self.position = 0
        self.mark: Clock = {}

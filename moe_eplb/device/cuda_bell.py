"""The updater's thread sleeps in the driver until the GPU has rung."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_eplb.device.bell import Bell
from moe_eplb.device.driver_calls import driver_calls, require_success

__all__ = ["CudaBell"]


class CudaBell(Bell):
    """A stream of its own waits for the word, an event behind that wait wakes the thread.

    The thread waits in the driver and does not hold the interpreter. The timeout is the device's: what it waits for are
    kernels that have been enqueued, each of which ends by itself. For one thread at a time.

    Args:
        word: See the base class.
        device: The GPU.
    """

    def __init__(self, word: Tensor, device: torch.device) -> None:
        super().__init__(word)
        self._rung, self._calls = word.numpy(), driver_calls()
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._done: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._done.record(self._stream)  # the driver's event exists from here on

    def wait(self, count: int, timeout_s: float) -> bool:
        stream: int = self._stream.cuda_stream
        code = self._calls.wait(stream, self.word.data_ptr(), count, self._done.cuda_event)
        require_success("cuStreamWaitValue32", code)
        return int(self._rung[0]) >= count

    def tell(self) -> None:
        return None

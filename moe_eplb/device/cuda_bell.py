"""The updater's thread blocks in the driver until the GPU has rung."""

from __future__ import annotations

import torch
from cuda.bindings import driver
from torch import Tensor

from moe_eplb.core.errors import BalancerError
from moe_eplb.device.bell import Bell

__all__ = ["CudaBell"]


class CudaBell(Bell):
    """A stream of its own waits for the word, an event behind that wait wakes the thread.

    The thread waits in the driver and does not hold the interpreter. The timeout is the device's: what it waits for are
    kernels that have been enqueued, each of which ends by itself.

    Args:
        word: See the base class.
        device: The GPU.
        sleeps: Wait without using a core, which takes the operating system longer to wake from.
    """

    def __init__(self, word: Tensor, device: torch.device, *, sleeps: bool = True) -> None:
        super().__init__(word)
        self._device, self._sleeps = device, sleeps
        self._stream: torch.cuda.Stream | None = None

    def wait(self, count: int, timeout_s: float) -> bool:
        torch.cuda.set_device(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        done = torch.cuda.Event(blocking=self._sleeps)  # type: ignore[no-untyped-call]
        (error,) = driver.cuStreamWaitValue32(
            driver.CUstream(self._stream.cuda_stream), driver.CUdeviceptr(self.word.data_ptr()), count,
            driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ,
        )  # fmt: skip
        if error != driver.CUresult.CUDA_SUCCESS:
            raise BalancerError(
                "E171", "the driver cannot wait for the GPU's signal", why=f"cuStreamWaitValue32: {error.name}",
                hint="`eplbctl doctor` shows what this GPU and driver can do",
            )  # fmt: skip
        done.record(self._stream)
        done.synchronize()
        return int(self.word) >= count

    def tell(self) -> None:
        return None

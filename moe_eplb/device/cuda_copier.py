"""Copies by the driver, several in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_eplb.device.copier import Copier
from moe_eplb.device.driver_calls import NOT_READY, addresses, driver_calls, require_success

__all__ = ["CudaCopier"]


class CudaCopier(Copier):
    """For one thread, which gives the interpreter's lock away once for all copies of a plan and never to ask for their
    end.

    Words are written by the stream itself: beside kernels, copies of a few bytes were seen to begin milliseconds behind
    the larger ones before them.

    Args:
        stream: Where the copies go.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream, self._calls = stream, driver_calls()  # compiled before there is a plan that would wait for it
        self._done: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._done.record(stream)  # the driver's event exists from here on

    def enqueue(self, copies: Sequence[tuple[Tensor, Tensor]], words: Sequence[tuple[Tensor, int]] = ()) -> None:
        at = np.array([word.data_ptr() for word, _ in words], np.uint64)
        self._copy(*addresses(copies), at, np.array([value for _, value in words], np.int64).view(np.uint64))

    def wait(self) -> bool:
        code = self._calls.happened(self._done.cuda_event)
        if code == NOT_READY:
            self._done.synchronize()
            return True
        require_success("cuEventQuery", code)
        return False

    def _copy(self, *columns: NDArray[np.uint64]) -> None:
        stream: int = self._stream.cuda_stream
        code = self._calls.copy(stream, *columns, self._done.cuda_event)
        require_success("cuMemcpyAsync, cuStreamWriteValue64 or cuEventRecord", code)

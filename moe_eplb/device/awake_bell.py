"""The updater's thread looks at the word without a rest until the device has rung, and holds up nobody meanwhile."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from moe_eplb.device.bell import Bell

__all__ = ["AwakeBell"]

_MONOTONIC = 1
"""CLOCK_MONOTONIC."""
_LONGEST_S = 600.0
"""What is waited for are kernels that have been enqueued, behind whatever else the device has to do."""


class AwakeBell(Bell):
    """Takes a core while it waits, but neither the interpreter's lock nor the driver's. For any number of threads.

    The timeout is the device's, as for one that sleeps in the driver, within a bound for a device that hangs.

    Args:
        word: See the base class.
        longest_s: That bound, in s.
    """

    def __init__(self, word: Tensor, *, longest_s: float = _LONGEST_S) -> None:
        super().__init__(word)
        self._longest_ns = round(longest_s * 1e9)
        self._rung, self._look = word.numpy(), _compiled()

    def wait(self, count: int, timeout_s: float) -> bool:
        return self._look(self._rung, count, self._longest_ns)

    def tell(self) -> None:
        return None


@cache
def _compiled() -> Callable[[Any, int, int], bool]:
    """(word, count, ns): whether an int32 [1] becomes that large within the time."""
    from numba import njit, types

    clock: Any = ctypes.CDLL(None).clock_gettime
    clock.argtypes, clock.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_int

    @njit(types.int64(types.int64[::1]))
    def now(into):  # type: ignore[no-untyped-def]
        clock(_MONOTONIC, into.ctypes)
        return into[0] * 1_000_000_000 + into[1]

    @njit(types.boolean(types.int32[::1], types.int64, types.int64), nogil=True)
    def look(word, count, timeout_ns):  # type: ignore[no-untyped-def]
        into = np.zeros(2, np.int64)
        end = now(into) + timeout_ns
        # The clock is a function that the compiler knows nothing of, so that the word is read anew after each call.
        while word[0] < count:
            if now(into) >= end:
                return word[0] >= count
        return True

    found: Callable[[Any, int, int], bool] = look
    return found

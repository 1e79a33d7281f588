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


class AwakeBell(Bell):
    """Takes a core while it waits, but neither the interpreter's lock nor the driver's. For any number of threads."""

    def __init__(self, word: Tensor) -> None:
        super().__init__(word)
        self._rung, self._look = word.numpy(), _compiled()

    def wait(self, count: int, timeout_s: float) -> bool:
        return self._look(self._rung, count, round(timeout_s * 1e9))

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

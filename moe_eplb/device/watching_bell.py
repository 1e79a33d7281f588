"""The updater's thread looks at the word in compiled code until the device has rung, and holds up nobody meanwhile.

It does not wait in the driver, by an operation of a stream: rings for which it began to wait so while a graph ran were
heard only when the graph had ended.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from moe_eplb.device.bell import Bell

__all__ = ["REST_US", "SHORT_REST_US", "WatchingBell", "compiled_looks"]

REST_US = 50
"""Between two looks of a thread that shall not take a core; the operating system adds what it takes to wake it."""
SHORT_REST_US = 20
"""The longest rest at first: what is waited for is enqueued, and mostly comes within a few iterations."""
_AT_FIRST_NS = 20_000_000

_MONOTONIC = 1
"""CLOCK_MONOTONIC."""
_SET_TIMERSLACK, _GET_TIMERSLACK = 29, 30
"""PR_SET_TIMERSLACK and PR_GET_TIMERSLACK, of the calling thread, in ns."""
_LONGEST_S = 600.0
"""What is waited for are kernels that have been enqueued, behind whatever else the device has to do."""


class WatchingBell(Bell):
    """Takes neither the interpreter's lock nor the driver's while it waits. For any number of threads.

    While a thread rests here its timers have the least slack, and afterwards what they had: Linux by default lets them
    come 50 us late. The timeout is the device's, whose work ends by itself, within a bound for a device that hangs.

    Args:
        word: See the base class.
        rest_us: How long the thread sleeps between two looks; with 0 it stays awake, and takes a core. For the first
            20 ms of a wait no longer than `SHORT_REST_US`.
        longest_s: That bound, in s.
    """

    def __init__(self, word: Tensor, *, rest_us: int = REST_US, longest_s: float = _LONGEST_S) -> None:
        super().__init__(word)
        self._rest_us, self._longest_ns = rest_us, round(longest_s * 1e9)
        self._rung, self._look = word.numpy(), _of_this_machine()

    def wait(self, count: int, timeout_s: float) -> bool:
        return self._look(self._rung, count, self._rest_us, self._longest_ns)

    def tell(self) -> None:
        return None


@cache
def _of_this_machine() -> Callable[[Any, int, int, int], bool]:
    return compiled_looks(ctypes.CDLL(None))


def compiled_looks(library: Any) -> Callable[[Any, int, int, int], bool]:
    """(word, count, us, ns): whether an int32 [1] becomes that large within the ns, looked at after rests of the us.

    `library` has C's `clock_gettime` and `usleep`, and may have `prctl`.
    """
    from numba import njit, types

    clock: Any = library.clock_gettime
    clock.argtypes, clock.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_int
    sleep: Any = library.usleep
    sleep.argtypes, sleep.restype = (ctypes.c_uint32,), ctypes.c_int
    slack, short = _slack(library), np.uint32(SHORT_REST_US)

    @njit(types.int64(types.int64[::1]))
    def now(into):  # type: ignore[no-untyped-def]
        clock(_MONOTONIC, into.ctypes)
        return into[0] * 1_000_000_000 + into[1]

    @njit(types.boolean(types.int32[::1], types.int64, types.uint32, types.int64))
    def watch(word, count, rest_us, timeout_ns):  # type: ignore[no-untyped-def]
        into = np.zeros(2, np.int64)
        begun = now(into)
        # The clock is a function that the compiler knows nothing of, so that the word is read anew after each call.
        while word[0] < count:
            waited = now(into) - begun
            if waited >= timeout_ns:
                return word[0] >= count
            if rest_us:
                sleep(min(rest_us, short) if waited < _AT_FIRST_NS else rest_us)
        return True

    @njit(types.boolean(types.int32[::1], types.int64, types.uint32, types.int64), nogil=True)
    def look(word, count, rest_us, timeout_ns):  # type: ignore[no-untyped-def]
        if not rest_us or word[0] >= count:
            return watch(word, count, rest_us, timeout_ns)
        former = slack(1)
        rung = watch(word, count, rest_us, timeout_ns)
        slack(former)
        return rung

    found: Callable[[Any, int, int, int], bool] = look
    return found


def _slack(library: Any) -> Any:
    """Compiled, (ns) -> ns: gives the calling thread that timer slack, and returns the former.

    Where the kernel refuses, or is not Linux, rests only get longer: it returns 0, and given 0 it does nothing.
    """
    from numba import njit, types

    prctl: Any = getattr(library, "prctl", None)
    if prctl is None:
        return njit(types.int64(types.int64))(lambda ns: 0)
    prctl.argtypes, prctl.restype = (ctypes.c_int, *(ctypes.c_ulong,) * 4), ctypes.c_int

    @njit(types.int64(types.int64))
    def slack(ns):  # type: ignore[no-untyped-def]
        former = prctl(_GET_TIMERSLACK, 0, 0, 0, 0)
        if ns <= 0 or former <= 0 or prctl(_SET_TIMERSLACK, ns, 0, 0, 0) != 0:
            return 0
        return former

    return slack

"""Clock, rests and the slack of timers for compiled code that waits without the interpreter's lock."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, NamedTuple

__all__ = ["Resting", "resting", "slack_of"]

_MONOTONIC = 1
"""CLOCK_MONOTONIC."""
_SET_TIMERSLACK, _GET_TIMERSLACK = 29, 30
"""PR_SET_TIMERSLACK and PR_GET_TIMERSLACK, of the calling thread, in ns."""


class Resting(NamedTuple):
    """Compiled functions."""

    now: Any
    """(int64 [2] to work in) -> ns of the monotonic clock."""
    rest: Any
    """(us): sleeps."""
    slack: Any
    """See `slack_of`."""


@cache
def resting() -> Resting:
    """Of this machine; compiled when first asked for."""
    from numba import njit, types

    library = ctypes.CDLL(None)
    clock: Any = library.clock_gettime
    clock.argtypes, clock.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_int
    sleep: Any = library.usleep
    sleep.argtypes, sleep.restype = (ctypes.c_uint32,), ctypes.c_int

    @njit(types.int64(types.int64[::1]))
    def now(into):  # type: ignore[no-untyped-def]
        clock(_MONOTONIC, into.ctypes)
        return into[0] * 1_000_000_000 + into[1]

    @njit(types.intc(types.uint32))
    def rest(us):  # type: ignore[no-untyped-def]
        return sleep(us)

    return Resting(now, rest, slack_of(library))


def slack_of(library: Any) -> Any:
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

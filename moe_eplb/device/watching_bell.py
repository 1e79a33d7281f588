"""The updater's thread looks at the word in compiled code until the device has rung, and holds up nobody meanwhile.

It does not wait in the driver, by an operation of a stream: rings for which it began to wait so while a graph ran were
heard only when the graph had ended.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from moe_eplb.device.bell import Bell
from moe_eplb.device.resting import resting

__all__ = ["REST_US", "WatchingBell"]

REST_US = 50
"""Between two looks of a thread that shall not take a core; the operating system adds what it takes to wake it."""

_LONGEST_S = 600.0
"""What is waited for are kernels that have been enqueued, behind whatever else the device has to do."""


class WatchingBell(Bell):
    """Takes neither the interpreter's lock nor the driver's while it waits. For any number of threads.

    While a thread rests here its timers have the least slack, and afterwards what they had: Linux by default lets them
    come 50 us late. The timeout is the device's, whose work ends by itself, within a bound for a device that hangs.

    Args:
        word: See the base class.
        rest_us: How long the thread sleeps between two looks; with 0 it stays awake, and takes a core.
        longest_s: That bound, in s.
    """

    def __init__(self, word: Tensor, *, rest_us: int = REST_US, longest_s: float = _LONGEST_S) -> None:
        super().__init__(word)
        self._rest_us, self._longest_ns = rest_us, round(longest_s * 1e9)
        self._rung, self._look = word.numpy(), _compiled()

    def wait(self, count: int, timeout_s: float) -> bool:
        return self._look(self._rung, count, self._rest_us, self._longest_ns)

    def tell(self) -> None:
        return None


@cache
def _compiled() -> Callable[[Any, int, int, int], bool]:
    """(word, count, us, ns): whether an int32 [1] becomes that large within the ns, looked at after rests of the us."""
    from numba import njit, types

    now, sleep, slack = resting()

    @njit(types.boolean(types.int32[::1], types.int64, types.uint32, types.int64))
    def watch(word, count, rest_us, timeout_ns):  # type: ignore[no-untyped-def]
        into = np.zeros(2, np.int64)
        end = now(into) + timeout_ns
        # The clock is a function that the compiler knows nothing of, so that the word is read anew after each call.
        while word[0] < count:
            if now(into) >= end:
                return word[0] >= count
            if rest_us:
                sleep(rest_us)
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

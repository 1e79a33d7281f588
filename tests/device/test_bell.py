"""Bells on a thread of their own: heard, bounded, and no hindrance to others."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_eplb.device.bell import Bell, CpuBell
from moe_eplb.device.watching_bell import WatchingBell, _slack, compiled_looks

T = TypeVar("T")
AwakeBell = partial(WatchingBell, rest_us=0)
KINDS = pytest.mark.parametrize("make", [CpuBell, WatchingBell, AwakeBell])
WATCHING = pytest.mark.parametrize("make", [WatchingBell, AwakeBell])


@KINDS
def test_a_ring_is_heard_soon(make: Callable[[Tensor], Bell]) -> None:
    word = torch.zeros(1, dtype=torch.int32)
    bell, heard = make(word), list[tuple[bool, float]]()
    waits = threading.Thread(target=lambda: heard.append((bell.wait(2, 20.0), time.monotonic())))
    waits.start()
    for _ in range(2):
        time.sleep(0.05)
        assert not heard
        rung = time.monotonic()
        word += 1
        bell.tell()
    waits.join(20)
    assert heard[0][0]
    assert heard[0][1] - rung < 1


@KINDS
@pytest.mark.parametrize("count", [-1, 0, 3])
def test_what_was_rung_before_is_no_wait(make: Callable[[Tensor], Bell], count: int) -> None:
    assert make(torch.tensor([3], dtype=torch.int32)).wait(count, 0.0)


@pytest.mark.parametrize(
    ("make", "timeout_s"),
    [(CpuBell, 0.2), (partial(WatchingBell, longest_s=0.2), 0.0), (partial(AwakeBell, longest_s=0.2), 0.0)],
)
def test_a_wait_in_vain_ends(make: Callable[[Tensor], Bell], timeout_s: float) -> None:
    begun = time.monotonic()
    assert not make(torch.tensor([3], dtype=torch.int32)).wait(4, timeout_s)
    assert 0.2 <= time.monotonic() - begun < 2


@WATCHING
def test_who_watches_waits_for_what_the_device_has_yet_to_do(make: Callable[[Tensor], Bell]) -> None:
    word = torch.zeros(1, dtype=torch.int32)
    bell = make(word)
    ring = threading.Timer(0.3, lambda: word.add_(1))
    ring.start()
    assert bell.wait(1, 0.01), "the timeout is the device's"
    ring.join()


@WATCHING
def test_a_thread_that_watches_keeps_no_other_from_python(make: Callable[[Tensor], Bell]) -> None:
    word = torch.zeros(1, dtype=torch.int32)
    bell, heard = make(word), list[bool]()
    waits = threading.Thread(target=lambda: heard.append(bell.wait(1, 60.0)))
    waits.start()
    begun = time.monotonic()
    sum(range(100_000))  # with the lock held this would begin only when the wait has ended
    assert time.monotonic() - begun < 10
    word += 1
    waits.join(20)
    assert heard == [True]


def test_a_thread_that_rests_takes_a_small_part_of_a_core() -> None:
    bell = WatchingBell(torch.zeros(1, dtype=torch.int32), longest_s=1.0)

    def wait() -> float:
        begun = time.thread_time()
        bell.wait(1, 0.0)
        return time.thread_time() - begun

    assert in_a_thread(wait) < 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="only there timers have a slack")
def test_rests_are_short_whatever_the_slack_of_the_thread_which_keeps_it() -> None:
    former, prctl = 10_000_000, ctypes.CDLL(None).prctl
    bell = WatchingBell(torch.zeros(1, dtype=torch.int32), longest_s=0.05)

    def rests() -> int:
        """It gives its core up by itself only to rest; others that take it are not counted."""
        begun = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        assert not bell.wait(1, 0.0)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw - begun

    def wait() -> tuple[int, bool, int]:
        prctl(29, ctypes.c_ulong(former), 0, 0, 0)
        begun = prctl(30, 0, 0, 0, 0)
        # Of 0.05 s: 5 with that slack, 400 with the default one, 700 with the least. Others may hold one try up.
        short = any(rests() > 200 for _ in range(40))
        return begun, short, prctl(30, 0, 0, 0, 0)

    begun, short, ended = in_a_thread(wait)
    if begun != former:
        pytest.skip("the kernel lets no thread set the slack of its timers")
    assert short
    assert ended == former


def test_rests_are_shorter_at_first() -> None:
    rests, clock = list[int](), [0]

    def now(_: int, into: int) -> int:
        seconds_and_ns = ctypes.cast(into, ctypes.POINTER(ctypes.c_int64))
        seconds_and_ns[0], seconds_and_ns[1] = divmod(clock[0], 10**9)
        return 0

    def rest(us: int) -> int:
        rests.append(us)
        clock[0] += 1000 * us
        return 0

    library = SimpleNamespace(  # compiled code knows addresses alone, so that it has to stay
        clock_gettime=ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_void_p)(now),
        usleep=ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint32)(rest),
    )
    look = compiled_looks(library)
    word = np.zeros(1, np.int32)
    assert not look(word, 1, 50, 30_000_000)
    assert rests == [20] * 1000 + [50] * 200
    rests.clear()
    assert not look(word, 1, 7, 21_000)
    assert rests == [7] * 3
    assert not look(word, 1, 0, 0)
    word[0] = 1
    assert look(word, 1, 50, 10**9)
    assert rests == [7] * 3


def test_where_no_slack_can_be_set_none_is() -> None:
    asked = list[int]()
    prctl = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, *(ctypes.c_ulong,) * 4)
    refuses = prctl(lambda *of: asked.append(of[0]) or -1)
    assert _slack(SimpleNamespace())(1) == 0
    assert _slack(SimpleNamespace(prctl=refuses))(1) == 0
    assert asked == [30]


def in_a_thread(what: Callable[[], T]) -> T:
    found = list[T]()
    thread = threading.Thread(target=lambda: found.append(what()))
    thread.start()
    thread.join(20)
    return found[0]

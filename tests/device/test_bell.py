"""Bells on a thread of their own: heard, bounded, and no hindrance to others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from moe_eplb.device.bell import Bell, CpuBell
from moe_eplb.device.watching_bell import WatchingBell

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
    bell, taken = WatchingBell(torch.zeros(1, dtype=torch.int32), longest_s=1.0), list[float]()

    def wait() -> None:
        begun = time.thread_time()
        bell.wait(1, 0.0)
        taken.append(time.thread_time() - begun)

    waits = threading.Thread(target=wait)
    waits.start()
    waits.join(20)
    assert taken[0] < 0.3

"""Copies that give way, over driver functions that write down what they are called with."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_eplb.device.driver_calls import NOT_READY, SIGNATURES
from moe_eplb.device.giving_way import Parts, compiled_parts, in_parts

STREAM, LINK, OPENER = 5, 2**63 + 8, 6
EVENTS = np.array([100, 101, 102], np.uint64)


class Driver:
    """Functions of the driver, each with an answer of its own."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.answers: dict[str, Callable[..., int]] = {}
        self._kept = {name: ctypes.CFUNCTYPE(ctypes.c_int, *args)(self._of(name)) for name, args in SIGNATURES.items()}
        self.copy = compiled_parts(self._kept)

    def _of(self, name: str) -> Any:
        def called(*arguments: int) -> int:
            self.calls.append((name, *arguments))
            return self.answers.get(name, lambda *_: 0)(*arguments)

        return called

    def names(self, *, but: str = "") -> list[str]:
        return [name for name, *_ in self.calls if name != but]


@pytest.fixture(scope="module")
def compiled() -> Driver:
    return Driver()


@pytest.fixture
def driver(compiled: Driver) -> Driver:
    compiled.calls.clear()
    compiled.answers.clear()
    return compiled


def parts(*sizes: int) -> Parts:
    starts = 1000 * np.arange(1, 1 + len(sizes), dtype=np.uint64)
    return Parts(starts, starts + np.uint64(7), np.array(sizes, np.uint64))


def run(
    driver: Driver, copies: Parts, *, begun: int = 0, until: int = 1, patience_ns: int = 10**9, longest_ns: int = 10**10
) -> tuple[int, bool]:
    """What the copies return, and whether they freed the link."""
    freed, word = np.zeros(1, np.int64), np.array([begun], np.int64)
    code = driver.copy(STREAM, *copies, LINK, EVENTS, word, until, OPENER, freed, patience_ns, longest_ns)
    return code, bool(freed[0])


@given(
    st.lists(st.tuples(st.integers(0, 2**63), st.integers(0, 2**63), st.integers(1, 50)), max_size=8),
    st.integers(1, 20),
)
def test_parts_are_the_copies(copies: list[tuple[int, int, int]], most: int) -> None:
    columns = (np.array([copy[column] for copy in copies], np.uint64) for column in range(3))
    made = in_parts(Parts(*columns), most)
    assert all(1 <= size <= most for size in made.sizes.tolist())
    found = [(t + i, s + i) for t, s, n in zip(*(c.tolist() for c in made), strict=True) for i in range(n)]
    assert found == [(t + i, s + i) for t, s, n in copies for i in range(n)]


def test_each_part_waits_for_the_link_and_no_more_than_so_many_are_under_way(driver: Driver) -> None:
    assert run(driver, parts(1, 2, 3, 4)) == (0, False)
    wait = ("cuStreamWaitValue32_v2", STREAM, LINK, 0, 1)
    copies = [
        (wait, ("cuMemcpyAsync", 1000 * n, 1000 * n + 7, n, STREAM), ("cuEventRecord", 100 + (n - 1) % 3, STREAM))
        for n in range(1, 5)
    ]
    done = [("cuEventQuery", 100 + n) for n in (0, 1, 2, 0)]
    assert driver.calls == [*copies[0], *copies[1], *copies[2], done[0], *copies[3], *done[1:]]


def test_what_is_urgent_does_not_wait(driver: Driver) -> None:
    assert run(driver, parts(1, 2), begun=4, until=4) == (0, False)
    assert "cuStreamWaitValue32_v2" not in driver.names()
    assert driver.names().count("cuMemcpyAsync") == 2


def test_what_becomes_urgent_waits_no_longer(driver: Driver) -> None:
    freed, begun, copies = np.zeros(1, np.int64), np.array([0], np.int64), parts(1, 1, 1, 1, 1)

    def copied(*_: int) -> int:
        begun[0] += 1
        return 0

    driver.answers["cuMemcpyAsync"] = copied
    assert driver.copy(STREAM, *copies, LINK, EVENTS, begun, 2, OPENER, freed, 10**9, 10**10) == 0
    assert driver.names().count("cuStreamWaitValue32_v2") == 2
    assert driver.names().count("cuMemcpyAsync") == 5


def test_a_part_that_waits_for_long_frees_the_link_and_the_later_ones_do_not_wait(driver: Driver) -> None:
    freeing = ("cuStreamWriteValue32_v2", OPENER, LINK, 0, 0)
    driver.answers["cuEventQuery"] = lambda *_: 0 if freeing in driver.calls else NOT_READY
    assert run(driver, parts(1, 1, 1, 1, 1), patience_ns=2_000_000) == (0, True)
    assert freeing in driver.calls
    assert driver.names().count("cuStreamWaitValue32_v2") == 3, "those that were under way"
    assert driver.names().count("cuMemcpyAsync") == 5


def test_the_link_is_freed_again_and_again(driver: Driver) -> None:
    freeing = ("cuStreamWriteValue32_v2", OPENER, LINK, 0, 0)
    driver.answers["cuEventQuery"] = lambda *_: 0 if driver.calls.count(freeing) >= 3 else NOT_READY
    assert run(driver, parts(1), patience_ns=1) == (0, True)


def test_a_part_that_is_never_done_is_told(driver: Driver) -> None:
    driver.answers["cuEventQuery"] = lambda *_: NOT_READY
    assert run(driver, parts(1), patience_ns=1, longest_ns=3_000_000) == (NOT_READY, True)


@pytest.mark.parametrize(
    "fails", ["cuStreamWaitValue32_v2", "cuMemcpyAsync", "cuEventRecord", "cuEventQuery", "cuStreamWriteValue32_v2"]
)
def test_copies_end_at_the_call_that_fails(driver: Driver, fails: str) -> None:
    if fails == "cuStreamWriteValue32_v2":
        driver.answers["cuEventQuery"] = lambda *_: NOT_READY
    driver.answers[fails] = lambda *_: 700
    code, _ = run(driver, parts(1, 1, 1, 1), patience_ns=1)
    assert code == 700
    assert driver.names(but="cuEventQuery")[-1] == (fails if fails != "cuEventQuery" else "cuEventRecord")


def test_nothing_to_copy_is_nothing_to_do(driver: Driver) -> None:
    assert run(driver, parts()) == (0, False)
    assert driver.calls == []

"""Sequences of driver calls, over functions that write down what they are called with."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import numpy as np
import pytest
import torch

from moe_eplb.core.errors import BalancerError
from moe_eplb.device.driver_calls import NOT_READY, SIGNATURES, DriverCalls, addresses, require_success

ADDRESS = 2**63 + 8


class Recorded:
    """Driver functions that fail where they are told to."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fails: dict[str, int] = {}
        self._kept = {name: ctypes.CFUNCTYPE(ctypes.c_int, *args)(self._of(name)) for name, args in SIGNATURES.items()}
        self.sequences = DriverCalls(self._kept)

    def _of(self, name: str) -> Any:
        def called(*arguments: int) -> int:
            self.calls.append((name, *arguments))
            return self.fails.get(name, 0)

        return called


@pytest.fixture(scope="module")
def compiled() -> Recorded:
    return Recorded()


@pytest.fixture
def driver(compiled: Recorded) -> Recorded:
    compiled.calls.clear()
    compiled.fails.clear()
    return compiled


def test_copies_keep_their_order(driver: Recorded) -> None:
    targets, sources, sizes = (np.array(column, np.uint64) for column in ([ADDRESS, 20], [30, 40], [1, 2]))
    words, values = np.array([ADDRESS + 16, 8], np.uint64), np.array([-1, 3], np.int64).view(np.uint64)
    assert driver.sequences.copy(5, targets, sources, sizes, words, values, ADDRESS) == 0
    assert driver.calls == [
        ("cuMemcpyAsync", ADDRESS, 30, 1, 5), ("cuMemcpyAsync", 20, 40, 2, 5),
        ("cuStreamWriteValue64_v2", 5, ADDRESS + 16, 2**64 - 1, 0), ("cuStreamWriteValue64_v2", 5, 8, 3, 0),
        ("cuEventRecord", ADDRESS, 5),
    ]  # fmt: skip


def test_words_alone_are_written_too(driver: Recorded) -> None:
    none, one = np.array([], np.uint64), np.array([8], np.uint64)
    assert driver.sequences.copy(5, none, none, none, one, one, 9) == 0
    assert driver.calls == [("cuStreamWriteValue64_v2", 5, 8, 8, 0), ("cuEventRecord", 9, 5)]


def test_an_event_that_has_not_happened_is_told_from_an_error(driver: Recorded) -> None:
    assert driver.sequences.happened(ADDRESS) == 0
    driver.fails["cuEventQuery"] = NOT_READY
    assert driver.sequences.happened(9) == NOT_READY
    assert driver.calls == [("cuEventQuery", ADDRESS), ("cuEventQuery", 9)]


def test_copies_end_at_the_one_that_fails(driver: Recorded) -> None:
    driver.fails["cuMemcpyAsync"] = 1
    column = np.array([1, 2], np.uint64)
    assert driver.sequences.copy(0, column, column, column, column, column, 9) == 1
    assert len(driver.calls) == 1


def test_no_word_is_written_behind_the_one_that_fails(driver: Recorded) -> None:
    driver.fails["cuStreamWriteValue64_v2"] = 801
    column = np.array([1, 2], np.uint64)
    assert driver.sequences.copy(0, column, column, column, column, column, 9) == 801
    assert [name for name, *_ in driver.calls] == ["cuMemcpyAsync"] * 2 + ["cuStreamWriteValue64_v2"]


def test_nobody_else_waits_for_the_interpreter_meanwhile() -> None:
    """The sequence ends only when another thread has run Python code."""
    other_ran = threading.Event()

    def record(event: int, stream: int) -> int:
        return 0 if other_ran.wait(10) else 999

    functions: dict[str, Any] = {
        name: ctypes.CFUNCTYPE(ctypes.c_int, *args)(lambda *_: 0) for name, args in SIGNATURES.items()
    }
    functions["cuEventRecord"] = ctypes.CFUNCTYPE(ctypes.c_int, *SIGNATURES["cuEventRecord"])(record)
    other = threading.Timer(0.05, other_ran.set)
    other.start()
    none = np.array([], np.uint64)
    assert DriverCalls(functions).copy(1, none, none, none, none, none, 2) == 0
    other.join()


def test_addresses_are_those_of_the_tensors() -> None:
    target, source = torch.zeros(3, 2), torch.zeros(3, 2)
    found = addresses([(target, source), (target[1:], source[:2])])
    assert [column.tolist() for column in found] == [
        [target.data_ptr(), target.data_ptr() + 8], [source.data_ptr(), source.data_ptr()], [24, 16],
    ]  # fmt: skip
    assert [len(column) for column in addresses([])] == [0, 0, 0]


@pytest.mark.parametrize("source", [torch.zeros(4), torch.zeros(3, dtype=torch.float64), torch.zeros(6)[::2]])
def test_what_is_no_copy_of_bytes_is_refused(source: torch.Tensor) -> None:
    with pytest.raises(BalancerError, match="E215"):
        addresses([(torch.zeros(3), source)])


def test_a_result_that_is_an_error_is_raised_with_its_number() -> None:
    require_success("cuMemcpyAsync", 0)
    with pytest.raises(BalancerError, match=r"E171.*cuMemcpyAsync[\s\S]*CUresult 700"):
        require_success("cuMemcpyAsync", 700)

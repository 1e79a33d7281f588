"""The known faults of the reference: this balancer has none of them, and each check notices when our fix is gone.

What must hold and how each fix is taken out stands in ``tests/support/faults``, one module for each kind of fault.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from moe_eplb.balancer.host_memory import list_segments
from tests.support.faults import agreement, calls, memory, settings, sizes, streams, waiting
from tests.support.faults.base import Fault

FAULTS = [
    *streams.FAULTS,
    *calls.FAULTS,
    *waiting.FAULTS,
    *agreement.FAULTS,
    *memory.FAULTS,
    *sizes.FAULTS,
    *settings.FAULTS,
]
CHECKS = {fault.check.__name__: fault.check for fault in FAULTS}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Neither a check nor a fix taken out leaves threads or segments behind."""
    threads = set(threading.enumerate())
    yield
    assert [thread.name for thread in set(threading.enumerate()) - threads] == []
    assert [segment.name for segment in list_segments() if segment.owner_pid == os.getpid()] == []


@pytest.mark.parametrize("name", CHECKS)
def test_the_fault_is_not_there(name: str) -> None:
    CHECKS[name]()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_check_notices_when_the_fix_is_taken_out(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fault.take_out(patch)
        with pytest.raises(AssertionError, match=fault.says):
            fault.check()


def test_no_fault_is_named_twice() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)

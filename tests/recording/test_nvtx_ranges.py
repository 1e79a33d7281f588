"""What is sent to NVTX, seen through a domain that writes it down."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from moe_eplb.core.events import HOST, Kind
from moe_eplb.recording import nvtx_ranges
from moe_eplb.recording.event_log import EventLog


class FakeDomain:
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def get_event_attributes(self, message: str, payload: int = 0) -> SimpleNamespace:
        return SimpleNamespace(message=message, payload=payload)

    def push_range(self, attributes: SimpleNamespace) -> None:
        self.calls.append(("push", attributes.message, attributes.payload))

    def pop_range(self) -> None:
        self.calls.append(("pop",))

    def mark(self, attributes: SimpleNamespace) -> None:
        self.calls.append(("mark", attributes.message, attributes.payload))


@pytest.fixture
def domain(monkeypatch: pytest.MonkeyPatch) -> FakeDomain:
    fake = FakeDomain()
    monkeypatch.setattr(nvtx_ranges.nvtx, "get_domain", lambda name: fake)
    return fake


def test_ranges_nest_and_carry_the_iteration(domain: FakeDomain, tmp_path: Any) -> None:
    with EventLog(tmp_path / "log", 0, capacity=3) as log:
        for iteration in (4, 5):
            log.end(log.begin(Kind.ROUTE, 2, iteration, HOST))
        log.mark(Kind.END_ITER, -1, 5, HOST)
        log.end(log.begin(Kind.ROUTE, 2, 6, HOST))
    pairs = [("push", "route/2", 4), ("pop",), ("push", "route/2", 5), ("pop",)]
    assert domain.calls == [*pairs, ("mark", "end_iter", 5)], "a dropped record must not unbalance the ranges"


def test_threads_do_not_share_attributes(domain: FakeDomain) -> None:
    ranges = nvtx_ranges.attach()
    assert ranges is not None
    mine = ranges._attributes(Kind.PLAN, 0, 1)
    others: list[Any] = []
    thread = threading.Thread(target=lambda: others.append(ranges._attributes(Kind.PLAN, 0, 2)))
    thread.start()
    thread.join()
    assert (mine.payload, others[0].payload) == (1, 2)


def test_without_a_profiler_nothing_is_attached() -> None:
    assert nvtx_ranges.attach() is None

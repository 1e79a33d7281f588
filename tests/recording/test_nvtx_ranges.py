"""What is sent to NVTX, seen through a domain that writes it down."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_eplb.core.events import HOST, Kind
from moe_eplb.device.cuda import CudaDevice
from moe_eplb.device.cuda_graph import Piece
from moe_eplb.device.cuda_times import CudaTimes
from moe_eplb.recording import nvtx_ranges
from moe_eplb.recording.event_log import EventLog
from moe_eplb.recording.log_format import read_log


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


def test_what_a_replay_did_is_told_later_and_is_no_range_of_the_host(domain: FakeDomain, tmp_path: Path) -> None:
    """A range says what its thread did when; the pieces of a replay stand in the log alone, with the device's times."""
    with EventLog(tmp_path / "log", 0, capacity=5) as log:
        device = _device_after_a_replay(log, [(Kind.START_WAIT_GPU_STAGE, 0, 4), (Kind.VOTE, 1, 0)])
        log.mark(Kind.END_ITER, -1, 3, HOST)
        device.synchronize()
        device.synchronize()
        log.mark(Kind.START_ITER, -1, 4, HOST)
    assert domain.calls == [("mark", "end_iter", 3), ("mark", "start_iter", 4)]
    _, records = read_log(tmp_path / "log")
    columns = ("kind", "layer", "stream", "iteration", "start", "end", "a", "b")
    assert records[list(columns)][1:3].tolist() == [
        (Kind.START_WAIT_GPU_STAGE, 0, 4, 3, 1000, 1500, 7, -1), (Kind.VOTE, 1, 0, 3, 1000, 1500, 7, -1),
    ]  # fmt: skip
    assert len(records) == 4
    assert records["thread"].tolist() == [threading.get_native_id()] * 4


def _device_after_a_replay(log: EventLog, pieces: list[tuple[Kind, int, int]]) -> CudaDevice:
    """A device as iteration 3 leaves it, which has replayed a graph, with clocks that are not those of a GPU."""
    device, times = CudaDevice.__new__(CudaDevice), CudaTimes.__new__(CudaTimes)
    start: Any = SimpleNamespace(at=1000)
    end: Any = SimpleNamespace(at=1500)
    graph = _Graph([Piece(kind, layer, stream, 7, start, end) for kind, layer, stream in pieces])
    times.__dict__ |= {"_sink": log, "_timed": [], "_replays": {graph: 3}}
    times.__dict__ |= {"_set_clock": lambda: None, "_time_of": lambda event: event.at}
    device.__dict__ |= {"_streams": [], "_times": times}
    return device


class _Graph:
    """What the device remembers of a graph that was replayed."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces


def test_a_full_log_drops_what_a_replay_did_too(tmp_path: Path) -> None:
    with EventLog(tmp_path / "log", 0, capacity=1) as log:
        for iteration in (0, 1):
            log.record(Kind.VOTE, 0, iteration, 4, 5, 9)
    header, records = read_log(tmp_path / "log")
    assert (header.dropped, records["iteration"].tolist()) == (1, [0])


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

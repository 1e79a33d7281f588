"""The CPU reference backend: legal reordering, joins, collectives in common order."""

from __future__ import annotations

import pytest

from moe_eplb.core.errors import BalancerError, UsageError
from moe_eplb.core.events import Kind, NullSink
from moe_eplb.device import AuxStreamType, CpuDevice, EventType, get_device, require_devices


class Log(NullSink):
    """Remembers the streams of begun records."""

    def __init__(self) -> None:
        self.begun: list[tuple[Kind, int, int]] = []

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        self.begun.append((kind, iteration, stream))
        return len(self.begun)


def test_event_types_are_main_and_every_auxiliary_stream() -> None:
    assert [e.name for e in EventType] == ["Main", *(s.name for s in AuxStreamType)]
    assert [s.name for s in AuxStreamType] == ["Attention", "MoeShared", "MoeChunkingOverlap", "MoeBalancer"]


@pytest.mark.parametrize("seed", range(20))
def test_a_join_runs_the_work_before_the_mark_and_keeps_stream_order(seed: int) -> None:
    device = CpuDevice(NullSink(), seed=seed)
    stream, event, done = device.stream(AuxStreamType.MoeBalancer), device.new_event(), list[int]()
    for i in range(4):
        device.submit(stream, Kind.PLAN, 0, lambda i=i: done.append(i))
    device.record(event, stream)
    device.submit(stream, Kind.PLAN, 0, lambda: done.append(4))
    device.wait(device.main, event)
    assert done[:4] == [0, 1, 2, 3]
    device.synchronize()
    assert done == [0, 1, 2, 3, 4]
    assert device.pending() == 0


def test_without_a_join_some_seed_reads_stale_data() -> None:
    """The point of the backend: a missing join is visible."""
    stale = 0
    for seed in range(40):
        device = CpuDevice(NullSink(), seed=seed)
        stream, value = device.stream(AuxStreamType.MoeBalancer), [0]
        device.submit(stream, Kind.PLAN, 0, lambda value=value: value.__setitem__(0, 1))
        stale += device.run(Kind.ROUTE, 0, lambda value=value: value[0]) == 0
    assert 5 < stale < 35


def test_serial_runs_at_submission() -> None:
    device, done = CpuDevice(NullSink(), seed=None), list[int]()
    device.submit(device.stream(AuxStreamType.MoeBalancer), Kind.PLAN, 0, lambda: done.append(1))
    assert done == [1]


@pytest.mark.parametrize("seed", range(10))
def test_collectives_run_at_the_same_point_on_every_rank(seed: int) -> None:
    def order(rank: int) -> list[str]:
        device, seen = CpuDevice(NullSink(), seed=seed, rank=rank), list[str]()
        stream, event = device.stream(AuxStreamType.MoeBalancer), device.new_event()
        for step in range(6):
            device.submit(stream, Kind.PLAN, 0, lambda: None)
            device.submit(stream, Kind.STATISTIC_REDUCE, 0, lambda s=step: seen.append(f"reduce {s}"), collective=True)
            for _ in range(rank * 3):  # local work differs between ranks and must not matter
                device.run(Kind.EXPERTS, 0, lambda: None)
            device.run(Kind.DISPATCH, 0, lambda s=step: seen.append(f"dispatch {s}"))
            device.record(event, stream)
            device.wait(device.main, event)
        return seen

    assert order(0) == order(1) == order(2)


def test_records_carry_the_stream_and_iteration_of_the_work() -> None:
    log = Log()
    device = CpuDevice(log, seed=0)
    device.iteration = 7
    stream = device.stream(AuxStreamType.MoeBalancer)
    device.submit(stream, Kind.LOAD_UPDATE, 3, lambda: None)
    device.iteration = 8
    device.synchronize()
    device.run(Kind.TOPK, 3, lambda: None)
    assert log.begun == [(Kind.LOAD_UPDATE, 7, 4), (Kind.TOPK, 8, 0)]


def test_discard_forgets_work_and_later_joins_return() -> None:
    device, done = CpuDevice(NullSink(), seed=1), list[int]()
    stream, event = device.stream(AuxStreamType.MoeBalancer), device.new_event()
    device.submit(stream, Kind.PLAN, 0, lambda: done.append(1))
    device.record(event, stream)
    assert device.discard() == 1
    device.wait(device.main, event)
    assert done == []
    assert device.pending() == 0


def test_a_stream_can_wait_for_another() -> None:
    device, done = CpuDevice(NullSink(), seed=3), list[str]()
    first, second = device.stream(AuxStreamType.MoeShared), device.stream(AuxStreamType.MoeBalancer)
    event, end = device.new_event(), device.new_event()
    device.submit(first, Kind.PLAN, 0, lambda: done.append("first"))
    device.record(event, first)
    device.wait(second, event)
    device.submit(second, Kind.PLAN, 0, lambda: done.append("second"))
    device.record(end, second)
    device.wait(device.main, end)
    assert done == ["first", "second"]


def test_waiting_for_an_event_that_was_never_recorded_is_an_error() -> None:
    device = CpuDevice(NullSink(), seed=0)
    with pytest.raises(BalancerError, match="never recorded"):
        device.wait(device.main, device.new_event("done"))


def test_unknown_device() -> None:
    with pytest.raises(UsageError, match="no device 'tpu'"):
        get_device("tpu", NullSink())


def test_work_on_an_auxiliary_stream_comes_after_what_waits_there() -> None:
    device, done = CpuDevice(NullSink(), seed=0), list[int]()
    stream = device.stream(AuxStreamType.MoeChunkingOverlap)
    for seed in range(20):
        done.clear()
        device.submit(stream, Kind.PLAN, 0, lambda: done.append(0))
        with device.use(stream):
            device.run(Kind.EXPERTS, seed, lambda: done.append(1))
        assert done == [0, 1]


def test_a_gpu_is_asked_for_each_rank_and_a_cpu_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    require_devices("cpu", 64)
    require_devices("cuda", 2)
    with pytest.raises(UsageError, match=r"E010(.|\n)*2 are visible"):
        require_devices("cuda", 3)

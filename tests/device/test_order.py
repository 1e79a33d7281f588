"""Happens-before between streams: each rule, with the join and without it."""

from __future__ import annotations

import pytest

from moe_eplb.core.events import ROUTE_COUNTS, VOTES, Kind, NullSink
from moe_eplb.device import AuxStreamType, CpuDevice, Stream
from moe_eplb.device.order import StreamOrder, Unordered

LAYER = 3


def _streams() -> tuple[Stream, Stream, Stream]:
    return Stream("Main", 0), Stream("MoeChunkingOverlap", 3), Stream("MoeBalancer", 4)


@pytest.mark.parametrize("kind", [Kind.ROUTE, Kind.EXPERTS])
@pytest.mark.parametrize("joined", [True, False])
def test_readers_come_after_the_wait_for_the_layer(kind: Kind, joined: bool) -> None:
    order, (main, chunk, balancer) = StreamOrder(), _streams()
    assert order.work(balancer, Kind.START_WAIT_GPU_STAGE, LAYER) is None
    mark = order.mark(balancer)
    order.wait(main, mark)
    assert order.work(main, kind, LAYER) is None
    if joined:
        order.wait(chunk, mark)
    assert order.work(chunk, kind, LAYER) == (None if joined else Unordered(Kind.START_WAIT_GPU_STAGE, balancer))


@pytest.mark.parametrize("joined", [True, False])
def test_the_wait_for_a_layer_comes_after_its_hand_over_before(joined: bool) -> None:
    order, (main, _, balancer) = StreamOrder(), _streams()
    order.work(balancer, Kind.START_SET_CPU_STAGE, LAYER)
    if joined:
        order.wait(main, order.mark(balancer))
    assert order.work(main, Kind.START_WAIT_GPU_STAGE, LAYER + 1) is None
    found = order.work(main, Kind.START_WAIT_GPU_STAGE, LAYER)
    assert found == (None if joined else Unordered(Kind.START_SET_CPU_STAGE, balancer))
    order.forget()
    assert order.work(main, Kind.START_WAIT_GPU_STAGE, LAYER) is None, "nothing of an iteration that was aborted"


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (Kind.START_WAIT_GPU_STAGE, LAYER - 1), (Kind.LOAD_UPDATE, LAYER - 1), (Kind.SETTLE_VOTE, LAYER - 1),
        (Kind.LOAD_UPDATE, LAYER + 7),
    ],
)  # fmt: skip
@pytest.mark.parametrize("joined", [True, False])
def test_the_wait_for_a_layer_comes_after_that_for_the_one_before_and_after_votes(
    kind: Kind, layer: int, joined: bool
) -> None:
    """The first layer begins the iteration; each settles the vote on the plan of the next, or the last those of all."""
    order, (main, _, balancer) = StreamOrder(), _streams()
    order.work(balancer, kind, layer)
    if joined:
        order.wait(main, order.mark(balancer))
    found = order.work(main, Kind.START_WAIT_GPU_STAGE, LAYER)
    assert found == (None if joined else Unordered(kind, balancer))


@pytest.mark.parametrize("joined", [True, False])
def test_the_hand_over_comes_after_every_reading_stream(joined: bool) -> None:
    order, (main, chunk, balancer) = StreamOrder(), _streams()
    for stream in (chunk, main):
        order.work(stream, Kind.EXPERTS, LAYER)
    order.wait(balancer, order.mark(main))
    if joined:
        order.wait(balancer, order.mark(chunk))
    found = order.work(balancer, Kind.START_SET_CPU_STAGE, LAYER)
    assert found == (None if joined else Unordered(Kind.EXPERTS, chunk))


@pytest.mark.parametrize("kind", [Kind.COMBINE, Kind.SHARED_EXPERT, Kind.START_SET_CPU_STAGE])
@pytest.mark.parametrize("joined", [True, False])
def test_the_next_layer_comes_after_every_result(kind: Kind, joined: bool) -> None:
    order, (main, chunk, _) = StreamOrder(), _streams()
    order.work(chunk, kind, LAYER)
    if joined:
        order.wait(main, order.mark(chunk))
    found = order.work(main, Kind.TOPK, LAYER + 1)
    assert found == (None if joined else Unordered(kind, chunk))
    assert order.work(main, Kind.TOPK, LAYER + 2) is None, "told once"


@pytest.mark.parametrize(
    ("kind", "flags"), [(Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, 0), (Kind.ROUTE, ROUTE_COUNTS), (Kind.ROUTE, 0)]
)
@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("vote", [(Kind.VOTE, LAYER), (Kind.LOAD_UPDATE, LAYER, VOTES)])
def test_the_vote_comes_after_whatever_has_counted(
    vote: tuple[Kind, int, int], kind: Kind, flags: int, joined: bool
) -> None:
    order, (main, chunk, balancer) = StreamOrder(), _streams()
    order.work(chunk, kind, LAYER, flags)
    if joined:
        order.wait(balancer, order.mark(chunk))
    assert order.work(main, Kind.LOAD_UPDATE, LAYER) is None, "what the vote has taken along"
    found = order.work(balancer, *vote)
    counts = kind is not Kind.ROUTE or flags == ROUTE_COUNTS
    assert found == (Unordered(kind, chunk) if counts and not joined else None)
    assert order.work(main, *vote) is None, "told once"


def test_waiting_reaches_through_other_streams() -> None:
    order, (main, chunk, balancer) = StreamOrder(), _streams()
    order.work(balancer, Kind.START_WAIT_GPU_STAGE, LAYER)
    order.wait(chunk, order.mark(balancer))
    order.wait(main, order.mark(chunk))
    assert order.work(main, Kind.ROUTE, LAYER) is None


def test_layers_are_apart() -> None:
    order, (main, _, balancer) = StreamOrder(), _streams()
    order.work(balancer, Kind.START_WAIT_GPU_STAGE, LAYER)
    assert order.work(main, Kind.ROUTE, LAYER + 1) is None


def test_an_old_mark_does_not_cover_later_work() -> None:
    order, (main, _, balancer) = StreamOrder(), _streams()
    mark = order.mark(balancer)
    order.work(balancer, Kind.START_WAIT_GPU_STAGE, LAYER)
    order.wait(main, mark)
    assert order.work(main, Kind.ROUTE, LAYER) == Unordered(Kind.START_WAIT_GPU_STAGE, balancer)


class Marks(NullSink):
    """Keeps (kind, layer, stream, a, b) of every mark."""

    def __init__(self) -> None:
        self.seen: list[tuple[Kind, int, int, int, int]] = []

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        self.seen.append((kind, layer, stream, a, b))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_the_device_records_what_did_not_wait_even_when_it_ran_in_order(seed: int | None) -> None:
    sink = Marks()
    device = CpuDevice(sink, seed=seed, check_order=True)
    balancer, event = device.stream(AuxStreamType.MoeBalancer), device.new_event()
    device.submit(balancer, Kind.START_WAIT_GPU_STAGE, LAYER, lambda: None)
    device.synchronize()
    device.run(Kind.ROUTE, LAYER, lambda: None)
    assert sink.seen == [(Kind.UNORDERED, LAYER, 0, Kind.ROUTE, Kind.START_WAIT_GPU_STAGE << 8 | balancer.index)]
    device.record(event, balancer)
    device.wait(device.main, event)
    device.run(Kind.ROUTE, LAYER, lambda: None)
    assert len(sink.seen) == 1


def test_an_aborted_iteration_leaves_no_demands() -> None:
    sink = Marks()
    device = CpuDevice(sink, seed=0, check_order=True)
    device.submit(device.stream(AuxStreamType.MoeBalancer), Kind.START_WAIT_GPU_STAGE, LAYER, lambda: None)
    device.discard()
    device.run(Kind.ROUTE, LAYER, lambda: None)
    assert sink.seen == []


COUNTS = [Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS, Kind.STATISTIC_REDUCE, Kind.LOAD_UPDATE, Kind.VOTE, Kind.SETTLE_VOTE]


@pytest.mark.parametrize("kind", COUNTS)
@pytest.mark.parametrize("joined", [True, False])
def test_statistics_come_after_the_wait_and_before_the_hand_over(kind: Kind, joined: bool) -> None:
    order, (main, _, balancer) = StreamOrder(), _streams()
    statistic = Stream("MoeBalancerStatistic", 5)
    order.work(balancer, Kind.START_WAIT_GPU_STAGE, LAYER)
    assert order.work(main, kind, LAYER) == Unordered(Kind.START_WAIT_GPU_STAGE, balancer)
    order.wait(statistic, order.mark(balancer))
    assert order.work(statistic, kind, LAYER) is None
    order.wait(balancer, order.mark(main))
    if joined:
        order.wait(balancer, order.mark(statistic))
    found = order.work(balancer, Kind.START_SET_CPU_STAGE, LAYER)
    assert found == (None if joined else Unordered(kind, statistic))

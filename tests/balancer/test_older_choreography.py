"""The older choreography: where its work runs, eager and captured, and that it is ordered whatever streams do."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moe_eplb.balancer import BalancerOptions
from moe_eplb.balancer.older_choreography import OlderChoreography
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, Kind, NullSink
from moe_eplb.device import AuxStreamType, CpuDevice, Event
from tests.support.balanced import Rig

MAIN, CHUNK, LOCK, STATISTIC = 0, 3, 4, 5
LAYER = 2


class Log(NullSink):
    """Keeps (kind, stream) of all work and of everything that did not wait."""

    def __init__(self) -> None:
        self.work: list[tuple[Kind, int]] = []
        self.unordered: list[Kind] = []

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        if stream != HOST:
            self.work.append((kind, stream))
        return 0

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        if kind is Kind.UNORDERED:
            self.unordered.append(Kind(a))


class Graphs(CpuDevice):
    """A device that says of itself that it has graphs, and whether it captures one."""

    has_graphs = True
    captures = False

    @property
    def capturing(self) -> bool:
        return self.captures


def _none() -> None:
    return None


def forward(device: CpuDevice, layer: OlderChoreography, *, chunks: bool = False) -> None:
    """A layer's work as `SingleLayerMoeLoadBalancer` and `WideEPMoE` put it on streams, path C."""
    overlapped = device.stream(AuxStreamType.MoeChunkingOverlap)
    device.run(Kind.TOPK, LAYER, _none)
    layer.submit(Kind.START_WAIT_GPU_STAGE, _none)
    layer.mark()
    layer.begin_reading()
    for stream in (device.main, overlapped) if chunks else (device.main,):
        with device.use(stream):
            layer.read()
            device.run(Kind.ROUTE, LAYER, _none)
            layer.submit(Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS, _none)
            device.run(Kind.EXPERTS, LAYER, _none)
    with device.use(stream):
        layer.submit(Kind.LOAD_UPDATE, _none)
        layer.end_reading()
        layer.submit(Kind.START_SET_CPU_STAGE, _none)
        layer.mark()
        device.run(Kind.COMBINE, LAYER, _none)
        layer.join()
    if chunks:
        event = device.new_event()
        device.record(event, overlapped)
        device.wait(device.main, event)
    device.run(Kind.TOPK, LAYER + 1, _none)
    device.synchronize()


BALANCER = [
    Kind.START_WAIT_GPU_STAGE, Kind.UPDATE_STATISTIC_WITH_GLOBAL_IDS, Kind.LOAD_UPDATE, Kind.START_SET_CPU_STAGE,
]  # fmt: skip


def _made(device: type[CpuDevice], seed: int) -> tuple[Log, CpuDevice, OlderChoreography]:
    log = Log()
    made = device(log, seed=seed, check_order=True)
    return log, made, OlderChoreography(made, LAYER, made.stream(AuxStreamType.MoeBalancer))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunks", [False, True])
def test_the_reference_device_always_overlaps_and_is_in_order(seed: int, chunks: bool) -> None:
    log, device, layer = _made(CpuDevice, seed)
    for _ in range(3):
        forward(device, layer, chunks=chunks)
    assert log.unordered == []
    streams = {kind: stream for kind, stream in log.work if kind in BALANCER}
    assert [streams[kind] for kind in BALANCER] == [LOCK, STATISTIC, STATISTIC, LOCK]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("chunks", [False, True])
def test_without_a_capture_everything_is_on_the_callers_stream(seed: int, chunks: bool) -> None:
    log, device, layer = _made(Graphs, seed)
    for _ in range(3):
        forward(device, layer, chunks=chunks)
    assert log.unordered == []
    used = {stream for kind, stream in log.work if kind in BALANCER}
    assert used == ({MAIN, CHUNK} if chunks else {MAIN})


def test_a_capture_overlaps_and_what_follows_does_not() -> None:
    log, device, layer = _made(Graphs, 0)
    assert isinstance(device, Graphs)
    forward(device, layer)
    device.captures = True
    log.work.clear()
    forward(device, layer)
    assert {stream for kind, stream in log.work if kind in BALANCER} == {LOCK, STATISTIC}
    device.captures = False
    log.work.clear()
    forward(device, layer)
    assert {stream for kind, stream in log.work if kind in BALANCER} == {MAIN}
    assert log.unordered == []


def _no_wait_for_the_layer(layer: OlderChoreography) -> None:
    layer._taken, layer._readers = layer._done, [layer._device.current]


JOINS: dict[str, tuple[str, Callable[..., None], Kind]] = {
    "the main stream for the layer": ("begin_reading", _no_wait_for_the_layer, Kind.ROUTE),
    "the hand-over for statistics": ("_join_statistics", lambda layer, stream: None, Kind.START_SET_CPU_STAGE),
    "the hand-over for anybody": ("end_reading", lambda layer: None, Kind.START_SET_CPU_STAGE),
    "the main stream for the hand-over": ("join", lambda layer: None, Kind.TOPK),
}


@pytest.mark.parametrize("missing", JOINS)
def test_each_missing_join_is_seen(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, forgetful, found = JOINS[missing]
    monkeypatch.setattr(OlderChoreography, name, forgetful)
    log, device, layer = _made(CpuDevice, 0)
    forward(device, layer)
    assert found in log.unordered


def test_each_step_between_streams_has_an_event_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _, device, layer = _made(CpuDevice, 0)
    made: list[Event] = []
    new_event = device.new_event
    monkeypatch.setattr(device, "new_event", lambda name="": made.append(new_event(name)) or made[-1])
    forward(device, layer)
    once = len(made)
    forward(device, layer)
    assert once >= 6
    assert len(set(made)) == len(made) == 2 * once


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_it_places_and_moves_as_the_other_does(resident: bool, ranks: int) -> None:
    found = []
    for overlap in ("after", "before"):
        rig = Rig(ranks=ranks, seed=3, overlap=overlap, resident=resident)
        slots = [rig.iterate() for _ in range(8)]
        rig.assert_weights_match()
        found.append((slots, rig.placements()))
        rig.balancer.shutdown()
    assert found[0] == found[1]
    assert found[0][0][0] != found[0][0][-1], "nothing moved"


def test_another_word_for_overlap_is_refused() -> None:
    with pytest.raises(BalancerError, match="E148"):
        BalancerOptions(overlap="both")  # type: ignore[arg-type]

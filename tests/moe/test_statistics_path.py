"""When statistics reach the balancer, and which of them wait for the experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, MoeLoadBalancerIterContext, resident_layer
from moe_eplb.balancer.resident_layer import ResidentLayer
from moe_eplb.core.events import HOST, Kind, NullSink
from moe_eplb.device import AuxStreamType, get_device
from moe_eplb.moe.chunking import Chunk
from moe_eplb.moe.statistics_path import make_path
from tests.moe.test_wide_ep import _layer, _step
from tests.support.moe_layers import ListSink


class Unordered(NullSink):
    """Keeps the kinds of work that did not wait."""

    def __init__(self) -> None:
        self.found: list[Kind] = []

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        if kind is Kind.UNORDERED:
            self.found.append(Kind(a))


class Stages:
    """Keeps what it was called for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def hold_statistics(self) -> None:
        self.calls.append(("hold",))

    def update_statistic_with_local_ids(self, ids: Any, is_first_stage: bool, is_last_stage: bool, **_: Any) -> None:
        self.calls.append(("update", is_first_stage, is_last_stage))


@pytest.mark.parametrize(
    ("chunk", "held"),
    [
        (Chunk(slice(0, 2), 0, first=True, last=True, tokens=(2, 9, 0)), [("hold",)]),
        (Chunk(slice(0, 2), 0, first=True, last=True), []),  # another rank may hold what this one does not
        (Chunk(slice(0, 2), 0, first=True, last=False, tokens=(2, 9, 0)), []),
        (Chunk(slice(2, 4), 1, first=False, last=True, tokens=(2, 9, 0)), []),
    ],
)
def test_a_forward_is_held_where_every_rank_knows_that_it_is_whole(chunk: Chunk, held: list[tuple[Any, ...]]) -> None:
    stages: Any = Stages()
    path, received = make_path("local_ids", stages, None), Any
    path.after_top_k(torch.zeros(2, 3, dtype=torch.int32), chunk)
    path.after_dispatch(received, chunk)  # type: ignore[arg-type]
    assert stages.calls == [*held, ("update", chunk.first, chunk.last)]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("few", [0, 4096])
def test_statistics_are_submitted_behind_the_experts(few: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_layer, "_FEW", few)
    if not known:
        monkeypatch.setattr(ResidentLayer, "hold_statistics", lambda self: None)
    sink = ListSink()
    device = get_device("cpu", sink)
    balancer = MoeLoadBalancer(0, 1, 1, device=device, options=BalancerOptions(resident=True, commit_delay=2))
    with balancer:
        moe = _layer(device, dispatch="allgather", statistics="local_ids")
    balancer.finalize_model()
    try:
        with MoeLoadBalancerIterContext(balancer, True, True):
            assert _step(moe, 0, 4, 0, [4]).error <= 1e-5
    finally:
        balancer.shutdown()
    count = [] if few else [Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS]
    late = [*count, Kind.VOTE, Kind.LOAD_UPDATE]
    if known:
        wanted = [Kind.ROUTE, Kind.DISPATCH, Kind.EXPERTS, *late]
    else:
        wanted = [*(late if not few else []), Kind.ROUTE, *(late if few else []), Kind.DISPATCH, Kind.EXPERTS]
    watched = {Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, *wanted}
    assert [kind for kind, stream, _ in sink.records if stream != HOST and kind in watched] == wanted


def test_what_follows_a_mark_in_the_middle_of_work_does_not_come_after_it() -> None:
    """Else a hand-over that forgot to wait for the experts would look as if it had."""
    marks = Unordered()
    device = get_device("cpu", marks, check_order=True)
    aux, event = device.stream(AuxStreamType.MoeBalancer), device.new_event()
    for within in (True, False):
        marks.found.clear()
        device.submit(device.main, Kind.START_WAIT_GPU_STAGE, 0, lambda: None)
        device.run(Kind.EXPERTS, 0, partial(device.record, event, device.main, within=within))
        device.wait(aux, event)
        device.submit(aux, Kind.START_SET_CPU_STAGE, 0, lambda: None)
        assert marks.found == ([Kind.START_SET_CPU_STAGE] if within else [])

"""When each path gives a forward's statistics to the balancer, and which of them wait for the dispatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, MoeLoadBalancerIterContext, resident_layer
from moe_eplb.core.events import HOST, Kind
from moe_eplb.device import get_device
from moe_eplb.moe.chunking import Chunk
from moe_eplb.moe.statistics_path import make_path
from tests.moe.test_wide_ep import _layer, _step
from tests.support.moe_layers import ListSink


class Stages:
    """Keeps what it was called for."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def hold_statistics(self, most_ids: int) -> None:
        self.calls.append(("hold", most_ids))

    def release_statistics(self) -> None:
        self.calls.append(("release",))

    def update_statistic_with_local_ids(self, ids: Any, is_first_stage: bool, is_last_stage: bool, **_: Any) -> None:
        self.calls.append(("update", is_first_stage, is_last_stage))


@pytest.mark.parametrize(
    ("chunk", "held"),
    [
        (Chunk(slice(0, 2), 0, first=True, last=True, tokens=(2, 9, 0)), [("hold", 27)]),
        (Chunk(slice(0, 2), 0, first=True, last=True), []),  # another rank may hold what this one does not
        (Chunk(slice(0, 2), 0, first=True, last=False, tokens=(2, 9, 0)), []),
        (Chunk(slice(2, 4), 1, first=False, last=True, tokens=(2, 9, 0)), []),
    ],
)
def test_a_whole_forward_holds_by_the_fullest_ranks_ids(chunk: Chunk, held: list[tuple[Any, ...]]) -> None:
    stages: Any = Stages()
    path, received = make_path("local_ids", stages, None), Any
    path.after_top_k(torch.zeros(2, 3, dtype=torch.int32), chunk)
    path.after_dispatch(received, chunk)  # type: ignore[arg-type]
    assert stages.calls == [*held, ("update", chunk.first, chunk.last), ("release",)]


@pytest.mark.parametrize("few", [0, 4096])
def test_many_ids_are_counted_behind_the_dispatch(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_layer, "_FEW", few)
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
    work = [kind for kind, stream, _ in sink.records if stream != HOST]
    wanted = [Kind.ROUTE, Kind.VOTE, Kind.LOAD_UPDATE, Kind.DISPATCH]
    if not few:
        wanted = [Kind.ROUTE, Kind.DISPATCH, Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, Kind.VOTE, Kind.LOAD_UPDATE]
    assert [kind for kind in work if kind in {*wanted, Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS}] == wanted

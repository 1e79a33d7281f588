"""When statistics reach the balancer, and which of them wait for the experts."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, MoeLoadBalancerIterContext, resident_layer
from moe_eplb.balancer.resident_layer import ResidentLayer
from moe_eplb.core.events import HOST, Kind, NullSink
from moe_eplb.device import AuxStreamType, get_device
from moe_eplb.device.ops import plain
from moe_eplb.moe.chunking import Chunk
from moe_eplb.moe.statistics_path import make_path
from tests.moe.test_wide_ep import _layer, _step
from tests.support.moe_layers import ListSink
from tests.support.ranks import run_ranks


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
        (Chunk(slice(0, 2), 0, first=True, last=True), [("hold",)]),  # of which all ranks know as much
        (Chunk(slice(0, 2), 0, first=True, last=False, tokens=(2, 9, 0)), []),
        (Chunk(slice(2, 4), 1, first=False, last=True, tokens=(2, 9, 0)), []),
    ],
)
def test_statistics_of_a_whole_forward_are_held(chunk: Chunk, held: list[tuple[Any, ...]]) -> None:
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
    late = [*count, Kind.LOAD_UPDATE]
    if known and not few:
        wanted = [Kind.ROUTE, Kind.DISPATCH, Kind.EXPERTS, *late]
    else:
        wanted = [*(late if not few else []), Kind.ROUTE, *(late if few else []), Kind.DISPATCH, Kind.EXPERTS]
    watched = {Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS, Kind.VOTE, *wanted}
    assert [kind for kind, stream, _ in sink.records if stream != HOST and kind in watched] == wanted


def test_what_follows_a_mark_in_the_middle_of_work_does_not_come_after_it() -> None:
    """Else a hand-over that forgot to wait for the experts would look as if it had."""
    for within in (True, False):
        marks = Unordered()
        device = get_device("cpu", marks, check_order=True)
        aux, event = device.stream(AuxStreamType.MoeBalancer), device.new_event()
        device.submit(device.main, Kind.START_WAIT_GPU_STAGE, 0, lambda: None)
        device.run(Kind.EXPERTS, 0, partial(device.record, event, device.main, within=within))
        device.wait(aux, event)
        device.submit(aux, Kind.START_SET_CPU_STAGE, 0, lambda: None)
        assert marks.found == ([Kind.START_SET_CPU_STAGE] if within else [])


def test_a_layer_may_mark_in_front_of_the_copying_of_rows_and_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_layer, "_FEW", 0)
    device = get_device("cpu", NullSink())
    balancer = MoeLoadBalancer(0, 1, 1, device=device, options=BalancerOptions(resident=True, commit_delay=2))
    with balancer:
        moe = _layer(device, dispatch="allgather", statistics="local_ids")
    balancer.finalize_model()
    seen: list[str] = []

    def noted(owner: Any, name: str) -> None:
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **options: (seen.append(name), call(*given, **options))[1])

    noted(plain, "permute")
    noted(plain, "_sources")
    noted(moe.experts, "grouped_ffn")
    layer = moe.layer_load_balancer
    monkeypatch.setattr(layer, "mark_statistics", lambda *, grouped: seen.append(f"grouped={grouped}"))
    release = ResidentLayer.release_statistics
    monkeypatch.setattr(
        layer,
        "release_statistics",
        lambda: (seen.append("release") if layer._held else None, release(layer))[1],  # type: ignore[arg-type, union-attr]
    )
    try:
        with MoeLoadBalancerIterContext(balancer, True, True):
            _step(moe, 0, 4, 0, [4])
    finally:
        balancer.shutdown()
    assert seen == ["permute", "_sources", "grouped=False", "grouped=True", "grouped_ffn", "release"]


def _one_rank_tells(rank: int, size: int, dispatch: str, seed: int | None) -> list[list[int]]:
    """Placements after iterations of which only rank 0 tells how many tokens each rank has."""
    device = get_device("cpu", NullSink(), seed=seed, rank=rank)
    groups = [dist.new_group(list(range(size))) for _ in range(3)]
    balancer = MoeLoadBalancer(
        rank, size, 2, device=device, group=groups[0], options=BalancerOptions(resident=True, commit_delay=2)
    )
    with balancer:
        layers = [
            _layer(
                device, layer, num_slots=8, dispatch=dispatch, statistics="local_ids", ep_group=groups[1],
                statistics_group=groups[2],
            ) for layer in range(2)
        ]  # fmt: skip
    balancer.finalize_model()
    try:
        for iteration in range(6):
            with MoeLoadBalancerIterContext(balancer, True, True):
                for moe in layers:
                    assert _step(moe, rank, 12, iteration, [12, 12] if rank == 0 else None).error <= 1e-5
        return [layer.placement.slot_to_expert.tolist() for layer in balancer.layers]
    finally:
        balancer.shutdown()


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dispatch", ["alltoall", "allgather"])
def test_ranks_that_tell_more_and_less_make_the_same_collectives(dispatch: str, seed: int | None) -> None:
    first, second = run_ranks(_one_rank_tells, 2, dispatch, seed)
    assert first == second

"""The balancer whose state lives on the device, held against the one whose state lives on the host, its slow twin."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, cells, resident_update
from moe_eplb.balancer import resident_layer as resident_layer_module
from moe_eplb.balancer.cells import assign_cells
from moe_eplb.balancer.layer_stream import LayerStream
from moe_eplb.balancer.resident_layer import ResidentLayer
from moe_eplb.core import planner as planner_module
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, KINDS, Kind, NullSink
from moe_eplb.core.planner import Plan
from moe_eplb.device import AuxStreamType, CpuDevice, Stream
from moe_eplb.device.control import Stage
from moe_eplb.device.order import StreamOrder
from tests.balancer.test_iter_context import STEPS, Fault, fail_at, raise_in
from tests.session.planted.planted_bugs import unfollowed
from tests.support.balanced import Rig, ids_of
from tests.support.ranks import run_ranks

TIMEOUT_S = 0.3


def resident(**options: Any) -> Rig:
    return Rig(resident=True, **options)


def resident_layer(rig: Rig, index: int) -> ResidentLayer:
    layer = rig.layers[index]
    assert isinstance(layer, ResidentLayer)
    return layer


@pytest.fixture
def rigs() -> Any:
    made: list[Rig] = []

    def make(**options: Any) -> tuple[Rig, Rig]:
        made.extend((Rig(**options), resident(**options)))
        return made[-2], made[-1]

    yield make
    for rig in made:
        rig.balancer.shutdown()


# -- twins -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 2},
        {"layers": 3, "updates": 2},
        {"layers": 4, "updates": 4, "experts": 8, "slots_per_rank": 11},
        {"layers": 3, "updates": 1, "ranks": 4, "rank": 2, "experts": 8, "slots_per_rank": 3},
        {"layers": 2, "updates": 2, "commit_delay": 3},
        {"layers": 1, "updates": 1, "commit_delay": 2},
        {"layers": 3, "updates": 3, "window": 3, "decay": 0.5},
    ],
    ids=["two", "groups", "all", "ranks", "delay", "one", "window"],
)
def test_both_do_the_same_in_every_iteration(rigs: Any, options: dict[str, Any], seed: int | None) -> None:
    host, device = rigs(seed=seed, **options)
    for _ in range(14):
        assert device.iterate() == host.iterate()
        assert device.placements() == host.placements()
        device.assert_weights_match()
    assert device.journal.commits == host.journal.commits
    assert device.journal.loads == host.journal.loads
    assert device.journal.drops == host.journal.drops == []
    assert len(device.journal.commits) >= 4


def run_ranks_with(rank: int, size: int, on_device: bool) -> list[Any]:
    import torch.distributed as dist

    from moe_eplb.balancer import AllReduce

    setup, statistics = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    rig = Rig(3, 8, updates=2, rank=rank, ranks=size, group=setup, slots_per_rank=5, seed=3, resident=on_device)
    chosen = []
    for _ in range(10):
        chosen.append(rig.iterate(allreduce=AllReduce(statistics)))
        rig.assert_weights_match()
    rig.balancer.shutdown()
    return [chosen, rig.journal.commits, rig.journal.placements]


def test_real_ranks_do_the_same_too() -> None:
    assert run_ranks(run_ranks_with, 2, True) == run_ranks(run_ranks_with, 2, False)


def test_what_a_device_does_behind_a_host_that_runs_ahead_is_noted_once_it_is_certain(
    rigs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, device = rigs(layers=3, updates=3)
    ahead = device.balancer.options.run_ahead
    monkeypatch.setattr(device.balancer.device, "immediate", False)  # as on a GPU: nobody looks at the end of a stage
    seen: list[tuple[int, int]] = []
    collect = ResidentLayer.collect

    def noted(layer: ResidentLayer, iteration: int) -> None:
        seen.append((device.balancer.iter_id, iteration))
        collect(layer, iteration)

    monkeypatch.setattr(ResidentLayer, "collect", noted)
    for _ in range(20):
        assert device.iterate() == host.iterate()
    assert seen
    assert all(due < now - ahead for now, due in seen), "the device may be in the middle of that iteration"
    device.balancer.collect()
    assert {commit[:2] for commit in device.journal.commits} == {commit[:2] for commit in host.journal.commits}
    assert device.placements() == host.placements()
    assert device.journal.drops == []


# -- counting where ids are routed -----------------------------------------------------------------------------------


class Marks(NullSink):
    """Keeps the kinds of work that did not wait, and how often each kind was recorded on a device."""

    def __init__(self) -> None:
        self.unordered: list[Kind] = []
        self.work: Counter[Kind] = Counter()

    def mark(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> None:
        if kind is Kind.UNORDERED:
            self.unordered.append(Kind(a))

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        self.work[kind] += stream < HOST
        return 0


def counted(rig: Rig, layer: int = 0) -> list[int]:
    return resident_layer(rig, layer).state.reduced.tolist()


def histogram(*ids: Tensor, experts: int) -> list[int]:
    return torch.bincount(torch.cat([part.flatten() for part in ids]), minlength=experts).tolist()


@pytest.mark.parametrize("few", [True, False])
def test_few_ids_are_counted_where_they_are_routed(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_layer_module, "_FEW", 10**6 if few else 0)
    marks = Marks()
    rig = resident(layers=2, seed=1, sink=marks, check_order=True)
    try:
        rig.iterate(5)
        assert counted(rig) == histogram(rig.ids(0, 4), experts=rig.experts)
        assert marks.work[Kind.UPDATE_STATISTIC_WITH_LOCAL_IDS] == (0 if few else 10)
        assert marks.unordered == []
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize(("ranks", "vote"), [(1, Kind.LOAD_UPDATE), (2, Kind.VOTE)])
def test_a_vote_that_does_not_wait_for_the_route_is_seen(
    ranks: int, vote: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = Marks()
    rig = resident(layers=2, ranks=ranks, seed=1, sink=marks, check_order=True)
    monkeypatch.setattr(ResidentLayer, "_route", unfollowed(ResidentLayer._route))
    try:
        rig.iterate()
        assert marks.unordered == [vote, vote]
    finally:
        rig.balancer.shutdown()


def test_an_iteration_that_was_aborted_before_its_first_layer_is_over_for_the_device_too() -> None:
    host, device = Rig(layers=2, updates=2, commit_delay=2), resident(layers=2, updates=2, commit_delay=2)
    try:
        for rig in (host, device):
            rig.iterate(3)
            rig.balancer.start_iter()
            rig.balancer.abort_iter()
            rig.balancer.start_iter()
            rig.run_layer(0)
            rig.balancer.abort_iter()
            rig.iterate(4)
            rig.assert_weights_match()
        assert int(resident_layer(device, 0).resident.model.turn[0]) == 8
        assert device.placements() == host.placements()
        assert [commit[2] for commit in device.journal.commits] == [commit[2] for commit in host.journal.commits]
        assert max(commit[2] for commit in device.journal.commits) > 6
    finally:
        host.balancer.shutdown()
        device.balancer.shutdown()


# -- statistics that wait for the dispatch ---------------------------------------------------------------------------


class Submitted(NullSink):
    """Keeps what began on the host and on streams, in order."""

    def __init__(self) -> None:
        self.kinds: list[Kind] = []

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        self.kinds.append(kind)
        return 0


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("holds", [False, True])
def test_ids_are_summed_where_they_are_released(holds: bool, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_layer_module, "_FEW", few)
    sink = Submitted()
    rig = resident(layers=1, ranks=2, commit_delay=2, sink=sink, holds=holds)
    try:
        rig.iterate(2)
        sink.kinds.clear()
        rig.iterate()
        work = (Kind.VOTE, Kind.STATISTIC_REDUCE, Kind.LOAD_UPDATE)
        assert [kind for kind in sink.kinds if kind in work] == list(work)
        last_route = len(sink.kinds) - 1 - sink.kinds[::-1].index(Kind.ROUTE)
        assert (sink.kinds.index(Kind.VOTE) > last_route) == (holds or few > 0)
        assert counted(rig) == [
            mine + others for mine, others in zip(
                histogram(rig.ids(0, 2), experts=rig.experts), rig.others(0, 2).tolist(), strict=True
            )
        ]  # fmt: skip
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("reduction", ["layer", "iteration"])
@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_held_statistics_change_no_placement(
    rigs: Any, reduction: str, seed: int | None, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_layer_module, "_FEW", few)
    delay = 2 if reduction == "iteration" else 1
    host, device = rigs(layers=3, updates=3, commit_delay=delay, seed=seed)
    held = resident(layers=3, updates=3, commit_delay=delay, reduction=reduction, seed=seed, holds=True)
    try:
        for _ in range(10):
            assert held.iterate() == device.iterate() == host.iterate()
            held.assert_weights_match()
        assert held.placements() == host.placements()
        assert len(held.journal.commits) > 10
    finally:
        held.balancer.shutdown()


@pytest.mark.parametrize("few", [0, 10**6])
def test_held_statistics_that_nobody_releases_go_with_the_hand_over(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_layer_module, "_FEW", few)
    rig = resident(layers=1, commit_delay=2, holds=True, check_order=True, sink=(marks := Marks()))
    try:
        rig.balancer.start_iter()
        with monkeypatch.context() as patch:
            patch.setattr(ResidentLayer, "release_statistics", lambda self: None)
            rig.run_layer(0, on_held=patch.undo)
        rig.balancer.end_iter()
        assert counted(rig) == histogram(rig.ids(0, 0), experts=rig.experts)
        assert marks.unordered == []
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_held_statistics_come_after_the_route_and_beside_the_experts(
    few: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_layer_module, "_FEW", few)
    rig = resident(layers=1, ranks=ranks, commit_delay=2, seed=1, holds=True, check_order=True, sink=(marks := Marks()))
    try:
        rig.iterate(3)
        assert marks.unordered == []
        # A hand-over that forgets to wait for the experts is seen: what is held has not waited for them.
        rig.balancer.start_iter()
        with monkeypatch.context() as patch:
            rig.run_layer(0, on_held=lambda: patch.setattr(LayerStream, "_follow", lambda self, stream: None))
        rig.balancer.end_iter()
        assert marks.unordered == [Kind.START_SET_CPU_STAGE]
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("few", [0, 10**6])
@pytest.mark.parametrize("ranks", [1, 2])
def test_few_ids_are_held_until_the_products_by_several_ranks_only_and_all_else_until_the_grouping(
    few: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_layer_module, "_FEW", few)
    rig, asked, seen = resident(layers=1, ranks=ranks, commit_delay=2, holds=True), list[bool](), list[bool]()
    mark = ResidentLayer.mark_statistics
    monkeypatch.setattr(
        ResidentLayer, "mark_statistics", lambda self, *, grouped: (asked.append(grouped), mark(self, grouped=grouped))
    )
    monkeypatch.setattr(LayerStream, "mark_within", lambda self: seen.append(asked[-1]))
    try:
        rig.iterate(2)
        assert seen == ([] if few and ranks == 1 else [few > 0] * 2)
    finally:
        rig.balancer.shutdown()


def fail() -> None:
    raise Fault


def with_one_queue(**options: Any) -> Rig:
    rig = resident(**options)
    rig.share_queue()
    return rig


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("reduction", ["layer", "iteration"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_layers_behind_the_first_are_taken_over_beside_the_experts_of_the_one_before(
    seed: int | None, shared: bool, later: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they share its queue, and where an exception discards nothing of what is enqueued."""
    options: dict[str, Any] = {"layers": 3, "updates": 3, "commit_delay": 3, "reduction": reduction, "seed": seed}
    rig = resident(**options, check_order=True, sink=(marks := Marks()))
    names = {Kind.START_WAIT_GPU_STAGE: "take", Kind.START_SET_CPU_STAGE: "hand"}
    seen, submit = list[str](), CpuDevice.submit

    def watch(self: CpuDevice, stream: Stream, kind: Kind, layer: int, *rest: Any, **options: Any) -> None:
        seen.extend([f"{names[kind]} {layer}"] if kind in names else [])
        submit(self, stream, kind, layer, *rest, **options)

    monkeypatch.setattr(CpuDevice, "submit", watch)
    monkeypatch.setattr(rig.balancer.device, "immediate", not later)
    if shared:
        rig.share_queue()
    early = ["take 0", "take 1", "hand 0", "take 2", "hand 1", "hand 2"]
    plain = ["take 0", "hand 0", "take 1", "hand 1", "take 2", "hand 2"]
    try:
        rig.iterate(6)
        assert seen == (early if shared and later else plain) * 6
        assert marks.unordered == []
        rig.balancer.device.synchronize()
        rig.balancer.collect()
        rig.assert_weights_match()
        assert rig.journal.commits
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("later", [False, True])
def test_the_models_next_work_is_enqueued_before_a_stage_and_not_waited_for(
    later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph's node that waits for the same as another goes on in the same queue if it is captured first."""
    rig = with_one_queue(updates=2, commit_delay=2, check_order=True, sink=(marks := Marks()))
    device, seen = rig.balancer.device, list[tuple[Any, ...]]()
    monkeypatch.setattr(device, "immediate", not later)
    work = StreamOrder.work

    def watch(order: StreamOrder, stream: Stream, kind: Kind, layer: int, a: int = 0) -> Any:
        found = work(order, stream, kind, layer, a)
        if kind in (Kind.START_WAIT_GPU_STAGE, Kind.START_SET_CPU_STAGE):
            seen.append((KINDS[kind].name, layer, order.mark(stream).get(device.main, 0)))
        elif kind in (Kind.TOPK, Kind.COMBINE):
            seen.append((KINDS[kind].name, layer))
        return found

    monkeypatch.setattr(StreamOrder, "work", watch)
    try:
        rig.balancer.start_iter()
        for index, layer in enumerate(rig.layers):
            layer.start_wait_gpu_stage()
            device.run(Kind.TOPK, index, lambda: None)
            layer.done_wait_gpu_stage()
            ids = rig.ids(index, 0)
            layer.update_statistic_with_local_ids(ids, True, True)
            layer.route(ids)
            device.run(Kind.EXPERTS, index, lambda: None)
            layer.start_set_cpu_stage()
            device.run(Kind.COMBINE, index, lambda: None)
            layer.done_set_cpu_stage()
        # With each stage, how many pieces of the model's work it waits for: four a layer.
        begin, end = "start_wait_gpu_stage", "start_set_cpu_stage"
        of_second = [("topk", 1)] if later else [("topk", 1), (begin, 1, 4)]
        early = [(begin, 1, 2)] if later else []
        assert seen == [
            ("topk", 0), (begin, 0, 0), *early, ("combine", 0), (end, 0, 3), *of_second, ("combine", 1), (end, 1, 7)
        ]  # fmt: skip
        assert marks.unordered == []
    finally:
        rig.balancer.abort_iter()
        rig.balancer.shutdown()


def test_a_layer_that_is_read_before_the_end_of_the_one_that_took_it_over_joins_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = with_one_queue(updates=2, commit_delay=2, check_order=True, sink=(marks := Marks()))
    monkeypatch.setattr(rig.balancer.device, "immediate", False)

    def compute(index: int) -> None:
        layer, ids = rig.layers[index], rig.ids(index, 0)
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        layer.update_statistic_with_local_ids(ids, True, True)
        layer.route(ids)
        rig.balancer.device.run(Kind.EXPERTS, index, lambda: None)
        layer.start_set_cpu_stage()

    try:
        for _ in range(4):
            rig.balancer.start_iter()
            compute(0)
            compute(1)
            for layer in rig.layers:
                layer.done_set_cpu_stage()
            rig.balancer.end_iter()
        assert marks.unordered == []
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("ends_on", ["main", "other"])
@pytest.mark.parametrize("routes_on", ["main", "other"])
def test_streams_that_have_not_joined_the_layer_before_join_one_that_was_taken_over_early(
    ends_on: str, routes_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = with_one_queue(updates=2, commit_delay=2, check_order=True, sink=(marks := Marks()))
    device, joins = rig.balancer.device, list[tuple[int, str]]()
    streams = {"main": device.main, "other": device.stream(AuxStreamType.MoeChunkingOverlap)}
    monkeypatch.setattr(device, "immediate", False)
    join = LayerStream.join

    def watch(self: LayerStream) -> None:
        joins.append((self._layer, next(name for name, one in streams.items() if one is device.current)))
        join(self)

    try:
        rig.balancer.start_iter()
        with device.use(streams[ends_on]):
            rig.run_layer(0)
        layer, ids = rig.layers[1], rig.ids(1, 0)
        monkeypatch.setattr(LayerStream, "join", watch)
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        layer.update_statistic_with_local_ids(ids, True, True)
        with device.use(streams[routes_on]):
            layer.route(ids)
        assert marks.unordered == []
        assert joins == [(1, "main")] * (ends_on == "other") + [(1, "other")] * (routes_on == "other")
    finally:
        rig.balancer.abort_iter()
        rig.balancer.shutdown()


@pytest.mark.parametrize("turns", ["0101", "0110", "0011"])
@pytest.mark.parametrize("later", [False, True])
def test_layers_that_are_repeated_in_turns_count_all_their_forwards(
    turns: str, later: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second has begun, taken over by itself, before the first ends, the first does not take it over.

    Nor does the first's vote on its plan come in time then, which is told.
    """
    rig = with_one_queue(updates=2, commit_delay=2, check_order=True, sink=(marks := Marks()))
    monkeypatch.setattr(rig.balancer.device, "immediate", not later)
    ids = [rig.ids(0, forward) for forward in range(4)]
    try:
        for _ in range(6):
            rig.balancer.start_iter()
            for forward, index in enumerate(map(int, turns)):
                layer, first, last = rig.layers[index], str(index) not in turns[:forward], turns.rindex(str(index))
                if first:
                    layer.start_wait_gpu_stage()
                    layer.done_wait_gpu_stage()
                layer.update_statistic_with_local_ids(ids[forward], first, forward == last)
                layer.route(ids[forward])
                if forward == last:
                    layer.start_set_cpu_stage()
                    layer.done_set_cpu_stage()
            rig.balancer.end_iter()
        rig.balancer.collect()
        for index in range(2):
            mine = [one for one, turn in zip(ids, turns, strict=True) if int(turn) == index]
            assert resident_layer(rig, index).state.reduced.tolist() == histogram(*mine, experts=rig.experts)
        assert {layer for layer, *_ in rig.journal.commits} == ({0, 1} if turns == "0011" else {0})
        assert {layer for layer, *_ in rig.journal.drops} == (set() if turns == "0011" else {1})
        assert marks.unordered == []
        rig.assert_weights_match()
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("handed", [True, False])
@pytest.mark.parametrize("ran", [1, 2])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_an_abort_commits_the_same_on_either_side_of_an_early_take_over(
    seed: int | None, ran: int, handed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may fail before the hand-over of a layer, and another one behind it."""
    rig = with_one_queue(layers=3, updates=3, commit_delay=2, ranks=2, empty_group="never", seed=seed)
    monkeypatch.setattr(rig.balancer.device, "immediate", False)
    monkeypatch.setattr(rig.balancer.device, "discard", rig.balancer.device.synchronize)
    try:
        rig.iterate(2)
        last = partial(rig.run_layer, ran - 1, on_held=(lambda: None) if handed else fail)
        with pytest.raises(Fault):
            raise_in(rig, *(partial(rig.run_layer, index) for index in range(ran - 1)), last)
        rig.assert_weights_match()
        assert rig.journal.commits == [(layer, 0, 2) for layer in range(ran + 1)]
        rig.iterate(3)
        rig.balancer.collect()
        rig.assert_weights_match()
        assert len(rig.journal.commits) > 3
    finally:
        rig.balancer.shutdown()


def test_a_held_vote_that_does_not_wait_for_the_mark_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerStream, "follow_mark", lambda self: None)
    rig = resident(layers=1, ranks=2, commit_delay=2, seed=1, holds=True, check_order=True, sink=(marks := Marks()))
    try:
        rig.iterate()
        assert marks.unordered == [Kind.VOTE]
    finally:
        rig.balancer.shutdown()


def test_a_second_hold_keeps_what_is_held_and_other_paths_are_not_held() -> None:
    rig = resident(layers=1, commit_delay=2)
    layer, ids = rig.layers[0], rig.ids(0, 0)
    try:
        for path in ("local", "global"):
            rig.balancer.start_iter()
            layer.start_wait_gpu_stage()
            layer.done_wait_gpu_stage()
            layer.hold_statistics()
            if path == "local":
                layer.update_statistic_with_local_ids(ids, True, True)
            else:
                layer.update_statistic_with_global_ids(ids, True, True)
            layer.hold_statistics()
            layer.route(ids)
            layer.release_statistics()
            layer.start_set_cpu_stage()
            layer.done_set_cpu_stage()
            rig.balancer.end_iter()
            assert counted(rig) == histogram(ids, experts=rig.experts)
            resident_layer(rig, 0).state.reduced.zero_()
    finally:
        rig.balancer.shutdown()


def test_a_mark_of_an_aborted_iteration_is_forgotten() -> None:
    rig = resident(layers=1, commit_delay=2, seed=1, check_order=True, sink=(marks := Marks()))
    layer = rig.layers[0]

    def until_the_vote(marked: bool) -> None:
        rig.balancer.start_iter()
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        layer.hold_statistics()
        layer.update_statistic_with_local_ids(ids := rig.ids(0, 0), True, True)
        layer.route(ids)
        if marked:
            rig.balancer.device.run(Kind.EXPERTS, 0, partial(layer.mark_statistics, grouped=True))

    try:
        until_the_vote(marked=True)
        rig.balancer.abort_iter()
        until_the_vote(marked=False)
        layer.release_statistics()
        layer.start_set_cpu_stage()
        layer.done_set_cpu_stage()
        rig.balancer.end_iter()
        assert marks.unordered == []
    finally:
        rig.balancer.shutdown()


def test_an_iteration_of_which_nothing_was_launched_is_told() -> None:
    rig = resident(layers=2, updates=2, commit_delay=2)
    try:
        rig.iterate(2)
        rig.balancer.start_iter()
        with rig.balancer.replaying():
            pass  # a graph should have been replayed here
        rig.balancer.end_iter()
        with pytest.raises(BalancerError, match=r"E218(.|\n)*iteration 1 last(.|\n)*iteration 2 is over"):
            rig.balancer.start_iter()
        rig.iterate(5)
        assert max(commit[2] for commit in rig.journal.commits) > 6, "it goes on"
    finally:
        rig.balancer.shutdown()


def test_held_statistics_of_an_aborted_iteration_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_layer_module, "_FEW", 0)
    rig = resident(layers=1, commit_delay=2, holds=True)
    layer = rig.layers[0]
    try:
        rig.balancer.start_iter()
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        layer.hold_statistics()
        layer.update_statistic_with_local_ids(rig.ids(0, 0), True, True)
        rig.balancer.abort_iter()
        layer.release_statistics()
        rig.iterate()
        assert counted(rig) == histogram(rig.ids(0, rig.balancer.iter_id - 1), experts=rig.experts)
    finally:
        rig.balancer.shutdown()


# -- ids that are not routed, or not to the end ----------------------------------------------------------------------


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("routed", ["none", "copies", "first", "last", "both"])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_ids_that_are_not_routed_are_counted_all_the_same(
    routed: str, seed: int | None, parts: int, holds: bool
) -> None:
    rig = resident(layers=1, seed=seed, commit_delay=2)
    layer, ids = rig.layers[0], [rig.ids(0, iteration) for iteration in range(parts)]
    try:
        for _ in range(2):
            rig.balancer.start_iter()
            layer.start_wait_gpu_stage()
            layer.done_wait_gpu_stage()
            if holds:
                layer.hold_statistics()
            for index, part in enumerate(ids):
                layer.update_statistic_with_local_ids(part, index == 0, index == parts - 1)
                if routed == "copies":
                    layer.route(part.clone())
                elif routed == "both" or routed == ("first", "last")[index]:
                    layer.route(part)
            if holds:
                layer.release_statistics()
            layer.start_set_cpu_stage()
            layer.done_set_cpu_stage()
            rig.balancer.end_iter()
            assert counted(rig) == histogram(*ids, experts=rig.experts)
    finally:
        rig.balancer.shutdown()


def test_ids_of_an_aborted_iteration_are_not_counted_in_the_next() -> None:
    rig = resident(layers=1, commit_delay=2)
    layer = rig.layers[0]
    try:
        rig.balancer.start_iter()
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        layer.update_statistic_with_local_ids(rig.ids(0, 0), True, True)
        rig.balancer.abort_iter()
        rig.iterate()
        assert counted(rig) == histogram(rig.ids(0, rig.balancer.iter_id - 1), experts=rig.experts)
    finally:
        rig.balancer.shutdown()


# -- weights ---------------------------------------------------------------------------------------------------------


def test_no_cell_that_is_in_use_is_ever_written(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, device = rigs(layers=3, updates=3, experts=8, slots_per_rank=11)
    written: list[int] = []
    write = cells.CellWeights.write

    def watched(self: cells.CellWeights, slot: int, cell: int, *rest: Any) -> Any:
        written.append(cell)
        assert cell not in self.table.tolist()
        return write(self, slot, cell, *rest)

    monkeypatch.setattr(cells.CellWeights, "write", watched)
    device.iterate(20)
    assert len(written) > 50
    assert max(written) >= 11, "spare cells came into use"


def test_few_spare_slots_take_more_plans_to_get_there(rigs: Any) -> None:
    host, device = rigs(layers=2, updates=2, experts=8, slots_per_rank=11, spare_slots=1)
    for _ in range(12):
        before = device.placements()
        assert device.iterate() == host.iterate()
        assert device.placements() == host.placements()
        for old, new in zip(before, device.placements(), strict=True):
            assert sum(a != b for a, b in zip(old, new, strict=True)) <= 1
        device.assert_weights_match()
    assert len(device.journal.commits) > 10
    assert device.storage[0].shape[0] == 12


def test_more_changes_than_cells_are_refused() -> None:
    rig = resident(layers=2, experts=8, slots_per_rank=11, spare_slots=1)
    try:
        weights = resident_layer(rig, 0).cells
        with pytest.raises(BalancerError, match="E172"):
            assign_cells(rig.cells[0].numpy()[None], np.array([0, 1]), len(weights.cells), layer=0, first_rank=0)
    finally:
        rig.balancer.shutdown()


def test_a_layer_without_cells_is_refused() -> None:
    balancer = MoeLoadBalancer(0, 1, 1, options=BalancerOptions(resident=True, commit_delay=2))
    layer = balancer.add_layer(2, 1, 2)
    weight = torch.zeros(2, 3, 4)
    for expert in range(2):
        layer.register_weight_slot(expert, "w", weight[expert])
        layer.share_expert_weight(expert, "w", weight[expert])
    with pytest.raises(BalancerError, match="no cells"):
        balancer.finalize_model()
    balancer.shutdown()


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_late_updater_costs_one_wait_and_the_placement_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = resident(layers=2, updates=2, update_timeout_s=TIMEOUT_S)
    release, plan = threading.Event(), planner_module.plan

    def late(*arguments: Any, **options: Any) -> Plan:
        release.wait(20)
        return plan(*arguments, **options)

    try:
        rig.iterate(4)
        commits, before = len(rig.journal.commits), rig.placements()
        monkeypatch.setattr(planner_module, "plan", late)
        begun = time.monotonic()
        rig.iterate(40)
        # One wait; each of the forty plans waited for would take twelve seconds.
        assert TIMEOUT_S <= time.monotonic() - begun < 20 * TIMEOUT_S
        assert len(rig.journal.commits) <= commits + 2  # those that were planned before
        held = rig.placements()
        release.set()
        monkeypatch.setattr(planner_module, "plan", plan)
        time.sleep(0.2)
        rig.iterate(8)
        assert rig.placements() != held != before or rig.placements() != before
        assert len(rig.journal.commits) > commits + 2
        rig.assert_weights_match()
        assert "is not ready" in caplog.text
    finally:
        release.set()
        rig.balancer.shutdown()


def test_a_layer_whose_updates_were_all_too_late_still_knows_which_cells_are_in_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its last plan was committed long before the updater comes back to it."""
    rig = resident(layers=2, updates=2, empty_group="never", update_timeout_s=TIMEOUT_S)
    release, plan = threading.Event(), planner_module.plan

    def late(*arguments: Any, **options: Any) -> Plan:
        release.wait(20)
        return plan(*arguments, **options)

    try:
        rig.iterate(6)
        monkeypatch.setattr(planner_module, "plan", late)
        rig.iterate(30)  # far more iterations than reports are kept for
        monkeypatch.setattr(planner_module, "plan", plan)
        release.set()
        for _ in range(12):
            time.sleep(0.02)
            rig.iterate()
            rig.assert_weights_match()
    finally:
        release.set()
        rig.balancer.shutdown()


def test_a_plan_that_fails_is_dropped_without_a_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = resident(layers=2, updates=2, update_timeout_s=20.0)
    try:
        before = rig.placements()

        def fail(*_: Any, **__: Any) -> Plan:
            raise ValueError("no plan today")

        monkeypatch.setattr(planner_module, "plan", fail)
        begun = time.monotonic()
        rig.iterate(5)
        assert time.monotonic() - begun < 10
        assert rig.placements() == before
        assert "no plan today" in caplog.text
        assert {reason for _, _, reason in rig.journal.drops} == {"the ranks did not agree on the plan"}
    finally:
        rig.balancer.shutdown()


def test_a_killed_updater_leaves_a_model_that_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = resident(layers=2, updates=2, update_timeout_s=TIMEOUT_S)

    def die(*_: Any, **__: Any) -> Plan:
        raise SystemExit

    monkeypatch.setattr(planner_module, "plan", die)
    try:
        before = rig.placements()
        begun = time.monotonic()
        rig.iterate(60)
        assert time.monotonic() - begun < 20 * TIMEOUT_S
        assert rig.placements() == before
        assert len(rig.journal.drops) > 10
        assert "the updater is dead" in caplog.text
        rig.assert_weights_match()
    finally:
        rig.balancer.shutdown()


def test_ranks_that_differ_drop_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = resident(layers=2, updates=2, ranks=2, experts=8, slots_per_rank=5)

    class Contrary:
        def __call__(self, tensor: Tensor) -> None:
            lanes = tensor[rig.experts :]
            if int(lanes[0]):
                lanes += torch.tensor([1, 7, 49, 9, 81])

    try:
        before = rig.placements()
        rig.iterate(6, allreduce=Contrary())  # type: ignore[arg-type]
        assert rig.placements() == before
        assert rig.journal.drops
    finally:
        rig.balancer.shutdown()


def test_an_iteration_that_is_aborted_leaves_a_clean_start() -> None:
    rig = resident(layers=3, updates=3)
    try:
        rig.iterate(4)
        placements = rig.placements()
        rig.balancer.start_iter()
        rig.run_layer(0)
        rig.layers[1].start_wait_gpu_stage()
        rig.balancer.abort_iter()
        rig.assert_weights_match()
        assert rig.placements()[2] == placements[2]
        commits = len(rig.journal.commits)
        rig.iterate(6)
        rig.assert_weights_match()
        assert len(rig.journal.commits) > commits
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("delay", [1, 3])
@pytest.mark.parametrize("step", STEPS)
def test_what_an_abort_leaves_does_not_depend_on_how_far_the_streams_were(step: str, delay: int) -> None:
    def run(seed: int | None) -> tuple[object, ...]:
        rig = resident(layers=3, updates=3, empty_group="never", ranks=2, experts=6, seed=seed, commit_delay=delay)
        rig.iterate(2)
        fail_at(rig, step)
        rig.assert_weights_match()
        left = rig.placements(), [resident_layer(rig, index).state.load.tolist() for index in range(3)]
        rig.iterate(3)
        rig.assert_weights_match()
        rig.balancer.shutdown()
        return left, rig.placements(), rig.journal.commits

    expected = run(None)
    for seed in range(6):
        assert run(seed) == expected


def test_a_count_beyond_int32_stops_the_model() -> None:
    rig = resident(layers=2)
    try:
        rig.iterate(2)
        rig.balancer.start_iter()
        layer = resident_layer(rig, 0)
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        ids = ids_of(0, 2, rig.experts, rig.top_k, tokens=rig.tokens)
        layer.update_local_statistic(ids, True, False)
        layer.state.counts.fill_(2**31 - 1)
        layer.update_local_statistic(ids, False, True)
        layer.get_local_statistic_tensor()
        layer.get_agreement_lanes()
        rig.balancer.abort_iter()
        with pytest.raises(BalancerError, match="E134") as caught:
            rig.balancer.start_iter()
        assert "layer 0" in str(caught.value)
    finally:
        rig.balancer.shutdown()


# -- evidence --------------------------------------------------------------------------------------------------------


def test_the_device_writes_down_what_it_did_in_which_iteration() -> None:
    rig = resident(layers=3)
    try:
        for iteration in range(5):
            rig.iterate()
            stages = resident_layer(rig, 0).resident.model.stages
            assert stages.tolist() == [[iteration] * len(Stage)] * 3
    finally:
        rig.balancer.shutdown()


def test_the_publisher_waits_for_its_own_copies_before_it_writes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = resident(layers=1, updates=1, commit_delay=2)
    try:
        publisher = resident_layer(rig, 0)._publisher
        assert isinstance(publisher, resident_update.Publisher)
        done: list[str] = []
        write = resident_update._Sheet.write

        def watched(sheet: resident_update._Sheet, *plan: Any) -> None:
            done.append(f"write {list(names).index(sheet)}")
            write(sheet, *plan)

        monkeypatch.setattr(resident_update._Sheet, "write", watched)
        names = list(publisher._sheets)
        for number, sheet in enumerate(names):
            monkeypatch.setattr(sheet.copier, "wait", lambda number=number: bool(done.append(f"wait {number}")))
        state = resident_layer(rig, 0).state
        tables, cells = np.full(state.tables.numel(), 3, np.int32), np.full(state.cells.numel(), 4, np.int32)
        for due in (5, 6):
            publisher._publish([], tables, cells, (1, 2, 4, 3, 9), due)
            assert int(resident_layer(rig, 0).resident.model.ready[0]) == due
            assert state.pending.tolist() == [*tables, *cells]
            assert state.lanes.tolist() == [1, 2, 4, 3, 9]
        assert done == ["wait 0", "write 0", "wait 1", "write 1"]
    finally:
        rig.balancer.shutdown()


def test_a_bell_that_is_never_rung_is_named(caplog: pytest.LogCaptureFixture) -> None:
    rig = resident(layers=2, update_timeout_s=TIMEOUT_S)
    try:
        with caplog.at_level(logging.ERROR):
            layer = resident_layer(rig, 0)
            layer.expect(0)
            update = layer._flying[1]
            assert update.done.wait(5)
        assert isinstance(update.error, BalancerError)
        assert update.error.code == "E173"
    finally:
        rig.balancer.shutdown()

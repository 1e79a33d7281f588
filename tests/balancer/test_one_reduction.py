"""One reduction an iteration, held against one for each layer: the same loads, plans and placements."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_eplb.balancer import AllReduce, BalancerOptions, MoeLoadBalancer
from moe_eplb.balancer import resident_layer as resident_layer_module
from moe_eplb.balancer.one_reduction import OneReductionLayer
from moe_eplb.core import planner as planner_module
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import ALL_LAYERS, ROUTE_COUNTS, Kind
from moe_eplb.core.planner import Plan
from moe_eplb.device.base import Stream
from moe_eplb.device.control import Stage
from moe_eplb.device.order import StreamOrder
from tests.balancer.test_resident import Marks
from tests.session.planted.planted_bugs import unfollowed
from tests.support.balanced import Rig, StandIn
from tests.support.ranks import run_ranks

TIMEOUT_S = 0.3


def one_reduction(**options: Any) -> Rig:
    return Rig(**{"resident": True, "reduction": "iteration", "commit_delay": 2} | options)


@pytest.fixture
def rigs() -> Any:
    """Makes a balancer with a reduction for each layer, and one with one reduction."""
    made: list[Rig] = []

    def make(**options: Any) -> tuple[Rig, Rig]:
        made.extend((one_reduction(reduction="layer", **options), one_reduction(**options)))
        return made[-2], made[-1]

    yield make
    for rig in made:
        rig.balancer.shutdown()


# -- twins -----------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "two": {"layers": 2},
    "groups": {"layers": 5, "updates": 2},
    "all": {"layers": 4, "updates": 4, "experts": 8, "slots_per_rank": 11, "empty_group": "never"},
    "ranks": {"layers": 3, "updates": 1, "ranks": 4, "rank": 2, "experts": 8, "slots_per_rank": 3},
    "delay": {"layers": 2, "updates": 2, "commit_delay": 5, "empty_group": "never"},
    "one": {"layers": 1, "updates": 1},
    "window": {"layers": 3, "updates": 3, "window": 3, "decay": 0.5},
    "parts": {"layers": 3, "updates": 3, "experts": 8, "slots_per_rank": 11, "spare_slots": 1},
    "incremental": {"layers": 3, "updates": 2, "experts": 12, "slots_per_rank": 14, "policy": "incremental"},
    "robust": {"layers": 3, "updates": 2, "experts": 12, "slots_per_rank": 14, "policy": "robust"},
}


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_both_do_the_same_in_every_iteration(rigs: Any, options: dict[str, Any], seed: int | None) -> None:
    each, all_at_once = rigs(seed=seed, **options)
    for iteration in range(16):
        for rig in (each, all_at_once):
            # Statistics pause, and then so do updates.
            rig.balancer.set_iter_info(iteration not in (5, 6), iteration not in (5, 6, 7))
        assert all_at_once.iterate() == each.iterate()
        assert all_at_once.placements() == each.placements()
        all_at_once.assert_weights_match()
    for name in ("commits", "placements", "loads", "drops"):
        assert getattr(all_at_once.journal, name) == getattr(each.journal, name), name
    assert all_at_once.journal.drops == []
    assert len(all_at_once.journal.commits) >= 3


@pytest.mark.parametrize("few", [True, False])
def test_it_does_not_matter_where_ids_are_counted(few: bool, rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_layer_module, "_FEW", 10**6 if few else 0)
    marks = Marks()
    each, all_at_once = rigs(layers=3, updates=3, seed=1, sink=marks, check_order=True)
    for _ in range(6):
        assert all_at_once.iterate() == each.iterate()
    assert all_at_once.journal.loads == each.journal.loads
    assert marks.unordered == []


def run_ranks_with(rank: int, size: int, reduction: str, source: str) -> list[Any]:
    import torch.distributed as dist

    setup, statistics = dist.new_group(list(range(size))), dist.new_group(list(range(size)))
    rig = one_reduction(
        layers=3, experts=8, updates=2, rank=rank, ranks=size, group=setup, slots_per_rank=5, seed=3,
        reduction=reduction, weights_from=source, empty_group="never",
    )  # fmt: skip
    chosen = []
    for _ in range(12):
        chosen.append((rig.iterate(allreduce=AllReduce(statistics)), rig.placements()))
        rig.assert_weights_match()
    rig.balancer.shutdown()
    return [chosen, rig.journal.commits, rig.journal.placements, rig.journal.loads, rig.journal.drops]


@pytest.mark.parametrize(("ranks", "source"), [(2, "host"), (4, "host"), (2, "peer")])
def test_real_ranks_do_the_same_too(ranks: int, source: str) -> None:
    found = run_ranks(run_ranks_with, ranks, "iteration", source)
    assert found == run_ranks(run_ranks_with, ranks, "layer", source)
    assert all(commits and not drops for _, commits, _, _, drops in found)


def test_one_sum_and_one_vote_are_made_in_an_iteration() -> None:
    marks, sizes = Marks(), list[tuple[int, ...]]()
    rig = one_reduction(layers=4, ranks=2, experts=8, sink=marks)

    class Watched(StandIn):
        def __call__(self, tensor: Tensor) -> None:
            sizes.append(tuple(tensor.shape))
            assert tensor.is_contiguous()
            super().__call__(tensor)

    try:
        rig.iterate(6, allreduce=Watched(2, torch.zeros(4, 8, dtype=torch.int64)))
        assert sizes == [(4, 8 + 5)] * 6
        for kind in (Kind.VOTE, Kind.STATISTIC_REDUCE, Kind.LOAD_UPDATE):
            assert marks.work[kind] == 6
        for kind in (Kind.START_WAIT_GPU_STAGE, Kind.START_SET_CPU_STAGE):
            assert marks.work[kind] == 4 * 6, "each layer still takes over and hands over"
        stages = rig.layers[0].resident.model.stages  # type: ignore[attr-defined]
        assert stages.tolist() == [[5] * len(Stage)] * 4
    finally:
        rig.balancer.shutdown()


def test_a_host_that_runs_ahead_notes_the_same(rigs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    each, all_at_once = rigs(layers=3, updates=3)
    monkeypatch.setattr(all_at_once.balancer.device, "immediate", False)
    for _ in range(20):
        assert all_at_once.iterate() == each.iterate()
    all_at_once.balancer.collect()
    assert {commit[:2] for commit in all_at_once.journal.commits} == {commit[:2] for commit in each.journal.commits}
    assert all_at_once.journal.drops == []


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_late_updater_costs_one_wait_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = one_reduction(layers=4, updates=4, empty_group="never", update_timeout_s=TIMEOUT_S)
    release, plan = threading.Event(), planner_module.plan

    def late(*arguments: Any, **options: Any) -> Plan:
        release.wait(20)
        return plan(*arguments, **options)

    try:
        rig.iterate(4)
        monkeypatch.setattr(planner_module, "plan", late)
        before, begun = len(rig.journal.commits), time.monotonic()
        rig.iterate(30)
        assert TIMEOUT_S <= time.monotonic() - begun < 10 * TIMEOUT_S, "sixty plans are late"
        assert len(rig.journal.drops) > 20
        monkeypatch.setattr(planner_module, "plan", plan)
        release.set()
        time.sleep(0.2)
        rig.iterate(8)
        assert len(rig.journal.commits) > before
        rig.assert_weights_match()
    finally:
        release.set()
        rig.balancer.shutdown()


def test_ranks_that_differ_drop_that_layers_plan_alone() -> None:
    rig = one_reduction(layers=3, updates=3, ranks=2, experts=8, slots_per_rank=5)

    class Contrary(AllReduce):
        def __init__(self) -> None:
            pass

        def __call__(self, tensor: Tensor) -> None:
            tensor[:, 8:] *= 2
            if int(tensor[1, 8]):
                tensor[1, 9:] += torch.tensor([6, 36, 8, 64])

    try:
        rig.iterate(8, allreduce=Contrary())
        assert {layer for layer, *_ in rig.journal.commits} == {0, 2}
        assert {layer for layer, *_ in rig.journal.drops} == {1}
        assert {reason for *_, reason in rig.journal.drops} == {"the ranks did not agree on the plan"}
    finally:
        rig.balancer.shutdown()


class Fault(Exception):
    """What a model might raise."""


STEPS = ["others", "waiting", "held", "counted", "routed", "released", "between"]


def fail_at(rig: Rig, step: str) -> None:
    """An iteration that raises after a step of the last layer's forward."""
    last, iteration = len(rig.layers) - 1, rig.balancer.iter_id
    layer, ids = rig.layers[last], rig.ids(last, iteration)
    stand_in = rig._stand_in(last, iteration)
    calls: dict[str, Callable[[], object]] = {
        "others": lambda: [rig.run_layer(index) for index in range(last)],
        "waiting": layer.start_wait_gpu_stage,
        "held": layer.done_wait_gpu_stage,
        "counted": partial(layer.update_statistic_with_local_ids, ids, True, True, stand_in),
        "routed": partial(layer.route, ids),
        "released": layer.start_set_cpu_stage,
        "between": layer.done_set_cpu_stage,
    }
    rig.balancer.start_iter()
    for name, call in calls.items():
        call()
        if name == step:
            break
    rig.balancer.abort_iter()


@pytest.mark.parametrize("delay", [2, 3])
@pytest.mark.parametrize("step", STEPS)
def test_what_an_abort_leaves_does_not_depend_on_how_far_the_streams_were(step: str, delay: int) -> None:
    def run(seed: int | None) -> tuple[object, ...]:
        rig = one_reduction(layers=3, updates=3, empty_group="never", ranks=2, experts=6, seed=seed, commit_delay=delay)
        rig.iterate(3)
        fail_at(rig, step)
        rig.assert_weights_match()
        left = rig.placements(), [layer.state.load.tolist() for layer in rig.layers]  # type: ignore[attr-defined]
        rig.iterate(delay + 2)
        rig.assert_weights_match()
        rig.balancer.shutdown()
        return left, rig.placements(), rig.journal.commits

    expected = run(None)
    assert expected[2], "something is committed afterwards"
    for seed in range(5):
        assert run(seed) == expected


def test_a_count_beyond_int32_names_its_layer() -> None:
    rig = one_reduction(layers=3)
    try:
        rig.iterate(2)
        rig.balancer.start_iter()
        rig.run_layer(0)
        rig.layers[0]._statistics.counts()[2] = -7
        rig.run_layer(1)
        rig.run_layer(2)
        rig.balancer.end_iter()
        with pytest.raises(BalancerError, match="E134") as caught:
            rig.balancer.start_iter()
        assert "layer 0" in str(caught.value)
    finally:
        rig.balancer.shutdown()


# -- order -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "vote"), [(1, Kind.LOAD_UPDATE), (2, Kind.VOTE)])
def test_a_vote_that_does_not_wait_for_the_last_route_is_seen(
    ranks: int, vote: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks = Marks()
    rig = one_reduction(layers=2, ranks=ranks, seed=1, sink=marks, check_order=True)
    monkeypatch.setattr(OneReductionLayer, "_route", unfollowed(OneReductionLayer._route))
    try:
        rig.iterate()
        assert marks.unordered == [vote], "all others are joined before the last layer begins"
    finally:
        rig.balancer.shutdown()


@pytest.mark.parametrize("flags", [0, ALL_LAYERS])
def test_a_vote_of_all_layers_comes_after_the_counts_of_each(flags: int) -> None:
    order, main, balancer = StreamOrder(), Stream("main", 0), Stream("balancer", 4)
    order.work(main, Kind.ROUTE, 0, ROUTE_COUNTS)
    seen = order.work(balancer, Kind.VOTE, 1, flags)
    assert (seen is not None) == bool(flags)
    assert order.work(balancer, Kind.VOTE, 1, flags) is None, "told once"


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"resident": False}, "resident=True"),
        ({"commit_delay": 1}, "commit_delay=2"),
        ({"overlap": "before"}, "overlap='after'"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_a_way_out(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(BalancerError, match="E208") as caught:
        BalancerOptions(**{"resident": True, "commit_delay": 2, "reduction": "iteration"} | wrong)
    assert said in caught.value.hint
    assert caught.value.why


def test_other_statistics_are_refused() -> None:
    rig = one_reduction(layers=2)
    layer, ids = rig.layers[0], rig.ids(0, 0)
    try:
        for call in (
            lambda: layer.update_local_statistic(ids, True, True),
            lambda: layer.update_statistic_with_global_ids(ids, True, True),
            layer.get_agreement_lanes,
            lambda: layer.update_agreement(torch.zeros(1, 5, dtype=torch.int64)),
            partial(layer.require_statistics, "gathered"),
        ):
            rig.balancer.start_iter()
            layer.start_wait_gpu_stage()
            layer.done_wait_gpu_stage()
            with pytest.raises(BalancerError, match="E209") as caught:
                call()
            assert "local_ids" in caught.value.hint
            rig.balancer.abort_iter()
        layer.require_statistics("local_ids")
        rig.iterate(4)
        assert rig.journal.commits
    finally:
        rig.balancer.shutdown()


def test_layers_of_other_sizes_are_refused() -> None:
    options = BalancerOptions(resident=True, commit_delay=2, reduction="iteration")
    balancer = MoeLoadBalancer(0, 1, 1, options=options)
    for experts in (2, 3):
        layer = balancer.add_layer(experts, 1, experts)
        assert isinstance(layer, OneReductionLayer)
        weight = torch.zeros(2 * experts, 3, 4)
        for expert in range(experts):
            layer.register_weight_slot(expert, "w", weight[expert])
            layer.share_expert_weight(expert, "w", weight[expert])
        layer.register_weight_cells(torch.arange(experts, dtype=torch.int32), [{"w": cell} for cell in weight])
    with pytest.raises(BalancerError, match="E210") as caught:
        balancer.finalize_model()
    assert "3 experts, layer 0 has 2" in str(caught.value)
    balancer.shutdown()

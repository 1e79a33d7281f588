"""WideEPMoE: output, exactly-once processing and the order of stage calls, with and without a balancer."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from moe_eplb.balancer import BalancerOptions, MoeLoadBalancer, MoeLoadBalancerIterContext
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.events import HOST, Kind, NullSink
from moe_eplb.device import AuxStreamType, Device, get_device
from moe_eplb.moe import MoeShape, RenormalizeMoeRoutingMethod, SuppliedMoeRoutingMethod, WideEPMoE, create_moe
from moe_eplb.moe.grouping import Grouped
from tests.support.moe_layers import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    ListSink,
    Watch,
    expert_weights,
    reference,
    tokens_of,
)
from tests.support.ranks import run_ranks

PATHS = [("alltoall", "gathered"), ("allgather", "local_ids"), ("allgather", "global_ids"), ("alltoall", "local_ids")]
PATHS += [("symm_mem", "local_ids")]
LAYERS = 2


def _layer(
    device: Device, layer: int = 0, dtype: torch.dtype = torch.float32, *, static: bool = False, **options: Any
) -> WideEPMoE:
    shape = MoeShape(EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, dtype)
    moe = WideEPMoE(SuppliedMoeRoutingMethod(TOP_K), shape, device, layer_idx=layer, **options)
    moe.load_weights(lambda expert: expert_weights(expert, layer, dtype))
    moe.probe = Watch()
    moe._dispatcher.static_shapes = static
    return moe


class Step(NamedTuple):
    """What a rank saw of one forward."""

    error: float
    y: torch.Tensor
    ids: list[list[int]]
    entries: list[tuple[int, int, int, int]]
    slot_experts: list[int]


def _step(moe: WideEPMoE, rank: int, tokens: int, step: int, all_rank_num_tokens: list[int] | None = None) -> Step:
    x, logits, ids = tokens_of(rank, tokens, step=step, dtype=moe.shape.dtype)
    method, watch = moe.routing_method, moe.probe
    assert isinstance(method, SuppliedMoeRoutingMethod)
    assert isinstance(watch, Watch)
    method.supply(ids)
    y = moe(x, logits, all_rank_num_tokens)
    assert watch.seen is not None
    wanted = reference(x, ids, watch.seen[2], moe.layer_idx)
    error = float((y.double() - wanted).abs().max() / wanted.abs().max()) if tokens else float(y.numel())
    balancer = moe.layer_load_balancer
    return Step(error, y, ids.tolist(), watch.entries, balancer.placement.slot_to_expert.tolist() if balancer else [])


def _assert_exactly_once(steps: list[Step], slot_experts: list[int]) -> None:
    got = sorted((source, token, k, slot_experts[slot]) for step in steps for source, token, k, slot in step.entries)
    wanted = sorted(
        (rank, token, k, expert)
        for rank, step in enumerate(steps)
        for token, chosen in enumerate(step.ids)
        for k, expert in enumerate(chosen)
    )
    assert got == wanted


# -- without a balancer ----------------------------------------------------------------------------------------------

SLOTS = [0, 1, 2, 0, 3, 4, 5, 0]
TOKENS = {1: [9], 2: [7, 0], 4: [3, 0, 5, 1]}


def _unbalanced(rank: int, size: int, dispatch: str) -> Step:
    device = get_device("cpu", NullSink(), seed=0, rank=rank)
    group = dist.group.WORLD if size > 1 else None
    moe = _layer(device, num_slots=len(SLOTS), ep_group=group, dispatch=dispatch, initial_slots=SLOTS)
    return _step(moe, rank, TOKENS[size][rank], 0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dispatch", ["alltoall", "allgather", "symm_mem"])
def test_static_placement_with_replicas_and_empty_ranks(dispatch: str, size: int) -> None:
    steps = [_unbalanced(0, 1, dispatch)] if size == 1 else run_ranks(_unbalanced, size, dispatch)
    assert max(step.error for step in steps) <= 1e-5
    _assert_exactly_once(steps, SLOTS)


def _both_shapes(rank: int, size: int, dispatch: str, limit: int | None) -> list[Step]:
    """The same forward with exchanged sizes and with static ones."""
    device = get_device("cpu", NullSink(), seed=0, rank=rank)
    group = dist.group.WORLD if size > 1 else None
    options = {"num_slots": len(SLOTS), "ep_group": group, "dispatch": dispatch, "initial_slots": SLOTS}
    steps = []
    for static in (False, True):
        moe = _layer(device, dtype=torch.bfloat16, static=static, moe_max_num_tokens=limit, **options)
        steps.append(_step(moe, rank, TOKENS[size][rank], 0, TOKENS[size]))
    return steps


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("dispatch", ["alltoall", "allgather"])
def test_static_shapes_change_neither_output_nor_entries(dispatch: str, size: int, limit: int | None) -> None:
    by_rank = [_both_shapes(0, 1, dispatch, limit)] if size == 1 else run_ranks(_both_shapes, size, dispatch, limit)
    assert any(static.entries for _, static in by_rank)
    for exact, static in by_rank:
        assert torch.equal(static.y, exact.y)
        assert static.entries == exact.entries
        assert static.error <= 2e-2
    if limit is None:  # else the watch keeps the last chunk's entries alone
        _assert_exactly_once([static for _, static in by_rank], SLOTS)


@pytest.mark.parametrize("dispatch", ["alltoall", "allgather", "symm_mem"])
def test_bfloat16_stays_within_its_tolerance(dispatch: str) -> None:
    moe = _layer(get_device("cpu", NullSink()), dtype=torch.bfloat16, dispatch=dispatch)
    assert _step(moe, 0, 20, 0).error <= 2e-2


def _routed(rank: int, size: int) -> list[list[int]]:
    moe = _layer(get_device("cpu", NullSink()), num_slots=8, initial_slots=SLOTS, ep_group=dist.group.WORLD)
    method = moe.routing_method
    assert isinstance(method, SuppliedMoeRoutingMethod)
    method.supply(torch.tensor([[0, 1]] * 4, dtype=torch.int32))
    moe(torch.zeros(4, HIDDEN), torch.zeros(4, EXPERTS))
    assert isinstance(moe.probe, Watch)
    return moe.probe.routed_slots


def test_replicas_take_turns_and_each_rank_starts_with_another() -> None:
    assert run_ranks(_routed, 2) == [[[0, 1], [3, 1], [7, 1], [0, 1]], [[3, 1], [7, 1], [0, 1], [3, 1]]]


def test_forward_works_without_a_probe() -> None:
    moe = _layer(get_device("cpu", NullSink()))
    moe.probe = None
    x, logits, ids = tokens_of(0, 3)
    assert isinstance(moe.routing_method, SuppliedMoeRoutingMethod)
    moe.routing_method.supply(ids)
    assert moe(x, logits).shape == (3, HIDDEN)


# -- with a balancer -------------------------------------------------------------------------------------------------


def _balanced(
    rank: int, size: int, dispatch: str, statistics: str, iterations: int, static: bool = False
) -> list[list[Step]]:
    """Steps by iteration and layer."""
    device = get_device("cpu", NullSink(), seed=3, rank=rank)
    groups = [dist.new_group(list(range(size))) if size > 1 else None for _ in range(3)]
    balancer = MoeLoadBalancer(rank, size, 1, device=device, group=groups[0])
    options: dict[str, Any] = {"num_slots": 8, "dispatch": dispatch, "statistics": statistics, "static": static}
    with balancer:
        make = partial(_layer, device, ep_group=groups[1], statistics_group=groups[2], **options)
        layers = [make(layer=layer) for layer in range(LAYERS)]
    balancer.finalize_model()
    try:
        steps = []
        for iteration in range(iterations):
            with MoeLoadBalancerIterContext(balancer, True, True):
                tokens = [12 - 12 * r * (iteration % 2) for r in range(size)]
                steps.append([_step(moe, rank, tokens[rank], iteration, tokens) for moe in layers])
        return steps
    finally:
        balancer.shutdown()


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("dispatch", "statistics"), PATHS)
def test_experts_move_between_ranks_and_outputs_stay_right(dispatch: str, statistics: str, static: bool) -> None:
    by_rank = run_ranks(_balanced, 2, dispatch, statistics, 8, static)
    placements: list[set[tuple[int, ...]]] = [set() for _ in range(LAYERS)]
    for by_layer in zip(*by_rank, strict=True):
        for layer in range(LAYERS):
            steps = [layers[layer] for layers in by_layer]
            assert max(step.error for step in steps) <= 1e-5
            assert steps[0].slot_experts == steps[1].slot_experts
            _assert_exactly_once(steps, steps[0].slot_experts)
            placements[layer].add(tuple(steps[0].slot_experts))
    assert all(len(seen) > 1 for seen in placements)


@pytest.mark.parametrize(("dispatch", "statistics"), PATHS)
def test_one_rank_balances_too(dispatch: str, statistics: str) -> None:
    steps = _balanced(0, 1, dispatch, statistics, 6)
    assert max(step.error for layers in steps for step in layers) <= 1e-5
    assert len({tuple(layers[0].slot_experts) for layers in steps}) > 1


def _order(dispatch: str, statistics: str, updates: int) -> list[tuple[str, str]]:
    """Records of one forward by ("host" | "main", kind), of a dynamic or static layer on one rank."""
    sink = ListSink()
    device = get_device("cpu", sink)
    balancer = MoeLoadBalancer(0, 1, updates, device=device, options=BalancerOptions(commit_delay=2))
    with balancer:
        moe = _layer(device, dispatch=dispatch, statistics=statistics)
    balancer.finalize_model()
    try:
        with MoeLoadBalancerIterContext(balancer, True, True):
            sink.records.clear()
            _step(moe, 0, 4, 0)
            records = list(sink.records)
    finally:
        balancer.shutdown()
    places = {HOST: "host", 0: "main"}
    return [(places[stream], kind.name.lower()) for kind, stream, _ in records if stream in places]


def _wanted_order(statistics: str, dynamic: bool) -> list[tuple[str, str]]:
    local = {"gathered": ["update_local_statistic"], "local_ids": ["update_statistic_with_local_ids"]}
    gathered = ["update_statistic_with_gathered_statistic"] if dynamic else []
    rest = [("host", "get_local_statistic_tensor")] if statistics == "gathered" else []
    after_prepare = [("host", name) for name in gathered] if statistics == "gathered" else []
    after_dispatch = [("host", "update_statistic_with_global_ids")] if statistics == "global_ids" else []
    return [
        ("host", "start_wait_gpu_stage"),
        ("main", "topk"),
        ("host", "done_wait_gpu_stage"),
        *[("host", name) for name in local.get(statistics, [])],
        ("host", "route"),
        ("main", "route"),
        *rest,
        ("main", "prepare"),
        *after_prepare,
        ("main", "dispatch"),
        *after_dispatch,
        ("main", "experts"),
        ("host", "start_set_cpu_stage"),
        ("main", "combine"),
        ("host", "done_set_cpu_stage"),
    ]


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize(("dispatch", "statistics"), PATHS)
def test_stage_calls_come_in_the_documented_order(dispatch: str, statistics: str, updates: int) -> None:
    assert _order(dispatch, statistics, updates) == _wanted_order(statistics, dynamic=updates > 0)


def test_an_exception_in_the_experts_leaves_the_next_iteration_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    device = get_device("cpu", NullSink(), seed=1)
    balancer = MoeLoadBalancer(0, 1, 1, device=device, options=BalancerOptions(commit_delay=2))
    with balancer:
        moe = _layer(device)
    balancer.finalize_model()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(moe.experts, "grouped_ffn", lambda *_, **_options: 1 / 0)
            with pytest.raises(ZeroDivisionError), MoeLoadBalancerIterContext(balancer, True, True):
                _step(moe, 0, 4, 0)
        with MoeLoadBalancerIterContext(balancer, True, True):
            assert _step(moe, 0, 4, 1).error <= 1e-5
    finally:
        balancer.shutdown()


def test_the_experts_are_told_how_many_rows_to_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = _layer(get_device("cpu", NullSink()))
    seen: list[int | None] = []
    group = moe.experts.group

    def noted(*given: Any, likely: int | None = None, **options: Any) -> Grouped:
        seen.append(likely)
        return group(*given, likely=likely, **options)

    monkeypatch.setattr(moe.experts, "group", noted)
    _step(moe, 0, 4, 0)
    assert seen == [4 * TOP_K]


def test_kinds_carry_their_numbers() -> None:
    sink = ListSink()
    moe = _layer(get_device("cpu", sink))
    sink.records.clear()
    _step(moe, 0, 4, 0)
    numbers = {kind: a for kind, _, a in sink.records}
    assert numbers[Kind.TOPK] == 4
    assert numbers[Kind.EXPERTS] == 4 * TOP_K
    assert numbers[Kind.PREPARE] == numbers[Kind.DISPATCH] == numbers[Kind.COMBINE] == 0


# -- construction ----------------------------------------------------------------------------------------------------


def test_a_balancer_without_its_stream_is_refused_at_construction() -> None:
    device = get_device("cpu", NullSink())
    streams = {AuxStreamType.MoeChunkingOverlap: device.stream(AuxStreamType.MoeChunkingOverlap)}
    with MoeLoadBalancer(0, 1, 1, device=device), pytest.raises(BalancerError, match=r"E140(.|\n)*MoeBalancer: device"):
        _layer(device, aux_stream_dict=streams)
    _layer(device, aux_stream_dict=streams)
    with MoeLoadBalancer(0, 1, 0, device=device):
        _layer(device, aux_stream_dict=streams)


def test_ranks_of_balancer_and_group_must_agree() -> None:
    device = get_device("cpu", NullSink())
    with MoeLoadBalancer(1, 2, 0, device=device), pytest.raises(BalancerError, match="E156"):
        _layer(device)


CANNOT_CARRY = [("allgather", "gathered"), ("alltoall", "global_ids"), ("symm_mem", "gathered")]


@pytest.mark.parametrize(("dispatch", "statistics"), [*CANNOT_CARRY, ("symm_mem", "global_ids")])
def test_statistics_that_the_dispatch_cannot_carry_are_refused(dispatch: str, statistics: str) -> None:
    with pytest.raises(BalancerError, match="E154"):
        _layer(get_device("cpu", NullSink()), dispatch=dispatch, statistics=statistics)


@pytest.mark.parametrize("dispatch", ["alltoall", "allgather", "symm_mem"])
@pytest.mark.parametrize(
    ("x", "logits"),
    [
        (torch.zeros(5, HIDDEN, dtype=torch.float16), torch.zeros(5, EXPERTS)),
        (torch.zeros(5, HIDDEN, dtype=torch.float32), torch.zeros(5, EXPERTS)),
        (torch.zeros(5, HIDDEN // 2, dtype=torch.bfloat16), torch.zeros(5, EXPERTS)),
        (torch.zeros(1, 5, HIDDEN, dtype=torch.bfloat16), torch.zeros(5, EXPERTS)),
        (torch.zeros(5, HIDDEN, dtype=torch.bfloat16), torch.zeros(4, EXPERTS)),
        (torch.zeros(5, HIDDEN, dtype=torch.bfloat16), torch.zeros(5, EXPERTS + 2)),
        (torch.tensor(0.0, dtype=torch.bfloat16), torch.zeros(0, EXPERTS)),
    ],
)
def test_inputs_that_do_not_fit_are_refused(dispatch: str, x: torch.Tensor, logits: torch.Tensor) -> None:
    """Most of them would give an output, and a wrong one."""
    moe = _layer(get_device("cpu", NullSink()), dtype=torch.bfloat16, dispatch=dispatch)
    assert isinstance(moe.routing_method, SuppliedMoeRoutingMethod)
    moe.routing_method.supply(torch.zeros(len(logits), TOP_K, dtype=torch.int32))
    with pytest.raises(BalancerError, match=rf"E217(.|\n)*torch.bfloat16 \[T, {HIDDEN}\]"):
        moe(x, logits)


@pytest.mark.parametrize("backend", ["fused", "grouped"])
def test_layers_that_exchange_nothing_refuse_them_too(backend: str) -> None:
    layer = create_moe(
        RenormalizeMoeRoutingMethod(2), num_experts=4, hidden_size=16, intermediate_size=16, dtype=torch.bfloat16,
        device=get_device("cpu", NullSink()), backend=backend,
    )  # fmt: skip
    with pytest.raises(BalancerError, match="E217"):
        layer(torch.zeros(5, 16, dtype=torch.float16), torch.zeros(5, 4))


def test_no_slots_are_no_default() -> None:
    with pytest.raises(BalancerError, match="E157"):
        _layer(get_device("cpu", NullSink()), num_slots=0)


def test_symmetric_memory_and_chunks_are_refused_together() -> None:
    with pytest.raises(BalancerError, match=r"E211(.|\n)*moe_max_num_tokens is 64"):
        _layer(get_device("cpu", NullSink()), dispatch="symm_mem", moe_max_num_tokens=64)


def _build_without_groups(rank: int, size: int, what: str) -> str:
    device = get_device("cpu", NullSink())
    group = dist.group.WORLD
    with MoeLoadBalancer(rank, size, 1, device=device, group=group), pytest.raises(BalancerError) as caught:
        _layer(device, ep_group=group, num_slots=7 if what == "slots" else 6, dispatch="allgather")
    return caught.value.code


@pytest.mark.parametrize(("what", "code"), [("allreduce", "E155"), ("slots", "E157")])
def test_a_layer_that_lacks_something_for_two_ranks_is_refused(what: str, code: str) -> None:
    assert run_ranks(_build_without_groups, 2, what) == [code, code]


@pytest.mark.parametrize(("dispatch", "statistics"), [("alltoall", None), ("allgather", "global_ids")])
def test_statistics_that_one_reduction_cannot_sum_are_refused(dispatch: Any, statistics: Any) -> None:
    device = get_device("cpu", NullSink())
    options = BalancerOptions(resident=True, commit_delay=2, reduction="iteration")
    with MoeLoadBalancer(0, 1, 1, device=device, options=options), pytest.raises(BalancerError, match="E209"):
        _layer(device, num_slots=6, dispatch=dispatch, statistics=statistics)


def _has_allreduce(rank: int, size: int) -> list[bool]:
    """Whether a layer has one: dynamic with local ids, dynamic gathered, static with local ids."""
    device, group = get_device("cpu", NullSink()), dist.new_group([0, 1])
    found = []
    for updates, dispatch in ((1, "allgather"), (1, "alltoall"), (0, "allgather")):
        with MoeLoadBalancer(rank, size, updates, device=device, group=group) as balancer:
            moe = _layer(device, ep_group=dist.group.WORLD, statistics_group=group, dispatch=dispatch)
        found.append(moe.allreduce is not None)
        balancer.shutdown()
    return found


def test_allreduce_is_made_only_for_local_ids_of_a_dynamic_layer() -> None:
    assert run_ranks(_has_allreduce, 2) == [[True, False, False]] * 2

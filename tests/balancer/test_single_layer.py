"""The ten stage calls of one layer: statistics paths, routing, static layers, chunks on other streams."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from moe_eplb.balancer import SingleLayerMoeLoadBalancer
from moe_eplb.core.errors import BalancerError, ProtocolError
from moe_eplb.core.events import Kind, NullSink
from moe_eplb.device import AuxStreamType, Event, Stream
from tests.support.balanced import Rig, StandIn, weight

IDS = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3]], dtype=torch.int32)
SEEDS = [None, 0, 1, 2]


def hold(layer: SingleLayerMoeLoadBalancer) -> None:
    layer.start_wait_gpu_stage()
    layer.done_wait_gpu_stage()


def release(layer: SingleLayerMoeLoadBalancer) -> None:
    layer.start_set_cpu_stage()
    layer.done_set_cpu_stage()


def pair(seed: int | None = None, ranks: int = 2) -> Rig:
    """TensorRT-LLM's own test sizes: 4 experts, top 2, 2 slots on each of 2 ranks."""
    return Rig(2, 4, 2, slots_per_rank=4 // ranks, ranks=ranks, seed=seed)


# -- what TensorRT-LLM's test of a single layer checks ----------------------------------------------------------------


def test_attributes_and_initial_placement() -> None:
    rig = Rig(2, 4, 2, slots_per_rank=3, ranks=2, rank=1)
    layer = rig.layers[1]
    assert (layer.layer_idx, layer.expert_count, layer.top_k, layer.slot_count_per_rank) == (1, 4, 2, 3)
    assert (layer.ep_rank, layer.ep_size, layer.repeated_count) == (1, 2, 1)
    assert layer.is_dynamic_routing()
    assert not layer.is_static_routing()
    assert layer.need_load_shared_weights()
    assert layer.placement.slot_to_expert.tolist() == [0, 1, 2, 2, 3, 0]
    assert layer.local_slot_experts() == [2, 3, 0]
    rig.balancer.shutdown()


def test_experts_to_share_are_a_contiguous_part() -> None:
    rig = Rig(2, 7, 2, slots_per_rank=7)
    assert rig.layers[0].load_expert_ids == range(7)
    rig.balancer.shutdown()


def test_weights_given_are_those_that_the_slots_get() -> None:
    rig = Rig(2, 6, 2, slots_per_rank=8, updates=2, empty_group="never")
    rig.iterate(4)
    rig.balancer.shutdown()
    assert rig.journal.commits
    rig.assert_weights_match()


def test_set_initial_weight_assignments() -> None:
    rig = Rig(2, 4, 2, slots_per_rank=2, ranks=2, updates=0)
    layer = rig.layers[0]
    layer.set_initial_weight_assignments([3, 2, 1, 0])
    assert layer.local_slot_experts() == [3, 2]
    assert torch.equal(layer.route(IDS), 3 - IDS)


@pytest.mark.parametrize(
    ("experts", "text"),
    [([0, 1, 2, 3, 0, 1], "initial placement has 6 slots"), ([0, 1, 2, 2], "E132"), ([0, 1, 2, 4], "E132")],
)
def test_initial_assignments_that_do_not_fit_are_refused(experts: list[int], text: str) -> None:
    layer = Rig(2, 4, 2, slots_per_rank=2, ranks=2, updates=0).layers[0]
    with pytest.raises(BalancerError, match=text):
        layer.set_initial_weight_assignments(experts)
    assert layer.placement.slot_to_expert.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", SEEDS)
def test_statistic_of_real_ids(seed: int | None) -> None:
    rig = pair(seed)
    rig.balancer.start_iter()
    layer = rig.layers[0]
    hold(layer)
    layer.update_statistic_with_global_ids(IDS, True, True)
    release(layer)
    assert rig.journal.loads == [(0, [2, 2, 2, 2])]
    rig.balancer.shutdown()


def test_routing_with_one_slot_an_expert_is_the_identity() -> None:
    rig = pair()
    rig.balancer.start_iter()
    hold(rig.layers[0])
    slots = rig.layers[0].route(IDS)
    assert slots.dtype == torch.int32
    assert torch.equal(slots, IDS)
    rig.balancer.shutdown()


def test_routing_from_another_rank_starts_with_another_replica() -> None:
    rig = Rig(2, 4, 2, slots_per_rank=4, ranks=2, rank=1)
    rig.balancer.start_iter()
    layer = rig.layers[0]
    hold(layer)
    assert layer.route(IDS[:1]).tolist() == [[0, 1]]
    assert layer.route(IDS[:1], offset_by_ep_rank=True).tolist() == [[6, 7]]
    rig.balancer.shutdown()


# -- statistics -------------------------------------------------------------------------------------------------------

OTHERS = torch.tensor([5, 0, 3, 1])
CHUNKS = [IDS[:1], IDS[1:3], IDS[3:]]
TOTAL = [7, 2, 5, 3]


def path_a(layer: SingleLayerMoeLoadBalancer) -> None:
    for i, ids in enumerate(CHUNKS):
        layer.update_local_statistic(ids, i == 0, i == 2)
    counts = layer.get_local_statistic_tensor()
    assert counts is not None
    assert counts.dtype == torch.int32
    assert counts.tolist() == [2, 2, 2, 2]
    layer.update_statistic_with_gathered_statistic(torch.stack([counts, OTHERS.to(torch.int32)]))


def path_b(layer: SingleLayerMoeLoadBalancer) -> None:
    for i, ids in enumerate(CHUNKS):
        layer.update_statistic_with_local_ids(ids, i == 0, i == 2, StandIn(2, OTHERS))


def path_c(layer: SingleLayerMoeLoadBalancer) -> None:
    others = torch.repeat_interleave(torch.arange(4), OTHERS).to(torch.int32)
    others = torch.cat([others, others.new_full((len(others) % 2,), -1)])  # rows of two; -1 is nobody's
    for i, ids in enumerate(CHUNKS):
        everybody = torch.cat([ids.flatten(), others if i == 1 else others[:0]])
        layer.update_statistic_with_global_ids(everybody.reshape(-1, 2), i == 0, i == 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_all_three_paths_give_the_same_load(seed: int | None) -> None:
    loads = []
    for path in (path_a, path_b, path_c):
        rig = pair(seed)
        rig.balancer.set_iter_info(True, False)
        for _ in range(3):
            rig.balancer.start_iter()
            for layer in rig.layers:
                hold(layer)
                path(layer)
                release(layer)
            rig.balancer.end_iter()
        assert rig.journal.loads == [(layer, TOTAL) for _ in range(3) for layer in range(2)]
        loads.append(rig.layers[1]._statistics.load.take().tolist())
        rig.balancer.shutdown()
    assert loads[0] == loads[1] == loads[2]
    assert loads[0][0] > 2 * TOTAL[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_local_statistic_tensor_keeps_its_address_and_is_never_reduced_into(seed: int | None) -> None:
    rig = pair(seed)
    addresses, seen = set(), []
    for _ in range(3):
        rig.balancer.start_iter()
        for layer in rig.layers:
            hold(layer)
            path_a(layer)
            release(layer)
            local = layer._statistics.counts()
            if layer.layer_idx == 0:
                addresses.add(local.data_ptr())
            seen.append(local.tolist())
        rig.balancer.end_iter()
    rig.balancer.start_iter()
    hold(rig.layers[0])
    path_b(rig.layers[0])
    release(rig.layers[0])
    seen.append(rig.layers[0]._statistics.counts().tolist())
    addresses.add(rig.layers[0]._statistics.counts().data_ptr())
    assert len(addresses) == 1
    assert seen == [[2, 2, 2, 2]] * 7  # zeroed on each first stage, and no sum over ranks ever in it
    rig.balancer.shutdown()


def test_local_statistic_tensor_is_made_on_first_use() -> None:
    rig = pair()
    assert rig.layers[0]._statistics._counts is None
    rig.balancer.start_iter()
    hold(rig.layers[0])
    assert rig.layers[0]._statistics._counts is None
    path_a(rig.layers[0])
    assert rig.layers[0]._statistics._counts is not None
    rig.balancer.shutdown()


def test_statistics_first_counted_in_inference_mode_go_on_outside_it() -> None:
    rig = Rig(2)
    with torch.inference_mode():
        rig.iterate()
    rig.iterate(2)
    assert len(rig.journal.loads) == 6
    rig.balancer.shutdown()


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 5), (3, 4), (2, 4, 1)])
def test_gathered_statistics_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    rig = pair()
    rig.balancer.start_iter()
    layer = rig.layers[0]
    hold(layer)
    layer.update_local_statistic(IDS, True, True)
    layer.get_local_statistic_tensor()
    with pytest.raises(BalancerError, match=r"E141.*layer 0(.|\n)*expected .* = \(2, 4\)"):
        layer.update_statistic_with_gathered_statistic(torch.zeros(shape, dtype=torch.int32))
    layer.update_statistic_with_gathered_statistic(torch.zeros(2, 4, dtype=torch.int32))  # the call was not made
    rig.balancer.shutdown()


def test_local_ids_of_several_ranks_without_an_allreduce_are_refused() -> None:
    rig = pair()
    rig.balancer.start_iter()
    hold(rig.layers[0])
    with pytest.raises(BalancerError, match=r"no allreduce for statistics of 2 ranks") as info:
        rig.layers[0].update_statistic_with_local_ids(IDS, True, True)
    assert info.value.code == "E139"
    assert rig.journal.loads == []
    rig.balancer.shutdown()


def test_one_rank_needs_no_allreduce() -> None:
    rig = pair(ranks=1)
    rig.balancer.start_iter()
    hold(rig.layers[0])
    rig.layers[0].update_statistic_with_local_ids(IDS, True, True)
    release(rig.layers[0])
    assert rig.journal.loads == [(0, [2, 2, 2, 2])]
    rig.balancer.shutdown()


@pytest.mark.parametrize("path", [path_a, path_b])
def test_statistics_that_are_given_but_never_reduced_are_refused(path: object) -> None:
    rig = pair()
    rig.balancer.start_iter()
    layer = rig.layers[0]
    hold(layer)
    if path is path_a:
        layer.update_local_statistic(IDS, True, True)
        layer.get_local_statistic_tensor()
    else:
        layer.update_statistic_with_local_ids(IDS, True, False, StandIn(2, OTHERS))
    with pytest.raises(ProtocolError, match="E111"):
        layer.start_set_cpu_stage()
    rig.balancer.shutdown()


def test_statistics_switched_off_count_nothing_but_keep_the_order_of_calls() -> None:
    rig = pair()
    rig.balancer.set_iter_info(False, False)
    rig.iterate(2)
    assert rig.journal.loads == []
    assert rig.layers[0].statistic_flag_tensor.tolist() == [0]
    assert rig.layers[0]._statistics.counts().tolist() == [0, 0, 0, 0]
    rig.balancer.shutdown()


def test_overflow_of_a_count_reaches_the_model_by_the_next_join() -> None:
    rig = pair(seed=0)
    rig.balancer.start_iter()
    layer = rig.layers[0]
    hold(layer)
    layer._statistics.counts().fill_(2**31 - 1)
    layer.update_local_statistic(IDS, True, False)
    rig.balancer.device.synchronize()
    layer._statistics.counts().fill_(2**31 - 1)
    layer.update_local_statistic(IDS, False, True)
    with pytest.raises(BalancerError, match="E134"):
        layer.get_local_statistic_tensor()
    rig.balancer.shutdown()


# -- static layers ----------------------------------------------------------------------------------------------------


class Streams(NullSink):
    """Streams on which anything ran."""

    def __init__(self) -> None:
        self.kinds: list[tuple[Kind, int]] = []

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        self.kinds.append((kind, stream))
        return 0


def test_static_layers_count_calls_and_do_no_work() -> None:
    sink = Streams()
    rig = Rig(1, 4, 2, slots_per_rank=2, ranks=2, updates=0, sink=sink)
    layer = rig.layers[0]
    hold(layer)
    layer.update_local_statistic(IDS, True, True)
    assert layer.get_local_statistic_tensor() is None
    layer.update_statistic_with_gathered_statistic(torch.zeros(7))
    assert layer.get_agreement_lanes() is None
    layer.route(IDS)
    release(layer)
    assert {stream for _, stream in sink.kinds} == {255, 0}  # calls of the host, and route on the main stream
    assert [kind for kind, stream in sink.kinds if stream == 0] == [Kind.ROUTE]
    assert rig.journal.loads == []
    hold(layer)
    with pytest.raises(ProtocolError, match="E101"):
        layer.start_wait_gpu_stage()


def test_static_layers_need_no_allreduce_no_host_copy_and_no_stage_for_routing() -> None:
    rig = Rig(1, 4, 2, slots_per_rank=2, ranks=2, updates=0)
    layer = rig.layers[0]
    assert not layer.need_load_shared_weights()
    assert torch.equal(layer.route(IDS), IDS)
    hold(layer)
    layer.update_statistic_with_local_ids(IDS, True, True)
    release(layer)


# -- agreement lanes --------------------------------------------------------------------------------------------------


def test_lanes_are_nothing_in_static_routing_and_settle_at_once_on_one_rank() -> None:
    assert Rig(1, updates=0).layers[0].get_agreement_lanes() is None
    rig = Rig(2, updates=2, empty_group="never")
    for _ in range(3):
        rig.balancer.start_iter()
        for layer in rig.layers:
            hold(layer)
            layer.update_statistic_with_global_ids(rig.ids(layer.layer_idx, 0), True, True)
            assert layer.get_agreement_lanes() is None
            release(layer)
        rig.balancer.end_iter()
    rig.balancer.shutdown()
    assert rig.journal.commits
    assert rig.journal.drops == []


def test_lanes_of_several_ranks_commit_when_all_are_ready_and_equal() -> None:
    rig = pair()
    for _ in range(6):
        rig.balancer.start_iter()
        for layer in rig.layers:
            hold(layer)
            layer.update_statistic_with_global_ids(rig.ids(layer.layer_idx, rig.balancer.iter_id), True, True)
            lanes = layer.get_agreement_lanes()
            assert lanes is not None
            assert lanes.shape == (5,)
            layer.update_agreement(torch.stack([lanes, lanes]))
            release(layer)
        rig.balancer.end_iter()
    rig.balancer.shutdown()
    assert rig.journal.commits
    assert rig.journal.drops == []


# -- chunks on a stream of their own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_a_chunk_on_another_stream_waits_for_the_layer_and_is_waited_for(seed: int) -> None:
    """Both ends: the chunk routes by the new tables, and it has read the old weights before they are overwritten."""
    rig = Rig(2, 6, 2, slots_per_rank=8, updates=2, empty_group="never", seed=seed)
    device = rig.balancer.device
    # One for each layer: on a common stream the next layer's chunk would drain this one's.
    chunk_streams = [device.stream(AuxStreamType.MoeChunkingOverlap) for _ in rig.layers]
    read: list[tuple[int, int, Tensor]] = []

    def use_weights(layer: SingleLayerMoeLoadBalancer, slots: Tensor) -> None:
        for slot in slots.flatten().tolist():
            read.append((layer.layer_idx, slot, rig.storage[layer.layer_idx][slot, :, :4].clone()))

    expected = []
    for _ in range(5):
        rig.balancer.start_iter()
        for layer in rig.layers:
            ids = rig.ids(layer.layer_idx, rig.balancer.iter_id)
            hold(layer)
            layer.update_statistic_with_local_ids(ids, True, True)
            layer.route(ids[:4])
            chunk_stream = chunk_streams[layer.layer_idx]
            with device.use(chunk_stream):
                slots = layer.route(ids[4:])
                expected += [weight(layer.layer_idx, e) for e in ids[4:].flatten().tolist()]
                device.submit(chunk_stream, Kind.EXPERTS, layer.layer_idx, partial(use_weights, layer, slots))
            release(layer)
        rig.balancer.end_iter()
    rig.balancer.shutdown()
    device.synchronize()
    assert len(rig.journal.commits) == 8
    assert len(read) == len(expected)
    assert all(torch.equal(got, wanted) for (_, _, got), wanted in zip(read, expected, strict=True))


def test_each_stream_that_routes_waits_once_for_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(2)
    device, waits = rig.balancer.device, list[str]()
    chunk_stream = device.stream(AuxStreamType.MoeChunkingOverlap)
    rig.balancer.start_iter()
    hold(rig.layers[0])
    wait = device.wait

    def watched(stream: Stream, event: Event) -> None:
        waits.append(stream.name)
        wait(stream, event)

    monkeypatch.setattr(device, "wait", watched)
    with device.use(chunk_stream):
        for _ in range(2):
            rig.layers[0].route(rig.ids(0, 0))
    rig.layers[0].route(rig.ids(0, 0))
    assert waits == ["MoeChunkingOverlap"]
    rig.balancer.shutdown()


@pytest.mark.parametrize("seed", range(6))
def test_a_chunk_that_holds_the_layer_itself_joins_on_its_own_stream(seed: int) -> None:
    rig = Rig(2, updates=2, empty_group="never", seed=seed)
    stream = rig.balancer.device.stream(AuxStreamType.MoeChunkingOverlap)
    with rig.balancer.device.use(stream):
        for _ in range(4):
            slots = rig.iterate()
            for layer, chosen in zip(rig.layers, slots, strict=True):
                experts = layer.placement.slot_to_expert[torch.tensor(chosen).numpy()]
                assert experts.tolist() == rig.ids(layer.layer_idx, rig.balancer.iter_id - 1).tolist()
    assert rig.journal.commits
    rig.balancer.shutdown()


# -- records ----------------------------------------------------------------------------------------------------------


class Balance(NullSink):
    """Tokens that were begun and not ended."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self._token = 0

    def begin(self, kind: Kind, layer: int, iteration: int, stream: int, a: int = 0, b: int = 0) -> int:
        self._token += 1
        self.open.add(self._token)
        return self._token

    def end(self, token: int, a: int | None = None, b: int | None = None) -> None:
        self.open.remove(token)


@pytest.mark.parametrize("fault", ["order", "overflow"])
def test_a_call_that_raises_leaves_no_open_record(fault: str) -> None:
    sink = Balance()
    rig = Rig(2, sink=sink, seed=0)
    rig.balancer.start_iter()
    layer = rig.layers[0]
    hold(layer)
    if fault == "order":
        with pytest.raises(ProtocolError):
            layer.done_wait_gpu_stage()
    else:
        layer.update_local_statistic(rig.ids(0, 0), True, False)
        rig.balancer.device.synchronize()
        layer._statistics.counts().fill_(2**31 - 1)
        layer.update_local_statistic(rig.ids(0, 0), False, True)
        with pytest.raises(BalancerError, match="E134"):
            layer.get_local_statistic_tensor()
    rig.balancer.abort_iter()
    rig.balancer.shutdown()
    assert sink.open == set()

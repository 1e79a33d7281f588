"""TensorRT-LLM's ``tests/unittest/_torch/modules/test_moe_load_balancer.py``, test for test, on this balancer.

Each docstring begins with the upstream test's name. Upstream replaces the C++ object by a mock and checks what it is
handed; here nothing is mocked, so each test checks what the call brings about.

No counterpart: ``TLLM_HOST_ACCESSIBLE_ALLOW_MANAGED_FALLBACK`` and ``set_use_gpu_memcpy``, which choose how upstream's
CPU reaches device memory in its tests (slots are plain tensors here, written at a commit); the calls of the mocked C++
object. Mask-only reconfiguration after a rank's death is not built: the ranks of a run are fixed, and a run with a dead
rank ends. The two tests of it become one: nothing here takes dead ranks and goes on as if it had masked them.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from moe_eplb.balancer import (
    BalancerOptions,
    MoeLoadBalancer,
    MoeLoadBalancerIterContext,
    SingleLayerMoeLoadBalancer,
    get_moe_load_balancer,
    moe_load_balancer_add_single_layer,
)
from moe_eplb.core.errors import ProtocolError
from moe_eplb.core.events import NullSink
from moe_eplb.device import AuxStreamType, get_device
from tests.support.balanced import NAME, Rig, StandIn, weight

GROUP = cast(Any, object())  # stands for a process group of four ranks, which nothing here talks over
IDS = torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3]], dtype=torch.int32)


def four_ranks(rank: int = 0) -> MoeLoadBalancer:
    return MoeLoadBalancer(rank, 4, 2, "upstream", group=GROUP)


@pytest.fixture
def pair() -> Iterator[Rig]:
    """Rank 0 of 2 with 4 experts, top 2, 2 slots a rank; expert i in slot i; statistics on, updates off."""
    rig = Rig(1, 4, 2, slots_per_rank=2, ranks=2, updates=1, commit_delay=2)
    assert rig.placements() == [[0, 1, 2, 3]]
    rig.balancer.set_iter_info(True, False)
    yield rig
    rig.balancer.shutdown()


def test_moe_load_balancer_init() -> None:
    """test_moe_load_balancer_init: arguments and first state."""
    balancer = four_ranks()
    assert (balancer.ep_rank, balancer.ep_size, balancer.layer_updates_per_iter) == (0, 4, 2)
    assert (balancer.iter_id, balancer.layers) == (0, [])
    assert (balancer.enable_statistic, balancer.enable_update_weights) == (False, False)
    assert (balancer.is_dynamic_routing(), balancer.is_static_routing()) == (True, False)
    assert get_moe_load_balancer() is None


def test_moe_load_balancer_add_layer() -> None:
    """test_moe_load_balancer_add_layer: the three arguments and the stream arrive in the layer."""
    device = get_device("cpu", NullSink())
    balancer = MoeLoadBalancer(0, 4, 2, "upstream", group=GROUP, device=device)
    stream = device.stream(AuxStreamType.MoeBalancer)
    layer = balancer.add_layer(8, 2, 4, stream)
    assert isinstance(layer, SingleLayerMoeLoadBalancer)
    assert (layer.expert_count, layer.top_k, layer.slot_count_per_rank) == (8, 2, 4)
    assert layer.placement.slots == 16
    assert layer._stream._aux is stream
    assert balancer.layers == [layer]


def test_context_manager() -> None:
    """test_context_manager: current inside the block, nobody outside."""
    assert get_moe_load_balancer() is None
    with four_ranks() as balancer:
        assert get_moe_load_balancer() is balancer
    assert get_moe_load_balancer() is None


def test_nested_context_managers() -> None:
    """test_nested_context_managers: leaving the inner block brings the outer balancer back."""
    outer, inner = four_ranks(0), four_ranks(1)
    with outer:
        assert get_moe_load_balancer() is outer
        with inner:
            assert get_moe_load_balancer() is inner
        assert get_moe_load_balancer() is outer
    assert get_moe_load_balancer() is None


def test_add_single_layer_with_context() -> None:
    """test_moe_load_balancer_add_single_layer_with_context: the layer joins the current balancer."""
    with four_ranks() as balancer:
        layer = moe_load_balancer_add_single_layer(8, 2, 4)
    assert isinstance(layer, SingleLayerMoeLoadBalancer)
    assert (layer.expert_count, layer.top_k, layer.slot_count_per_rank) == (8, 2, 4)
    assert balancer.layers == [layer]


def test_add_single_layer_without_context() -> None:
    """test_moe_load_balancer_add_single_layer_without_context: there is nothing to join."""
    assert moe_load_balancer_add_single_layer(8, 2, 4) is None


def test_exception_in_context() -> None:
    """test_exception_in_context: it gets out, and no balancer stays current."""

    def fail(balancer: MoeLoadBalancer) -> None:
        assert get_moe_load_balancer() is balancer
        raise ValueError("out of the block")

    with pytest.raises(ValueError, match="out of the block"), four_ranks() as balancer:
        fail(balancer)
    assert get_moe_load_balancer() is None


def test_single_layer_methods() -> None:
    """test_single_layer_moe_load_balancer_methods: slot, host copy, assignment, wait, statistics, route, hand-over."""
    balancer = MoeLoadBalancer(0, 1, 1, options=BalancerOptions(commit_delay=2))
    layer = balancer.add_layer(4, 2, 4)
    slots = torch.zeros(4, 3, 4)
    layer.set_initial_weight_assignments([3, 2, 1, 0])
    for slot in range(4):
        layer.register_weight_slot(slot, NAME, slots[slot])
        layer.share_expert_weight(slot, NAME, weight(0, slot))
    balancer.finalize_model()
    try:
        assert layer.local_slot_experts() == [3, 2, 1, 0]
        assert torch.equal(layer.updates.host.host_tensor(2, NAME), weight(0, 2))
        layer.updates.slots.write(layer.updates.slots.stage([(1, 2)], layer.updates.host))
        assert torch.equal(slots[1], weight(0, 2))
        balancer.set_iter_info(True, False)
        balancer.start_iter()
        flag = layer.statistic_flag_tensor
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        assert layer.statistic_flag_tensor is flag
        assert (flag.dtype, flag.tolist()) == (torch.int32, [1])
        layer.update_statistic_with_global_ids(IDS[:2], True, False)
        assert layer._statistics.counts().tolist() == [1, 2, 1, 0]
        layer.update_statistic_with_global_ids(IDS[2:], False, True)
        assert layer._statistics.load._load.tolist() == [2.0, 2.0, 2.0, 2.0]
        assert torch.equal(layer.route(IDS), 3 - IDS)
        layer.start_set_cpu_stage()
        layer.done_set_cpu_stage()
        assert not layer.unfinished
        with pytest.raises(ProtocolError, match="E112"):
            layer.done_set_cpu_stage()
        balancer.end_iter()
    finally:
        balancer.shutdown()


def test_lifecycle() -> None:
    """test_moe_load_balancer_lifecycle_methods: finalize, warm-up of 10, iteration info and context, shutdown."""
    rig = Rig(2, updates=2, empty_group="never")  # finalized
    rig.balancer.set_warm_up_iter_count(10)
    rig.balancer.set_iter_info(True, True)
    thread = rig.balancer.updater._thread
    assert thread.is_alive()
    for iteration in range(12):
        assert (rig.balancer.iter_id, rig.balancer._iter.in_iter) == (iteration, False)
        with MoeLoadBalancerIterContext(rig.balancer):
            assert (rig.balancer.iter_id, rig.balancer._iter.in_iter) == (iteration, True)
            for index in range(2):
                rig.run_layer(index)
                assert rig.layers[index].statistic_flag_tensor.tolist() == [1]
    rig.balancer.shutdown()
    assert rig.journal.commits == [(0, 10, 11), (1, 10, 11)], "iterations 0 to 9 were warm-up"
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "owner", [MoeLoadBalancer, SingleLayerMoeLoadBalancer, BalancerOptions], ids=lambda o: o.__name__
)
def test_mask_only_is_not_pretended(owner: type) -> None:
    """test_reconfigure_mask_only_rejects_active_iteration, ReconfigureMaskOnlyRemovesDeadRankSlots: not built."""
    words = ("mask", "dead", "health", "active_rank")
    names = {name for name, _ in inspect.getmembers(owner)} | set(inspect.signature(owner).parameters)
    if dataclasses.is_dataclass(owner):
        names |= {field.name for field in dataclasses.fields(owner)}
    assert [name for name in names if any(word in name for word in words)] == []
    with pytest.raises(TypeError, match="dead_ranks"):
        owner(dead_ranks=[2])


def test_real_statistic_kernel(pair: Rig) -> None:
    """test_real_statistic_kernel: upstream only wants no error; the counts and the load are looked at, too."""
    layer = pair.layers[0]
    with MoeLoadBalancerIterContext(pair.balancer):
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        layer.update_statistic_with_global_ids(IDS, True, True)
        layer.start_set_cpu_stage()
        layer.done_set_cpu_stage()
    assert layer._statistics.counts().tolist() == [2, 2, 2, 2]
    assert layer._statistics.load._load.tolist() == [2.0, 2.0, 2.0, 2.0]
    assert pair.journal.loads == [(0, [2, 2, 2, 2])]
    assert layer.updates.pending is None, "updates are off"


def test_real_routing_kernel(pair: Rig) -> None:
    """test_real_routing_kernel: expert i is slot i.

    Upstream hands the layer over without any statistics. Here that is refused (E110), and refused only there.
    """
    layer = pair.layers[0]
    with MoeLoadBalancerIterContext(pair.balancer):
        layer.start_wait_gpu_stage()
        layer.done_wait_gpu_stage()
        routed = layer.route(IDS)
        with pytest.raises(ProtocolError, match=r"E110(.|\n)*no statistics were given"):
            layer.start_set_cpu_stage()
        layer.update_statistic_with_local_ids(IDS, True, True, StandIn(2, torch.zeros(4, dtype=torch.int64)))
        layer.start_set_cpu_stage()
        layer.done_set_cpu_stage()
    assert routed.dtype == torch.int32
    assert torch.equal(routed, IDS)

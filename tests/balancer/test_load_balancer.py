"""The model's balancer: building, contexts, iterations, options that it refuses, life and end."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest
import torch

import moe_eplb.balancer as public
from moe_eplb.balancer import (
    BalancerOptions,
    MoeLoadBalancer,
    MoeLoadBalancerIterContext,
    get_moe_load_balancer,
    moe_load_balancer_add_single_layer,
    moe_load_balancer_set_repeated_for_next_layer,
)
from moe_eplb.balancer.host_memory import list_segments
from moe_eplb.core.errors import BalancerError, HostMemoryError, ProtocolError
from moe_eplb.core.events import NullSink
from moe_eplb.device import AuxStreamType, get_device
from tests.support.balanced import Rig, StandIn

PUBLIC = {
    "AllReduce", "BalancerOff", "BalancerOptions", "HostMoeTensorSharer", "MoeLoadBalancer",
    "MoeLoadBalancerIterContext", "ReplicaChoice", "SingleLayerMoeLoadBalancer", "get_moe_load_balancer",
    "maybe_create_moe_load_balancer", "moe_load_balancer_add_single_layer",
    "moe_load_balancer_set_repeated_for_next_layer",
}  # fmt: skip


def test_public_names() -> None:
    assert set(public.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(public, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'MoeBalancer'"):
        _ = public.MoeBalancer


# -- what TensorRT-LLM's test of the balancer checks ------------------------------------------------------------------


def test_attributes_after_construction() -> None:
    balancer = MoeLoadBalancer(ep_rank=1, ep_size=4, layer_updates_per_iter=2, group=cast(Any, object()),
                               shared_memory_base_name="name")  # fmt: skip
    assert (balancer.ep_rank, balancer.ep_size, balancer.layer_updates_per_iter) == (1, 4, 2)
    assert balancer.instance == "name"
    assert balancer.iter_id == 0
    assert balancer.layers == []
    assert not balancer.enable_statistic
    assert not balancer.enable_update_weights
    assert balancer.is_dynamic_routing()
    assert not balancer.is_static_routing()


def test_no_updates_is_static_routing() -> None:
    balancer = MoeLoadBalancer(0, 2, 0)
    assert balancer.is_static_routing()
    assert not balancer.is_dynamic_routing()


def test_add_layer_numbers_layers_and_hands_on_its_arguments() -> None:
    device = get_device("cpu", NullSink())
    balancer = MoeLoadBalancer(0, 1, 1, device=device)
    stream = device.stream(AuxStreamType.MoeBalancer)
    first, second = balancer.add_layer(8, 2, 9), balancer.add_layer(4, 1, 6, stream)
    assert balancer.layers == [first, second]
    assert [layer.layer_idx for layer in balancer.layers] == [0, 1]
    assert (first.expert_count, first.top_k, first.slot_count_per_rank) == (8, 2, 9)
    assert (second.expert_count, second.top_k, second.slot_count_per_rank) == (4, 1, 6)
    assert second._stream._aux is stream
    assert first._stream._aux is not stream


def test_context_sets_and_clears_the_current_balancer() -> None:
    assert get_moe_load_balancer() is None
    with MoeLoadBalancer(0, 1, 0) as balancer:
        assert get_moe_load_balancer() is balancer
    assert get_moe_load_balancer() is None


def test_nested_contexts_restore_the_outer_balancer() -> None:
    with MoeLoadBalancer(0, 1, 0) as outer:
        with MoeLoadBalancer(0, 1, 0) as inner:
            assert get_moe_load_balancer() is inner
            with outer:
                assert get_moe_load_balancer() is outer
            assert get_moe_load_balancer() is inner
        assert get_moe_load_balancer() is outer
    assert get_moe_load_balancer() is None


def test_an_exception_inside_the_context_gets_out_and_clears() -> None:
    with pytest.raises(ZeroDivisionError), MoeLoadBalancer(0, 1, 0):
        _ = 1 / 0
    assert get_moe_load_balancer() is None


def test_the_current_balancer_is_the_threads_own() -> None:
    seen: list[object] = []
    with MoeLoadBalancer(0, 1, 0):
        thread = threading.Thread(target=lambda: seen.append(get_moe_load_balancer()))
        thread.start()
        thread.join(10)
    assert seen == [None]


def test_add_single_layer_within_and_without_a_context() -> None:
    assert moe_load_balancer_add_single_layer(4, 2, 4) is None
    with MoeLoadBalancer(0, 1, 0) as balancer:
        layer = moe_load_balancer_add_single_layer(4, 2, 5)
    assert balancer.layers == [layer]
    assert layer is not None
    assert layer.slot_count_per_rank == 5


def test_repeated_count_is_for_the_next_layer_only() -> None:
    moe_load_balancer_set_repeated_for_next_layer(3)
    with MoeLoadBalancer(0, 1, 0) as balancer:
        moe_load_balancer_set_repeated_for_next_layer(3)
        layers = [balancer.add_layer(4, 2, 4) for _ in range(2)]
        with pytest.raises(BalancerError, match="E143"):
            moe_load_balancer_set_repeated_for_next_layer(0)
    assert [layer.repeated_count for layer in layers] == [3, 1]


def test_lifecycle() -> None:
    rig = Rig(2)
    rig.balancer.set_warm_up_iter_count(10)
    rig.balancer.set_iter_info(True, True)
    for iteration in range(3):
        with MoeLoadBalancerIterContext(rig.balancer):
            assert rig.balancer.iter_id == rig.balancer.device.iteration == iteration
            for index in range(2):
                rig.run_layer(index)
    assert rig.balancer.iter_id == 3
    rig.balancer.shutdown()
    assert rig.journal.commits == []


# -- what finalize_model refuses --------------------------------------------------------------------------------------


def test_iterations_need_a_finalized_model() -> None:
    balancer = MoeLoadBalancer(0, 1, 0)
    for call in (balancer.start_iter, lambda: balancer.set_warm_up_iter_count(1)):
        with pytest.raises(BalancerError, match="not finalized"):
            call()


def test_layers_after_finalize_and_finalize_twice_are_refused() -> None:
    rig = Rig(2)
    with pytest.raises(BalancerError, match="a layer was added after finalize_model"):
        rig.balancer.add_layer(4, 2, 4)
    with pytest.raises(BalancerError, match="already finalized"):
        rig.balancer.finalize_model()
    rig.balancer.shutdown()


def test_a_dynamic_balancer_that_no_layer_joined_is_refused() -> None:
    with pytest.raises(BalancerError, match="no MoE layer has joined"):
        MoeLoadBalancer(0, 1, 1).finalize_model()
    MoeLoadBalancer(0, 1, 0).finalize_model()


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_layer_with_a_delay_of_one_could_never_commit_and_is_refused(ranks: int) -> None:
    with pytest.raises(BalancerError, match="use commit_delay=2 or more") as info:
        Rig(1, ranks=ranks)
    assert info.value.code == "E145"


def test_several_dynamic_ranks_need_a_group_and_static_ones_do_not() -> None:
    with pytest.raises(BalancerError, match="no process group") as info:
        MoeLoadBalancer(0, 2, 1)
    assert info.value.code == "E142"
    MoeLoadBalancer(0, 2, 0).finalize_model()


def test_a_finalize_that_fails_leaves_no_segment_after_shutdown() -> None:
    balancer = MoeLoadBalancer(0, 1, 1, options=BalancerOptions(commit_delay=2))
    layer = balancer.add_layer(2, 1, 2)
    for expert in range(2):
        layer.share_expert_weight(expert, "w", torch.zeros(3))
    with pytest.raises(BalancerError, match="E137"):
        balancer.finalize_model()
    balancer.shutdown()
    assert not [s for s in list_segments() if balancer.instance in s.name]


def test_two_balancers_of_one_name_collide_loudly_and_may_have_dashes() -> None:
    def make() -> MoeLoadBalancer:
        balancer = MoeLoadBalancer(0, 1, 1, "my-own-name", options=BalancerOptions(commit_delay=2))
        layer = balancer.add_layer(1, 1, 1)
        layer.share_expert_weight(0, "w", torch.zeros(3))
        layer.register_weight_slot(0, "w", torch.zeros(3))
        return balancer

    first, second = make(), make()
    first.finalize_model()
    assert [s.alive for s in list_segments() if "my-own-name" in s.name] == [True]
    with pytest.raises(HostMemoryError, match="E161"):
        second.finalize_model()
    second.shutdown()
    assert [s.alive for s in list_segments() if "my-own-name" in s.name] == [True]
    first.shutdown()
    assert not [s for s in list_segments() if "my-own-name" in s.name]


# -- statistics and updates, switched ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [((False, False), (None, True)), ((True, True), (False, None))])
def test_updates_without_statistics_are_refused(first: tuple[bool, bool], then: tuple[bool | None, ...]) -> None:
    balancer = MoeLoadBalancer(0, 1, 1)
    balancer.set_iter_info(*first)
    with pytest.raises(BalancerError, match="updates without statistics"):
        balancer.set_iter_info(*then)
    assert (balancer.enable_statistic, balancer.enable_update_weights) == first


def test_none_keeps_what_was_set() -> None:
    balancer = MoeLoadBalancer(0, 1, 1)
    balancer.set_iter_info(True, True)
    balancer.set_iter_info(None, False)
    assert (balancer.enable_statistic, balancer.enable_update_weights) == (True, False)
    balancer.set_iter_info()
    assert (balancer.enable_statistic, balancer.enable_update_weights) == (True, False)


def test_what_is_set_within_an_iteration_holds_from_the_next_one() -> None:
    rig = Rig(2, updates=2, empty_group="never")
    rig.balancer.start_iter()
    rig.run_layer(0)
    rig.balancer.set_iter_info(False, False)
    rig.run_layer(1)
    rig.balancer.end_iter()
    assert len(rig.journal.loads) == 2
    assert all(layer.updates.pending for layer in rig.layers)
    rig.iterate(2)
    rig.balancer.shutdown()
    assert len(rig.journal.loads) == 2
    assert {when for _, _, when in rig.journal.commits} == {1}  # what was taken is still committed, nothing is taken


def test_groups_walk_through_the_layers() -> None:
    rig = Rig(4, updates=1)  # groups (0,), (1,), (2,), (3,) and an empty one
    rig.iterate(11)
    rig.balancer.shutdown()
    taken = [(layer, taken) for layer, taken, _ in rig.journal.commits]
    assert taken == [(0, 0), (1, 1), (2, 2), (3, 3), (0, 5), (1, 6), (2, 7), (3, 8)]


def test_iterations_without_updates_do_not_advance_the_groups() -> None:
    rig = Rig(2, updates=1, empty_group="never")
    for updates in (True, False, True, False, True, True):
        rig.balancer.set_iter_info(True, updates)
        rig.iterate()
    rig.balancer.shutdown()
    assert [(layer, taken) for layer, taken, _ in rig.journal.commits] == [(0, 0), (1, 2), (0, 4)]


def test_warm_up_set_within_an_iteration_counts_the_next_ones() -> None:
    rig = Rig(2, updates=2, empty_group="never")
    rig.balancer.set_iter_info(True, True)
    rig.balancer.start_iter()
    rig.balancer.set_warm_up_iter_count(2)
    for index in range(2):
        rig.run_layer(index)
    rig.balancer.end_iter()
    rig.iterate(4)
    rig.balancer.shutdown()
    assert [taken for layer, taken, _ in rig.journal.commits if layer == 0] == [0, 3]


# -- order of iterations and layers -----------------------------------------------------------------------------------


def started(**options: Any) -> Rig:
    rig = Rig(3, **options)
    rig.balancer.start_iter()
    return rig


def refuse(rig: Rig, code: str, text: str, call: Any) -> None:
    with pytest.raises(ProtocolError, match=text) as info:
        call()
    assert info.value.code == code
    assert info.value.hint
    rig.balancer.shutdown()


def test_a_skipped_layer_is_named() -> None:
    rig = started()
    rig.run_layer(0)
    refuse(rig, "E123", r"layer 2, iteration 0(.|\n)*expected 1", rig.layers[2].start_wait_gpu_stage)


def test_a_layer_that_runs_twice_is_named() -> None:
    rig = started()
    rig.run_layer(0)
    refuse(rig, "E123", r"layer 0, iteration 0(.|\n)*expected 1", rig.layers[0].start_wait_gpu_stage)


def test_an_end_that_is_missing_is_named() -> None:
    rig = started()
    refuse(rig, "E120", r"iteration 0: start_iter", rig.balancer.start_iter)


def test_missing_layers_are_named_at_the_end() -> None:
    rig = started()
    rig.run_layer(0)
    refuse(rig, "E124", r"layers \[1, 2\] of 3 did not run", rig.balancer.end_iter)


def test_an_unfinished_layer_is_named_at_the_end() -> None:
    rig = started()
    rig.run_layer(0)
    rig.run_layer(1)
    rig.layers[2].start_wait_gpu_stage()
    refuse(rig, "E125", r"layers \[2\]", rig.balancer.end_iter)


def test_a_layer_outside_an_iteration_is_named() -> None:
    rig = Rig(3)
    refuse(rig, "E122", r"layer 0(.|\n)*MoeLoadBalancerIterContext", rig.layers[0].start_wait_gpu_stage)


@pytest.mark.parametrize("what", ["end_iter", "abort_iter"])
def test_an_end_without_a_start_is_named_and_has_no_effect(what: str) -> None:
    rig = Rig(2, seed=0)
    rig.iterate(2)
    pending = [layer.updates.pending for layer in rig.layers]
    refuse(rig, "E121", what, getattr(rig.balancer, what))
    assert [layer.updates.pending for layer in rig.layers] == pending
    assert rig.balancer.iter_id == 2


# -- the end ----------------------------------------------------------------------------------------------------------


def test_shutdown_twice_removes_segments_and_thread() -> None:
    rig = Rig(2)
    rig.iterate(2)
    assert len([s for s in list_segments() if rig.balancer.instance in s.name]) == 2
    assert rig.balancer.updater._thread in threading.enumerate()
    for _ in range(2):
        rig.balancer.shutdown()
        assert not [s for s in list_segments() if rig.balancer.instance in s.name]
        assert rig.balancer.updater._thread not in threading.enumerate()


def test_shutdown_of_a_balancer_that_never_ran() -> None:
    for updates in (0, 1):
        MoeLoadBalancer(0, 1, updates).shutdown()


def test_votes_of_the_stand_in_agree() -> None:
    """The tests' own stand-in for the other ranks sums counts and multiplies votes."""
    message = torch.tensor([1, 2, 1, 3, 9, 0, 0])
    StandIn(4, torch.tensor([10, 20]))(message)
    assert message.tolist() == [11, 22, 4, 12, 36, 0, 0]

"""What an exception leaves behind, and statistics that are given but never reduced."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from moe_eplb.balancer import MoeLoadBalancer, MoeLoadBalancerIterContext, SingleLayerMoeLoadBalancer
from moe_eplb.balancer import single_layer as single_layer_module
from moe_eplb.core.errors import ProtocolError
from moe_eplb.core.protocol import Call, Illegal, LayerState, step
from tests.support.balanced import Rig, StandIn
from tests.support.faults.base import Fault, demand, refused

__all__ = ["FAULTS"]

IDS = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)


class Crash(Exception):
    """What a model might raise."""


def crash_in_layer_one(rig: Rig) -> None:
    with MoeLoadBalancerIterContext(rig.balancer):
        rig.run_layer(0)
        rig.layers[1].start_wait_gpu_stage()
        rig.layers[1].done_wait_gpu_stage()
        rig.layers[1].update_local_statistic(IDS, True, True)
        raise Crash


def check_counters(updates: int) -> None:
    """The iteration after one that raised in the middle of a layer begins with every count at zero."""
    rig = Rig(2, updates=updates, empty_group="never", seed=0)
    with contextlib.suppress(Crash):
        crash_in_layer_one(rig)
    try:
        with MoeLoadBalancerIterContext(rig.balancer):
            for index in range(2):
                rig.run_layer(index)
    except ProtocolError as error:
        raise AssertionError(f"counts are stale after an exception: {error.code}") from error
    finally:
        rig.balancer.device.discard()
        rig.balancer.shutdown()
    demand(not any(layer.unfinished for layer in rig.layers), "a layer is left unfinished")


def check_dynamic_counters() -> None:
    check_counters(updates=2)


def check_static_counters() -> None:
    check_counters(updates=0)


def only_done_set_cpu_stage_resets(patch: pytest.MonkeyPatch) -> None:
    """An abort ends the iteration and leaves the layers as they were."""
    patch.setattr(SingleLayerMoeLoadBalancer, "abort", lambda self, iteration, begun: None)


def context_does_nothing_in_static_routing(patch: pytest.MonkeyPatch) -> None:
    """Nobody cleans up where there are no iterations."""
    patch.setattr(MoeLoadBalancer, "abort_layers", lambda self, begun=0: None)


def held_layer() -> tuple[Rig, SingleLayerMoeLoadBalancer]:
    rig = Rig(2, 4, 2, slots_per_rank=2, ranks=2)
    rig.balancer.start_iter()
    layer = rig.layers[0]
    layer.start_wait_gpu_stage()
    layer.done_wait_gpu_stage()
    return rig, layer


def check_gathered() -> None:
    """Path A: local counts were taken and no gathered ones came back."""
    rig, layer = held_layer()
    try:
        layer.update_local_statistic(IDS, True, True)
        layer.get_local_statistic_tensor()
        refused(layer.start_set_cpu_stage, "E111", "local counts that nobody gathered")
    finally:
        rig.balancer.abort_iter()
        rig.balancer.shutdown()


def check_local_ids() -> None:
    """Path B: no call was the last stage, so nothing was summed."""
    rig, layer = held_layer()
    try:
        layer.update_statistic_with_local_ids(IDS, True, False, StandIn(2, torch.zeros(4, dtype=torch.int64)))
        refused(layer.start_set_cpu_stage, "E111", "local ids without a last stage")
    finally:
        rig.balancer.abort_iter()
        rig.balancer.shutdown()


def hand_over_does_not_ask(patch: pytest.MonkeyPatch) -> None:
    """start_set_cpu_stage does not look whether the statistics were reduced."""

    def lenient(state: LayerState, call: Call, **flags: Any) -> LayerState:
        try:
            return step(state, call, **flags)
        except Illegal as error:
            if error.code != "E111":
                raise
            return step(state._replace(reduced=True), call, **flags)

    patch.setattr(single_layer_module, "step", lenient)


FAULTS = [
    Fault(
        "counters are left stale after an exception", check_dynamic_counters, only_done_set_cpu_stage_resets,
        "counts are stale after an exception: E101",
    ),
    Fault(
        "counters of static layers are left stale after an exception", check_static_counters,
        context_does_nothing_in_static_routing, "counts are stale after an exception: E101",
    ),
    Fault(
        "local counts are taken and never gathered", check_gathered, hand_over_does_not_ask,
        "local counts that nobody gathered: was not refused",
    ),
    Fault(
        "local ids are counted and never summed", check_local_ids, hand_over_does_not_ask,
        "local ids without a last stage: was not refused",
    ),
]  # fmt: skip

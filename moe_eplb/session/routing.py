"""The routing method of a scenario's layer."""

from __future__ import annotations

import torch

from moe_eplb.core.scenario import Scenario
from moe_eplb.device import Device
from moe_eplb.moe.routing import (
    BaseMoeRoutingMethod,
    DeepSeekV3MoeRoutingMethod,
    DefaultMoeRoutingMethod,
    Llama4MoeRoutingMethod,
    RenormalizeMoeRoutingMethod,
    RenormalizeNaiveMoeRoutingMethod,
    SuppliedMoeRoutingMethod,
)
from moe_eplb.session.weights import seeded_generator

__all__ = ["make_routing_method"]

_SIMPLE: dict[str, type[BaseMoeRoutingMethod]] = {
    "default": DefaultMoeRoutingMethod,
    "renormalize": RenormalizeMoeRoutingMethod,
    "renormalize_naive": RenormalizeNaiveMoeRoutingMethod,
    "llama4": Llama4MoeRoutingMethod,
}


def make_routing_method(scenario: Scenario, layer: int, device: Device) -> BaseMoeRoutingMethod:
    """The model's own method where its router chooses; a workload's ids are supplied otherwise."""
    model, routing = scenario.model, scenario.model.routing
    if scenario.workload.kind != "model":
        return SuppliedMoeRoutingMethod(model.top_k)
    if routing.method in _SIMPLE:
        return _SIMPLE[routing.method](model.top_k)
    bias = torch.randn(model.experts, generator=seeded_generator("bias", scenario.seed, layer)) * 0.1
    return DeepSeekV3MoeRoutingMethod(
        model.top_k,
        routing.groups,
        routing.top_groups,
        routing.scale,
        bias.to(device.torch_device),
        norm_topk_prob=routing.normalize,
    )

"""Mixture-of-Experts layers: routing, expert slots, dispatch between ranks, and the layers made from them."""

from __future__ import annotations

from moe_eplb.moe.create_moe import BackendName, create_moe
from moe_eplb.moe.experts import ExpertSlots
from moe_eplb.moe.fused_moe import FusedMoE
from moe_eplb.moe.grouped_moe import GroupedMoE
from moe_eplb.moe.routing import (
    BaseMoeRoutingMethod,
    DeepSeekV3MoeRoutingMethod,
    DefaultMoeRoutingMethod,
    Llama4MoeRoutingMethod,
    RenormalizeMoeRoutingMethod,
    RenormalizeNaiveMoeRoutingMethod,
    SuppliedMoeRoutingMethod,
)
from moe_eplb.moe.routing_rule import RoutingRule
from moe_eplb.moe.shape import MoeShape
from moe_eplb.moe.weight_names import WEIGHT_NAMES
from moe_eplb.moe.wide_ep import WideEPMoE

__all__ = [
    "WEIGHT_NAMES",
    "BackendName",
    "BaseMoeRoutingMethod",
    "DeepSeekV3MoeRoutingMethod",
    "DefaultMoeRoutingMethod",
    "ExpertSlots",
    "FusedMoE",
    "GroupedMoE",
    "Llama4MoeRoutingMethod",
    "MoeShape",
    "RenormalizeMoeRoutingMethod",
    "RenormalizeNaiveMoeRoutingMethod",
    "RoutingRule",
    "SuppliedMoeRoutingMethod",
    "WideEPMoE",
    "create_moe",
]

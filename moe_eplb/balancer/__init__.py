"""The online expert-parallel load balancer. Public names follow TensorRT-LLM's.

Names are imported when first used, so that looking after shared host memory does not need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_eplb.balancer.build_context import (
        get_moe_load_balancer,
        moe_load_balancer_add_single_layer,
        moe_load_balancer_set_repeated_for_next_layer,
    )
    from moe_eplb.balancer.host_weights import HostMoeTensorSharer
    from moe_eplb.balancer.iter_context import BalancerOff, MoeLoadBalancerIterContext, maybe_create_moe_load_balancer
    from moe_eplb.balancer.load_balancer import MoeLoadBalancer
    from moe_eplb.balancer.options import BalancerOptions
    from moe_eplb.balancer.replica_choice import ReplicaChoice
    from moe_eplb.balancer.single_layer import SingleLayerMoeLoadBalancer
    from moe_eplb.balancer.statistics import AllReduce

__all__ = [
    "AllReduce",
    "BalancerOff",
    "BalancerOptions",
    "HostMoeTensorSharer",
    "MoeLoadBalancer",
    "MoeLoadBalancerIterContext",
    "ReplicaChoice",
    "SingleLayerMoeLoadBalancer",
    "get_moe_load_balancer",
    "maybe_create_moe_load_balancer",
    "moe_load_balancer_add_single_layer",
    "moe_load_balancer_set_repeated_for_next_layer",
]

_HOME = {
    "AllReduce": "statistics",
    "BalancerOff": "iter_context",
    "BalancerOptions": "options",
    "HostMoeTensorSharer": "host_weights",
    "MoeLoadBalancer": "load_balancer",
    "MoeLoadBalancerIterContext": "iter_context",
    "ReplicaChoice": "replica_choice",
    "SingleLayerMoeLoadBalancer": "single_layer",
    "get_moe_load_balancer": "build_context",
    "maybe_create_moe_load_balancer": "iter_context",
    "moe_load_balancer_add_single_layer": "build_context",
    "moe_load_balancer_set_repeated_for_next_layer": "build_context",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""Mixtral: softmax over the chosen experts, no shared expert."""

from __future__ import annotations

from torch import Tensor

from moe_eplb.core.architecture import Architecture
from moe_eplb.device import AuxStreamType
from moe_eplb.models.family import Family, FeedForwardNames, TensorNames, simple_routing_method
from moe_eplb.moe import BaseMoeRoutingMethod

__all__ = ["Mixtral"]


class Mixtral(Family):
    """See the module."""

    tensors = TensorNames(
        block="model.layers.{layer}.block_sparse_moe.",
        matrices=FeedForwardNames(w1="w1.weight", w2="w2.weight", w3="w3.weight"),
    )
    streams = ((AuxStreamType.MoeChunkingOverlap,),)

    def routing_method(self, architecture: Architecture, bias: Tensor | None) -> BaseMoeRoutingMethod:
        """See the base class."""
        return simple_routing_method(architecture)

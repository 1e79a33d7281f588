"""Qwen3-MoE: softmax over all experts, normalised or not, no shared expert."""

from __future__ import annotations

from torch import Tensor

from moe_eplb.core.architecture import Architecture
from moe_eplb.device import AuxStreamType
from moe_eplb.models.family import Family, TensorNames, simple_routing_method
from moe_eplb.moe import BaseMoeRoutingMethod

__all__ = ["Qwen3Moe"]


class Qwen3Moe(Family):
    """See the module."""

    tensors = TensorNames()
    streams = ((AuxStreamType.MoeChunkingOverlap,),)

    def routing_method(self, architecture: Architecture, bias: Tensor | None) -> BaseMoeRoutingMethod:
        """See the base class."""
        return simple_routing_method(architecture)

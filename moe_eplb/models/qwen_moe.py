"""Qwen2-MoE: softmax over all experts, normalised or not, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from torch import Tensor

from moe_eplb.core.architecture import Architecture
from moe_eplb.device import AuxStreamType
from moe_eplb.models.family import Family, TensorNames, simple_routing_method
from moe_eplb.moe import BaseMoeRoutingMethod

__all__ = ["Qwen2Moe"]


class Qwen2Moe(Family):
    """See the module."""

    tensors = TensorNames(shared="shared_expert.", shared_gate="shared_expert_gate.weight")
    streams = ((AuxStreamType.MoeShared,), (AuxStreamType.MoeChunkingOverlap,))

    def routing_method(self, architecture: Architecture, bias: Tensor | None) -> BaseMoeRoutingMethod:
        """See the base class."""
        return simple_routing_method(architecture)

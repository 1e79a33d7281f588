"""DeepSeek-V3 and R1: biased sigmoid routing in groups, computed in float32, and a shared expert."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_eplb.core.architecture import Architecture
from moe_eplb.device import AuxStreamType
from moe_eplb.models.family import Family, TensorNames
from moe_eplb.moe import DeepSeekV3MoeRoutingMethod

__all__ = ["DeepSeekV3"]


class DeepSeekV3(Family):
    """See the module. Attention and the shared expert never run at once, so one stream serves both."""

    tensors = TensorNames(router_bias="gate.e_score_correction_bias", shared="shared_experts.")
    streams = ((AuxStreamType.MoeShared, AuxStreamType.Attention), (AuxStreamType.MoeChunkingOverlap,))
    router_dtype = torch.float32

    def routing_method(self, architecture: Architecture, bias: Tensor | None) -> DeepSeekV3MoeRoutingMethod:
        """See the base class."""
        routing = architecture.routing
        return DeepSeekV3MoeRoutingMethod(
            architecture.top_k,
            routing["groups"],
            routing["top_groups"],
            routing["scale"],
            torch.zeros(architecture.experts) if bias is None else bias,
            norm_topk_prob=routing["normalize"],
        )

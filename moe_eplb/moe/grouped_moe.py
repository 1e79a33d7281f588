"""A MoE layer on one rank through grouped GEMM: each expert multiplies exactly its own tokens."""

from __future__ import annotations

from torch import Tensor

from moe_eplb.moe.experts import group_by_slot, sum_over_k
from moe_eplb.moe.local_moe import LocalMoE

__all__ = ["GroupedMoE"]


class GroupedMoE(LocalMoE):
    """See `LocalMoE`."""

    def _compute(self, x: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
        grouping = group_by_slot(ids, ids.numel(), self.shape.num_experts)
        output = self.experts.grouped_ffn(x[grouping.row], grouping.offs)
        return sum_over_k(output, grouping, scales).to(x.dtype)

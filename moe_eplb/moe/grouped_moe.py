"""A MoE layer on one rank through grouped GEMM: each expert multiplies exactly its own tokens."""

from __future__ import annotations

from torch import Tensor

from moe_eplb.moe.grouping import sum_over_k
from moe_eplb.moe.local_moe import LocalMoE

__all__ = ["GroupedMoE"]


class GroupedMoE(LocalMoE):
    """See `LocalMoE`."""

    def _compute(self, x: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
        grouped = self.experts.group(x, ids)
        return sum_over_k(self.experts.grouped_ffn(grouped), grouped.position, scales, x.dtype)

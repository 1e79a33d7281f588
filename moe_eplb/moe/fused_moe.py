"""A MoE layer on one rank as one batched product over all experts, each padded to the fullest expert's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_eplb.device import ops
from moe_eplb.moe.grouping import Grouping, group_by_slot, sum_over_k
from moe_eplb.moe.local_moe import LocalMoE

__all__ = ["FusedMoE"]


class FusedMoE(LocalMoE):
    """See `LocalMoE`. Cheap for few experts with even load; padding makes uneven load expensive."""

    def _compute(self, x: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
        grouping = group_by_slot(ids, ids.numel(), self.shape.num_experts)
        place, capacity = _places(grouping)
        batch = x.new_zeros(self.shape.num_experts, capacity, x.shape[1])
        batch[grouping.slot, place] = x[grouping.row]
        product = torch.bmm(batch, self.experts.weight("w3_w1").transpose(1, 2))
        activated = ops.swiglu(product.flatten(0, 1)).view(*product.shape[:2], product.shape[2] // 2)
        output = torch.bmm(activated, self.experts.weight("w2").transpose(1, 2))
        return sum_over_k(output[grouping.slot, place], grouping.position, scales, x.dtype)


def _places(grouping: Grouping) -> tuple[Tensor, int]:
    """Position int64 [N] of each entry among those of its expert, and the number of entries of the fullest expert."""
    starts = torch.cat((grouping.offs.new_zeros(1), grouping.offs))
    place = torch.arange(grouping.slot.numel(), device=starts.device) - starts[grouping.slot]
    return place, int(starts.diff().max())

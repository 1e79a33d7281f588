"""What the MoE layers have in common that keep all experts on their own rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from torch import Tensor, nn

from moe_eplb.core.events import Kind
from moe_eplb.core.placement import Placement
from moe_eplb.core.probe import Probe
from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.moe.experts import ExpertSlots
from moe_eplb.moe.routing import BaseMoeRoutingMethod
from moe_eplb.moe.shape import MoeShape

__all__ = ["LocalMoE"]


class LocalMoE(nn.Module, ABC):
    """A MoE layer whose slot e holds expert e, on every rank; it exchanges nothing and cannot be balanced.

    Args:
        routing_method: Chooses experts.
        shape: Sizes of the layer.
        device: Where the work runs.
        aux_stream: Stream for overlapped chunks; None makes an own one.
        layer_idx: Number of the layer in records.

    Attributes:
        probe: Watches the output when set.
    """

    def __init__(
        self,
        routing_method: BaseMoeRoutingMethod,
        shape: MoeShape,
        device: Device,
        *,
        aux_stream: Stream | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.routing_method = routing_method
        self.shape = shape
        self.device = device
        self.aux_stream = aux_stream or device.stream(AuxStreamType.MoeChunkingOverlap)
        self.layer_idx = layer_idx
        self.probe: Probe | None = None
        self.experts = ExpertSlots(shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.dtype)

    def placement(self) -> Placement:
        """Expert e in slot e, as on any single rank."""
        return Placement(1, self.shape.num_experts, np.arange(self.shape.num_experts, dtype=np.int32))

    def load_weights(self, expert_weights: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Fill the slots; `expert_weights` gives an expert's "w3_w1" [2I, D] and "w2" [D, I] by id."""
        for expert in range(self.shape.num_experts):
            self.experts.load(expert, expert_weights(expert))

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        """Output [T, D] for hidden states [T, D] and router logits [T, E]."""
        run, layer = self.device.run, self.layer_idx
        ids, scales = run(Kind.TOPK, layer, partial(self.routing_method.apply, router_logits), a=x.shape[0])
        y = run(Kind.EXPERTS, layer, partial(self._compute, x, ids, scales), a=ids.numel())
        if self.probe is not None:
            self.probe.output(layer, x, ids, scales, y)
        return y

    @abstractmethod
    def _compute(self, x: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
        """Weighted sum [T, D] over the experts `ids` int32 [T, K] of each token."""

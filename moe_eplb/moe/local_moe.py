"""What the MoE layers have in common that keep all experts on their own rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from moe_eplb.core.events import Kind
from moe_eplb.core.placement import Placement
from moe_eplb.core.probe import Probe
from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.moe.chunking import ChunkStreams, chunk_count, split
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
        ep_rank, ep_size: This rank among those that run the same model, for records.
        moe_max_num_tokens: The most tokens in one pass; larger forwards go in chunks, every other one on `aux_stream`.

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
        ep_rank: int = 0,
        ep_size: int = 1,
        moe_max_num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.routing_method = routing_method
        self.shape = shape
        self.device = device
        self.aux_stream = aux_stream or device.stream(AuxStreamType.MoeChunkingOverlap)
        self.layer_idx = layer_idx
        self.ep_rank, self.ep_size = ep_rank, ep_size
        self.moe_max_num_tokens = moe_max_num_tokens
        self._streams = ChunkStreams(device, self.aux_stream)
        self.probe: Probe | None = None
        self.experts = ExpertSlots(
            shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.weight_dtype, device.torch_device
        )

    def placement(self) -> Placement:
        """Expert e in local slot e of every rank."""
        experts = np.arange(self.shape.num_experts, dtype=np.int32)
        return Placement(self.ep_size, self.shape.num_experts, np.tile(experts, self.ep_size))

    def load_weights(self, expert_weights: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Fill the slots; `expert_weights` gives an expert's "w3_w1" [2I, D] and "w2" [D, I] by id."""
        for expert in range(self.shape.num_experts):
            self.experts.load(expert, expert_weights(expert))

    def forward(self, x: Tensor, router_logits: Tensor, all_rank_num_tokens: Sequence[int] | None = None) -> Tensor:
        """Output [T, D] for hidden states [T, D] and router logits [T, E].

        `all_rank_num_tokens` is for backends that exchange tokens; here every rank is on its own.
        """
        self.shape.require_inputs(x, router_logits)
        self.routing_method.begin(x.shape[0])
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        chunks = split(x.shape[0], chunk_count((x.shape[0],), self.moe_max_num_tokens, padded=False))
        self._streams.each(
            chunks, lambda chunk: parts.append(self._forward_chunk(chunk.of(x), chunk.of(router_logits)))
        )
        ids, scales, y = (torch.cat(column) for column in zip(*parts, strict=True))
        if self.probe is not None:
            self.device.observe(partial(self.probe.output, self.layer_idx, x, router_logits, ids, scales, y))
        return y

    def _forward_chunk(self, x: Tensor, router_logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        run, layer = self.device.run, self.layer_idx
        ids, scales = run(Kind.TOPK, layer, partial(self.routing_method.apply, router_logits), a=x.shape[0])
        y = run(Kind.EXPERTS, layer, partial(self._compute, x, ids, scales), a=ids.numel())
        if self.probe is not None:
            self.device.observe(partial(self._report, self.probe, ids))
        return ids, scales, y

    def _report(self, probe: Probe, ids: Tensor) -> None:
        """Every entry is computed here, in the slot of its expert's number."""
        slots = ids + self.ep_rank * self.shape.num_experts
        probe.routed(self.layer_idx, ids, slots)
        token, k = torch.ones_like(ids).nonzero(as_tuple=True)
        probe.processed(self.layer_idx, torch.full_like(token, self.ep_rank), token, k, slots.flatten())

    @abstractmethod
    def _compute(self, x: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
        """Weighted sum [T, D] over the experts `ids` int32 [T, K] of each token."""

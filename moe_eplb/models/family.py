"""What distinguishes a family of models, as far as its MoE blocks are concerned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_eplb.core.architecture import Architecture
from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.moe import (
    BaseMoeRoutingMethod,
    DefaultMoeRoutingMethod,
    RenormalizeMoeRoutingMethod,
    RenormalizeNaiveMoeRoutingMethod,
)

__all__ = ["Family", "FeedForwardNames", "TensorNames", "simple_routing_method"]

_SIMPLE: dict[str, type[BaseMoeRoutingMethod]] = {
    "default": DefaultMoeRoutingMethod,
    "renormalize": RenormalizeMoeRoutingMethod,
    "renormalize_naive": RenormalizeNaiveMoeRoutingMethod,
}


@dataclass(frozen=True, slots=True)
class FeedForwardNames:
    """Names of the three matrices of y = w2 @ (silu(w1 x) * (w3 x)), without their common prefix."""

    w1: str = "gate_proj.weight"
    w2: str = "down_proj.weight"
    w3: str = "up_proj.weight"


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Names of a block's tensors in a checkpoint.

    Args:
        block: Prefix of the block; ``{layer}`` is the number of the layer in the model.
        router: [E, D].
        expert: Prefix of an expert; ``{expert}`` is its id.
        matrices: Of an expert, and of the shared expert.
        router_bias: [E], None where the family has none.
        shared: Prefix of the shared expert, None where the family has none.
        shared_gate: [1, D], None where the shared expert is always fully on.
    """

    block: str = "model.layers.{layer}.mlp."
    router: str = "gate.weight"
    expert: str = "experts.{expert}."
    matrices: FeedForwardNames = FeedForwardNames()
    router_bias: str | None = None
    shared: str | None = None
    shared_gate: str | None = None


class Family(ABC):
    """One family of models, stateless.

    Attributes:
        tensors: Names in a checkpoint.
        streams: The streams beside the main one and the balancer's, each with all that it serves.
        router_dtype: What router logits are computed in; the hidden states' dtype if None.
    """

    tensors: TensorNames
    streams: tuple[tuple[AuxStreamType, ...], ...]
    router_dtype: torch.dtype | None = None

    @abstractmethod
    def routing_method(self, architecture: Architecture, bias: Tensor | None) -> BaseMoeRoutingMethod:
        """The routing method of a layer; `bias` [E] is the router's, None where the family has none."""

    def aux_stream_dict(self, device: Device, *, balanced: bool) -> dict[AuxStreamType, Stream]:
        """A model's auxiliary streams; `balanced`: experts may move, which needs a stream that nothing shares."""
        streams: dict[AuxStreamType, Stream] = {}
        for kinds in self.streams:
            streams |= dict.fromkeys(kinds, device.stream(kinds[0]))
        if balanced:
            streams[AuxStreamType.MoeBalancer] = device.stream(AuxStreamType.MoeBalancer)
        return streams


def simple_routing_method(architecture: Architecture) -> BaseMoeRoutingMethod:
    """A routing method that has no parameter but K."""
    return _SIMPLE[architecture.routing["method"]](architecture.top_k)

"""One constructor for every MoE backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from moe_eplb.balancer import get_moe_load_balancer
from moe_eplb.core.errors import BalancerError
from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.device.ops import FP8
from moe_eplb.moe.fused_moe import FusedMoE
from moe_eplb.moe.grouped_moe import GroupedMoE
from moe_eplb.moe.routing import BaseMoeRoutingMethod
from moe_eplb.moe.shape import MoeShape
from moe_eplb.moe.wide_ep import WideEPMoE
from moe_eplb.moe.wide_ep_setup import required_stream

__all__ = ["BackendName", "create_moe"]

BackendName = Literal["wide_ep", "grouped", "fused"]


def create_moe(
    routing_method: BaseMoeRoutingMethod,
    *,
    num_experts: int,
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    device: Device,
    backend: BackendName = "wide_ep",
    aux_stream_dict: Mapping[AuxStreamType, Stream] | None = None,
    layer_idx: int = 0,
    moe_max_num_tokens: int | None = None,
    expert_dtype: torch.dtype | None = None,
    **options: Any,
) -> WideEPMoE | GroupedMoE | FusedMoE:
    """Make a MoE layer; K is the routing method's.

    Args:
        routing_method: Chooses experts.
        num_experts, hidden_size, intermediate_size, dtype: Sizes E, D, I and the dtype of hidden states.
        device: Where the work runs.
        backend: "wide_ep" spreads experts over ranks and can be balanced; "grouped" and "fused" keep all on each rank.
        aux_stream_dict: Model-wide auxiliary streams. "wide_ep" takes the dictionary, the others the stream
            MoeChunkingOverlap alone; None makes own streams.
        layer_idx: Number of the layer in records.
        moe_max_num_tokens: The most tokens of one pass (of all ranks together with "wide_ep"); None for no limit.
        expert_dtype: Of the experts' weights: `dtype`, or float8_e4m3fn with a scale for each row beside bfloat16.
        options: Further arguments of `WideEPMoE`; the other backends take only `ep_rank` and `ep_size`, for records.

    Raises:
        BalancerError: E140 when a stream is missing, E158 when the backend does not exist or cannot do what is asked,
            E187 when the two dtypes do not fit, E188 when the device cannot multiply fp8; and see `WideEPMoE`.
    """
    shape = MoeShape(num_experts, routing_method.top_k, hidden_size, intermediate_size, dtype, expert_dtype)
    if backend == "wide_ep":
        return WideEPMoE(
            routing_method, shape, device, aux_stream_dict=aux_stream_dict, layer_idx=layer_idx,
            moe_max_num_tokens=moe_max_num_tokens, **options,
        )  # fmt: skip
    _check_local(backend, shape, options)
    aux_stream = None
    if aux_stream_dict is not None:
        aux_stream = required_stream(
            aux_stream_dict, AuxStreamType.MoeChunkingOverlap, f"backend {backend!r} runs overlapped chunks there"
        )
    make = GroupedMoE if backend == "grouped" else FusedMoE
    return make(
        routing_method, shape, device, aux_stream=aux_stream, layer_idx=layer_idx,
        moe_max_num_tokens=moe_max_num_tokens, **options,
    )  # fmt: skip


def _check_local(backend: str, shape: MoeShape, options: Mapping[str, Any]) -> None:
    if backend not in ("grouped", "fused"):
        raise BalancerError("E158", f"there is no MoE backend {backend!r}", hint="use one of wide_ep, grouped, fused")
    if unfit := sorted(options.keys() - {"ep_rank", "ep_size"}):
        raise BalancerError(
            "E158",
            f"backend {backend!r} does not take {', '.join(unfit)}",
            hint="only backend 'wide_ep' spreads experts over ranks",
        )
    balancer = get_moe_load_balancer()
    if balancer is not None:
        raise BalancerError(
            "E158",
            f"backend {backend!r} cannot be balanced",
            why="every rank holds every expert, so there is nothing to move",
            hint="use backend 'wide_ep', or build the layer outside the balancer's context",
        )
    if backend == "fused" and shape.weight_dtype is FP8:
        raise BalancerError(
            "E158",
            "backend 'fused' has no fp8 experts",
            why="its batched product takes no scales",
            hint="use backend 'grouped', or dtype bfloat16",
        )

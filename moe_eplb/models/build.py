"""MoE blocks of a model, from its architecture and its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from moe_eplb.balancer import get_moe_load_balancer
from moe_eplb.core.architecture import Architecture
from moe_eplb.core.errors import BalancerError
from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.models.block import MoeBlock
from moe_eplb.models.families import FAMILIES
from moe_eplb.models.shared_expert import SharedExpert
from moe_eplb.models.weights import Weights
from moe_eplb.moe import BackendName, create_moe
from moe_eplb.moe.statistics_path import DispatchName, StatisticsName

__all__ = ["build_block", "build_blocks", "make_aux_streams", "weight_dtype"]


def build_blocks(
    architecture: Architecture,
    weights: Weights,
    device: Device,
    *,
    layers: Sequence[int] | None = None,
    ep_group: dist.ProcessGroup | None = None,
    statistics_group: dist.ProcessGroup | None = None,
    num_slots: int | None = None,
    dispatch: DispatchName = "alltoall",
    statistics: StatisticsName | None = None,
    backend: BackendName = "wide_ep",
    initial_slots: Sequence[list[int] | None] | None = None,
    moe_max_num_tokens: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[MoeBlock]:
    """The model's MoE blocks in order, with their weights. Call it inside the balancer's context where there is one.

    Args:
        architecture: Sizes and family.
        weights: Gives the weights; only what this rank needs is asked for.
        device: Where the blocks run.
        layers: Their numbers in the model; by default all MoE layers.
        ep_group, statistics_group, num_slots, dispatch, statistics, moe_max_num_tokens: See `WideEPMoE`.
        backend: See `create_moe`; other backends than "wide_ep" take no groups, slots or dispatch.
        initial_slots: For each block, the expert of each slot, or None for the usual ones.
        dtype: What the blocks compute in; by default the checkpoint's, float32 in place of float16.

    Raises:
        BalancerError: E130 when `layers` or `initial_slots` do not fit the model, or see `create_moe`.
    """
    numbers = _checked(architecture, layers, initial_slots)
    streams = make_aux_streams(architecture, device)
    options: dict[str, Any] = {"backend": backend, "moe_max_num_tokens": moe_max_num_tokens}
    if backend == "wide_ep":
        options |= {
            "ep_group": ep_group, "statistics_group": statistics_group, "num_slots": num_slots,
            "dispatch": dispatch, "statistics": statistics,
        }  # fmt: skip
    blocks = []
    for index, layer in enumerate(numbers):
        first = {} if initial_slots is None else {"initial_slots": initial_slots[index]}
        block = build_block(
            architecture, weights, layer, device, streams=streams, layer_idx=index, dtype=dtype, **options, **first
        )
        blocks.append(block)
    return blocks


def build_block(
    architecture: Architecture,
    weights: Weights,
    layer: int,
    device: Device,
    *,
    streams: Mapping[AuxStreamType, Stream],
    layer_idx: int = 0,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> MoeBlock:
    """One MoE block with its weights.

    Args:
        architecture, weights, device, dtype: See `build_blocks`.
        layer: Its number in the model, by which `weights` knows it.
        streams: From `make_aux_streams`, one dictionary for the whole model.
        layer_idx: Its number in records where there is no balancer.
        options: Of `create_moe`.
    """
    dtype, where = dtype or weight_dtype(architecture), device.torch_device
    family, bias = FAMILIES[architecture.family], weights.router_bias(layer)
    moe = create_moe(
        family.routing_method(architecture, bias if bias is None else bias.to(where)), num_experts=architecture.experts,
        hidden_size=architecture.hidden, intermediate_size=architecture.intermediate, dtype=dtype, device=device,
        aux_stream_dict=streams, layer_idx=layer_idx, **options,
    )  # fmt: skip
    given = weights.shared(layer)
    shared = (
        None if given is None else SharedExpert(**{name: tensor.to(where, dtype) for name, tensor in given.items()})
    )
    router = weights.router(layer).to(where, dtype)
    block = MoeBlock(
        router, moe, device, shared=shared, aux_stream_dict=streams, router_dtype=family.router_dtype
    )  # fmt: skip
    block.load_weights(partial(weights.expert, layer))
    return block


def make_aux_streams(architecture: Architecture, device: Device) -> dict[AuxStreamType, Stream]:
    """The model-wide auxiliary streams of the architecture's family, and the balancer's where experts may move."""
    balancer = get_moe_load_balancer()
    balanced = balancer is not None and balancer.is_dynamic_routing()
    return FAMILIES[architecture.family].aux_stream_dict(device, balanced=balanced)


def weight_dtype(architecture: Architecture) -> torch.dtype:
    """The checkpoint's dtype; float32 in place of float16, whose range is too small for sums over experts."""
    return torch.bfloat16 if architecture.dtype == "bfloat16" else torch.float32


def _checked(
    architecture: Architecture, layers: Sequence[int] | None, initial_slots: Sequence[list[int] | None] | None
) -> Sequence[int]:
    numbers = architecture.moe_layers if layers is None else layers
    if strange := [layer for layer in numbers if layer not in architecture.moe_layers]:
        raise BalancerError(
            "E130", f"layers {strange} of the model are no MoE layers",
            why=f"{architecture.name} has MoE layers {list(architecture.moe_layers)}", hint="leave layers out for all",
        )  # fmt: skip
    if initial_slots is not None and len(initial_slots) != len(numbers):
        raise BalancerError(
            "E130", "initial_slots do not fit the blocks", why=f"{len(initial_slots)} for {len(numbers)} blocks",
            hint="give one entry a block, None for the usual placement",
        )  # fmt: skip
    return numbers

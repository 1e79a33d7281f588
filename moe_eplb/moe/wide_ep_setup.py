"""How a `WideEPMoE` finds its ranks, its streams, its balancer and its first placement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from moe_eplb.balancer import (
    AllReduce,
    SingleLayerMoeLoadBalancer,
    get_moe_load_balancer,
    moe_load_balancer_add_single_layer,
)
from moe_eplb.core.errors import BalancerError
from moe_eplb.core.placement import Placement
from moe_eplb.core.planner import initial_slots as reference_slots
from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.moe.dispatch.collectives import Ranks
from moe_eplb.moe.shape import MoeShape
from moe_eplb.moe.stages import LayerStages, UnbalancedStages
from moe_eplb.moe.statistics_path import DispatchName, StatisticsName

__all__ = ["Membership", "check_one_stream", "join_balancer", "make_allreduce", "overlap_stream", "required_stream"]


@dataclass(frozen=True, slots=True)
class Membership:
    """A layer's place among the ranks and, when there is a balancer, among its layers."""

    layer: int
    rank: int
    size: int
    slots_per_rank: int
    streams: Mapping[AuxStreamType, Stream]
    balancer: SingleLayerMoeLoadBalancer | None
    stages: LayerStages


def join_balancer(
    shape: MoeShape,
    device: Device,
    num_slots: int,
    group: dist.ProcessGroup | None,
    aux_stream_dict: Mapping[AuxStreamType, Stream] | None,
    first_slots: list[int] | None,
    layer_idx: int,
) -> Membership:
    """Register with the current balancer, or stand alone with a placement that never changes.

    Raises:
        BalancerError: E140 when the balancer is on and has no stream of its own, E131.. for an illegal placement, E156
            when balancer and group disagree about the ranks.
    """
    ranks = Ranks(group)
    _check_ranks(ranks)
    streams = _streams(device, aux_stream_dict)
    slots_per_rank = _slots_per_rank(num_slots, ranks.size)
    balancer = moe_load_balancer_add_single_layer(
        shape.num_experts, shape.top_k, slots_per_rank, streams.get(AuxStreamType.MoeBalancer)
    )
    if balancer is None:
        experts = reference_slots(shape.num_experts, ranks.size, slots_per_rank) if first_slots is None else first_slots
        placement = Placement(ranks.size, shape.num_experts, np.asarray(experts, dtype=np.int32))
        stages = UnbalancedStages(device, layer_idx, placement, ranks.rank)
        return Membership(layer_idx, ranks.rank, ranks.size, slots_per_rank, streams, None, stages)
    if first_slots is not None:
        balancer.set_initial_weight_assignments(first_slots)
    return Membership(balancer.layer_idx, ranks.rank, ranks.size, slots_per_rank, streams, balancer, balancer)


def make_allreduce(membership: Membership, path: StatisticsName, group: dist.ProcessGroup | None) -> AllReduce | None:
    """The sum over ranks that path "local_ids" of a dynamic layer needs; None where none is needed.

    Raises:
        BalancerError: E155 when it is needed and there is no group for it, E209 when the balancer takes no such path.
    """
    balancer = membership.balancer
    if balancer is not None:
        balancer.require_statistics(path)
    if balancer is None or balancer.is_static_routing() or path != "local_ids" or membership.size == 1:
        return None
    if group is None:
        raise BalancerError(
            "E155",
            "statistics 'local_ids' have no process group for their sum",
            why=f"{membership.size} ranks, and the dispatch's group cannot carry two collectives at once",
            hint="pass statistics_group=torch.distributed.new_group(ranks)",
        )
    return AllReduce(group)


def check_one_stream(dispatch: DispatchName, limit: int | None) -> None:
    """Chunks run on two streams, and exchanges through symmetric memory on one alone.

    Raises:
        BalancerError: E211 for "symm_mem" with a limit of tokens.
    """
    if dispatch == "symm_mem" and limit is not None:
        raise BalancerError(
            "E211", "dispatch 'symm_mem' cannot run in chunks",
            why=f"moe_max_num_tokens is {limit}; chunks on two streams would join each other's exchanges",
            hint="leave moe_max_num_tokens out, or use dispatch 'alltoall' or 'allgather'",
        )  # fmt: skip


def overlap_stream(streams: Mapping[AuxStreamType, Stream], device: Device, limit: int | None) -> Stream:
    """The stream of overlapped chunks.

    Raises:
        BalancerError: E140 when forwards may be chunked and the dictionary lacks it.
    """
    if limit is None:
        return streams.get(AuxStreamType.MoeChunkingOverlap) or device.main
    return required_stream(streams, AuxStreamType.MoeChunkingOverlap, f"forwards of more than {limit} tokens overlap")


def required_stream(streams: Mapping[AuxStreamType, Stream], kind: AuxStreamType, why: str) -> Stream:
    """The stream of that kind.

    Raises:
        BalancerError: E140 when the dictionary lacks it.
    """
    stream = streams.get(kind)
    if stream is None:
        raise BalancerError(
            "E140",
            f"aux_stream_dict has no {kind.name} entry",
            why=f"{why}; it has {', '.join(sorted(k.name for k in streams)) or 'none'}",
            hint=f"add {kind}: device.stream({kind}), or pass aux_stream_dict=None to make own streams",
        )
    return stream


def _streams(device: Device, given: Mapping[AuxStreamType, Stream] | None) -> Mapping[AuxStreamType, Stream]:
    balancer = get_moe_load_balancer()
    if given is None:
        return {kind: device.stream(kind) for kind in (AuxStreamType.MoeChunkingOverlap, AuxStreamType.MoeBalancer)}
    if balancer is not None and balancer.is_dynamic_routing():
        required_stream(given, AuxStreamType.MoeBalancer, "the balancer is on and needs a stream that nothing shares")
    return given


def _check_ranks(ranks: Ranks) -> None:
    balancer = get_moe_load_balancer()
    if balancer is not None and (balancer.ep_rank, balancer.ep_size) != (ranks.rank, ranks.size):
        raise BalancerError(
            "E156",
            "the balancer and the process group disagree about the ranks",
            why=f"balancer: rank {balancer.ep_rank} of {balancer.ep_size}, group: rank {ranks.rank} of {ranks.size}",
            hint="build both for the same expert-parallel ranks",
        )


def _slots_per_rank(num_slots: int, size: int) -> int:
    if num_slots < 1 or num_slots % size:
        raise BalancerError(
            "E157",
            "the slots do not spread evenly over the ranks",
            why=f"{num_slots} slots, {size} ranks",
            hint=f"use {-(-max(num_slots, 1) // size) * size} slots",
        )
    return num_slots // size

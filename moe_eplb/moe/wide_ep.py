"""Wide expert parallelism: experts live in slots of all ranks, tokens travel to them, the balancer moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_eplb.balancer import AllReduce, SingleLayerMoeLoadBalancer
from moe_eplb.core.events import Kind
from moe_eplb.core.placement import Placement
from moe_eplb.core.probe import Probe
from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.moe.dispatch import AllGather, AllToAll, Dispatcher, Exchange, Received
from moe_eplb.moe.experts import WEIGHT_NAMES, ExpertSlots, Grouping, group_by_slot, sum_over_k
from moe_eplb.moe.routing import BaseMoeRoutingMethod
from moe_eplb.moe.shape import MoeShape
from moe_eplb.moe.stages import LayerStages
from moe_eplb.moe.statistics_path import DispatchName, StatisticsName, choose_path, make_path
from moe_eplb.moe.wide_ep_setup import join_balancer, make_allreduce

__all__ = ["WideEPMoE"]


class WideEPMoE(nn.Module):
    """A MoE layer of one rank out of R.

    Built inside a `MoeLoadBalancer` context it takes part in balancing; otherwise its placement never changes.

    Args:
        routing_method: Chooses experts.
        shape: Sizes of the layer.
        device: Where the work runs.
        num_slots: P, a multiple of R; by default E.
        ep_group: Process group of the R ranks, for dispatch and combine; None for one rank.
        statistics_group: Another process group of the same ranks, for the reduction of path "local_ids".
        aux_stream_dict: Model-wide auxiliary streams; None makes own ones.
        dispatch: How tokens travel.
        statistics: How counts reach the balancer, see `moe_eplb.moe.statistics_path`; None follows the dispatch.
        initial_slots: The expert of each of the P slots at the start; by default the balancer's or the reference's.
        layer_idx: Number of the layer in records when there is no balancer; a balancer numbers its layers itself.

    Attributes:
        probe: Watches routing, computation and output when set.
        layer_load_balancer: The layer's balancer, or None.
    """

    def __init__(
        self,
        routing_method: BaseMoeRoutingMethod,
        shape: MoeShape,
        device: Device,
        *,
        num_slots: int | None = None,
        ep_group: dist.ProcessGroup | None = None,
        statistics_group: dist.ProcessGroup | None = None,
        aux_stream_dict: Mapping[AuxStreamType, Stream] | None = None,
        dispatch: DispatchName = "alltoall",
        statistics: StatisticsName | None = None,
        initial_slots: list[int] | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        path = choose_path(dispatch, statistics)
        membership = join_balancer(
            shape, device, num_slots or shape.num_experts, ep_group, aux_stream_dict, initial_slots, layer_idx
        )
        self.routing_method = routing_method
        self.shape = shape
        self.device = device
        self.probe: Probe | None = None
        self.layer_idx = membership.layer
        self.rank = membership.rank
        self.slots_per_rank = membership.slots_per_rank
        self.aux_stream_dict = membership.streams
        self.layer_load_balancer: SingleLayerMoeLoadBalancer | None = membership.balancer
        self.experts = ExpertSlots(self.slots_per_rank, shape.hidden_size, shape.intermediate_size, shape.dtype)
        self.allreduce: AllReduce | None = make_allreduce(membership, path, statistics_group)
        self._stages: LayerStages = membership.stages
        self._statistics = make_path(path, self._stages, self.allreduce)
        self._dispatcher = self._make_dispatcher(dispatch, ep_group, gather_ids=path == "global_ids")

    def _make_dispatcher(self, name: DispatchName, group: dist.ProcessGroup | None, *, gather_ids: bool) -> Dispatcher:
        shape = self.shape
        make = AllToAll if name == "alltoall" else partial(AllGather, gather_ids=gather_ids)
        return make(
            group,
            slots_per_rank=self.slots_per_rank,
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            dtype=shape.dtype,
        )

    def placement(self) -> Placement:
        """Where the experts are now."""
        return self._stages.placement

    def load_weights(self, expert_weights: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Fill this rank's slots, and give the balancer the host copies and slots that it asks for.

        Args:
            expert_weights: Gives an expert's tensors by id: "w3_w1" [2I, D] and "w2" [D, I].
        """
        for slot, expert in enumerate(self._stages.local_slot_experts()):
            self.experts.load(slot, expert_weights(expert))
        if self.layer_load_balancer is not None and self.layer_load_balancer.need_load_shared_weights():
            self._share_weights(self.layer_load_balancer, expert_weights)

    def _share_weights(
        self, balancer: SingleLayerMoeLoadBalancer, expert_weights: Callable[[int], Mapping[str, Tensor]]
    ) -> None:
        for expert in balancer.load_expert_ids:
            weights = expert_weights(expert)
            for name in WEIGHT_NAMES:
                balancer.share_expert_weight(expert, name, weights[name].to(self.shape.dtype))
        for slot in range(self.slots_per_rank):
            for name in WEIGHT_NAMES:
                balancer.register_weight_slot(slot, name, self.experts.slot_tensor(slot, name))

    def forward(self, x: Tensor, router_logits: Tensor) -> Tensor:
        """Output [T, D] for hidden states [T, D] and router logits [T, E]; T may be 0 and differ between ranks.

        Every rank of the group calls it equally often, because each call takes part in collectives.
        """
        stages = self._stages
        stages.start_wait_gpu_stage()
        ids, scales = self._top_k(router_logits)
        stages.done_wait_gpu_stage()
        self._statistics.after_top_k(ids)
        slot_ids = self._route(ids)
        exchange = self._prepare(slot_ids, ids)
        received = self._dispatch(exchange, x, scales)
        partial_sums = self._compute(received)
        stages.start_set_cpu_stage()
        y = self._combine(exchange, partial_sums)
        stages.done_set_cpu_stage()
        if self.probe is not None:
            self.probe.output(self.layer_idx, x, ids, scales, y)
        return y

    def _top_k(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        choose = partial(self.routing_method.apply, router_logits)
        return self.device.run(Kind.TOPK, self.layer_idx, choose, a=router_logits.shape[0])

    def _route(self, ids: Tensor) -> Tensor:
        slot_ids = self._stages.route(ids, offset_by_ep_rank=True)
        if self.probe is not None:
            self.probe.routed(self.layer_idx, ids, slot_ids)
        return slot_ids

    def _prepare(self, slot_ids: Tensor, ids: Tensor) -> Exchange:
        counts, lanes = self._statistics.local_counts(), self._stages.get_agreement_lanes()
        given = [rider.to(torch.int64) for rider in (counts, lanes) if rider is not None]
        riders = torch.cat(given) if given else None
        prepare = partial(self._dispatcher.prepare, slot_ids, ids, riders)
        size = self._dispatcher.prepare_bytes(riders)
        exchange = self.device.run(Kind.PREPARE, self.layer_idx, prepare, a=size)
        self._hand_out(exchange.riders, counts is not None, lanes is not None)
        return exchange

    def _hand_out(self, riders: Tensor | None, has_counts: bool, has_lanes: bool) -> None:
        if riders is None:
            return
        width = self.shape.num_experts if has_counts else 0
        if has_counts:
            self._stages.update_statistic_with_gathered_statistic(riders[:, :width].to(torch.int32))
        if has_lanes:
            self._stages.update_agreement(riders[:, width:])

    def _dispatch(self, exchange: Exchange, x: Tensor, scales: Tensor) -> Received:
        send = partial(exchange.dispatch, x, scales)
        received = self.device.run(Kind.DISPATCH, self.layer_idx, send, a=exchange.dispatch_bytes)
        self._statistics.after_dispatch(received)
        return received

    def _compute(self, received: Received) -> Tensor:
        def compute() -> tuple[Tensor, Grouping]:
            grouping = group_by_slot(received.slots, received.entries, self.slots_per_rank)
            output = self.experts.grouped_ffn(received.hidden[grouping.row], grouping.offs)
            return sum_over_k(output, grouping, received.scales), grouping

        partial_sums, grouping = self.device.run(Kind.EXPERTS, self.layer_idx, compute, a=received.entries)
        if self.probe is not None:
            self._report_processed(self.probe, received, grouping)
        return partial_sums

    def _report_processed(self, probe: Probe, received: Received, grouping: Grouping) -> None:
        source, token = received.source_rank()[grouping.row], received.token[grouping.row]
        first_slot = self.rank * self.slots_per_rank
        probe.processed(self.layer_idx, source, token, grouping.k, grouping.slot + first_slot)

    def _combine(self, exchange: Exchange, partial_sums: Tensor) -> Tensor:
        bring_back = partial(exchange.combine, partial_sums)
        return self.device.run(Kind.COMBINE, self.layer_idx, bring_back, a=exchange.combine_bytes)

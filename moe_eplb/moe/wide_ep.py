"""Wide expert parallelism: experts live in slots of all ranks, tokens travel to them, the balancer moves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_eplb.balancer import AllReduce, SingleLayerMoeLoadBalancer
from moe_eplb.core.events import Kind
from moe_eplb.core.placement import Placement
from moe_eplb.core.probe import Probe
from moe_eplb.device import AuxStreamType, Device, Stream
from moe_eplb.moe.chunking import Chunk, ChunkStreams
from moe_eplb.moe.dispatch import AllGather, AllToAll, Dispatcher, Exchange, Received, SymmMem
from moe_eplb.moe.experts import ExpertSlots
from moe_eplb.moe.grouping import entries_of, sum_over_k
from moe_eplb.moe.routing import BaseMoeRoutingMethod
from moe_eplb.moe.shape import MoeShape
from moe_eplb.moe.splitter import Splitter
from moe_eplb.moe.stages import LayerStages
from moe_eplb.moe.statistics_path import DispatchName, StatisticsName, choose_path, make_path
from moe_eplb.moe.wide_ep_setup import check_one_stream, join_balancer, make_allreduce, overlap_stream

__all__ = ["WideEPMoE"]


class _Output(NamedTuple):
    """A chunk's output [T, D] with its ids and scales [T, K]."""

    y: Tensor
    ids: Tensor
    scales: Tensor


class _Computed(NamedTuple):
    """Outputs [N, D] of a chunk's entries, their places int32 [M, K] and the cells' ends int32 [S + X]."""

    output: Tensor
    position: Tensor
    offs: Tensor


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
        dispatch: How tokens travel; with "symm_mem" through symmetric memory, for which the host waits nowhere.
        statistics: How counts reach the balancer, see `moe_eplb.moe.statistics_path`; None follows the dispatch.
        initial_slots: The expert of each of the P slots at the start; by default the balancer's or the reference's.
        layer_idx: Number of the layer in records when there is no balancer; a balancer numbers its layers itself.
        moe_max_num_tokens: The most tokens of all ranks in one pass; larger forwards go in chunks, every other one on
            the MoeChunkingOverlap stream. None for no limit.

    Raises:
        BalancerError: E154 when the dispatch cannot carry the statistics, E211 when "symm_mem" cannot be had or is
            asked for chunks, and see `join_balancer`, `make_allreduce` and `overlap_stream`.

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
        moe_max_num_tokens: int | None = None,
    ) -> None:
        super().__init__()
        path = choose_path(dispatch, statistics)
        check_one_stream(dispatch, moe_max_num_tokens)
        slots = shape.num_experts if num_slots is None else num_slots
        membership = join_balancer(shape, device, slots, ep_group, aux_stream_dict, initial_slots, layer_idx)
        self.routing_method = routing_method
        self.shape = shape
        self.device = device
        self.probe: Probe | None = None
        self.layer_idx = membership.layer
        self.rank = membership.rank
        self.slots_per_rank = membership.slots_per_rank
        self.aux_stream_dict = membership.streams
        self._streams = ChunkStreams(device, overlap_stream(membership.streams, device, moe_max_num_tokens))
        self.layer_load_balancer: SingleLayerMoeLoadBalancer | None = membership.balancer
        self.experts = ExpertSlots(
            self.slots_per_rank, shape.hidden_size, shape.intermediate_size, shape.weight_dtype, device.torch_device,
            spare=0 if membership.balancer is None else membership.balancer.spare_slots,
        )  # fmt: skip
        self.allreduce: AllReduce | None = make_allreduce(membership, path, statistics_group)
        self._stages: LayerStages = membership.stages
        self._statistics = make_path(path, self._stages, self.allreduce)
        self._dispatcher = self._make_dispatcher(dispatch, ep_group, gather_ids=path == "global_ids")
        # With sizes that do not depend on what is routed, each rank sends as many rows as the fullest.
        padded = dispatch == "allgather" or self._dispatcher.static_shapes
        self._splitter = Splitter(device, self.layer_idx, self._dispatcher.ranks, moe_max_num_tokens, padded=padded)

    def _make_dispatcher(self, name: DispatchName, group: dist.ProcessGroup | None, *, gather_ids: bool) -> Dispatcher:
        shape = self.shape
        make: Callable[..., Dispatcher] = {"alltoall": AllToAll, "allgather": AllGather, "symm_mem": SymmMem}[name]
        options: dict[str, Any] = {"gather_ids": gather_ids} if name == "allgather" else {}
        if name == "symm_mem":
            options["symmetric"] = None if group is None or group.size() == 1 else self.device.symmetric(group)
        return make(
            group,
            slots_per_rank=self.slots_per_rank,
            hidden_size=shape.hidden_size,
            top_k=shape.top_k,
            dtype=shape.dtype,
            static_shapes=self.device.kind == "cuda",
            **options,
        )

    def placement(self) -> Placement:
        """Where the experts are now."""
        return self._stages.placement

    def load_weights(self, expert_weights: Callable[[int], Mapping[str, Tensor]]) -> None:
        """Fill this rank's slots, and give the balancer the host copies and slots that it asks for.

        Args:
            expert_weights: Gives an expert's tensors by id: "w3_w1" [2I, D] and "w2" [D, I]; where experts are fp8
                they are quantised unless their scales are given too.
        """
        slots: dict[int, list[int]] = {}
        for slot, expert in enumerate(self._stages.local_slot_experts()):
            slots.setdefault(expert, []).append(slot)
        shared = self._begin_sharing(self.layer_load_balancer)
        # Once an expert, because each may have to be read from a file.
        for expert in sorted(slots.keys() | shared):
            weights = self.experts.fitted(expert_weights(expert))
            self._load_expert(expert, weights, slots.get(expert, ()), share=expert in shared)

    def _load_expert(self, expert: int, weights: Mapping[str, Tensor], slots: Sequence[int], *, share: bool) -> None:
        for slot in slots:
            self.experts.load(slot, weights)
        if share and self.layer_load_balancer is not None:
            for name in self.experts.names:
                self.layer_load_balancer.share_expert_weight(expert, name, weights[name])

    def _begin_sharing(self, balancer: SingleLayerMoeLoadBalancer | None) -> set[int]:
        """Tell the balancer where the slots are; the experts whose host copy it wants."""
        if balancer is None or not balancer.is_dynamic_routing():
            return set()
        by_slot = self.experts.by_slot()
        if balancer.need_load_shared_weights():
            balancer.expect_expert_weights({name: (tensor.dtype, tensor.shape) for name, tensor in by_slot[0].items()})
        for slot, tensors in enumerate(by_slot):
            for name, tensor in tensors.items():
                balancer.register_weight_slot(slot, name, tensor)
        balancer.register_weight_cells(self.experts.slot_cells, self.experts.by_cell())
        return set(balancer.load_expert_ids)

    def forward(self, x: Tensor, router_logits: Tensor, all_rank_num_tokens: Sequence[int] | None = None) -> Tensor:
        """Output [T, D] for hidden states [T, D] and router logits [T, E]; T may be 0 and differ between ranks.

        Every rank of the group calls it equally often, because each call takes part in collectives. Where
        `moe_max_num_tokens` splits it, that many collectives are made for each chunk.

        Args:
            x: Hidden states.
            router_logits: Router logits.
            all_rank_num_tokens: T of each rank. Chunking needs it, and exchanges it when it is left out. On a GPU
                nothing waits for the device where it is given, or where there is one rank, so that the forward can be
                captured into a graph; elsewhere sizes are exchanged.

        Raises:
            BalancerError: E217 when the inputs do not fit the layer, E156 when `all_rank_num_tokens` does not.
        """
        self.shape.require_inputs(x, router_logits)
        first, last = self._stages.begin_forward()
        chunks = self._splitter.chunks(x.shape[0], all_rank_num_tokens, first=first, last=last)
        self.routing_method.begin(x.shape[0])
        parts: list[_Output] = []
        self._streams.each(
            chunks, lambda chunk: parts.append(self._forward_chunk(chunk, chunk.of(x), chunk.of(router_logits)))
        )
        y = parts[0].y if len(parts) == 1 else torch.cat([part.y for part in parts])
        if self.probe is not None:
            self.device.observe(partial(self._report_output, self.probe, x, router_logits, parts, y))
        return y

    def _forward_chunk(self, chunk: Chunk, x: Tensor, router_logits: Tensor) -> _Output:
        stages = self._stages
        if chunk.first:
            stages.start_wait_gpu_stage()
        ids, scales = self._top_k(router_logits)
        if chunk.first:
            stages.done_wait_gpu_stage()
        self._statistics.after_top_k(ids, chunk)
        slot_ids = self._route(ids)
        exchange = self._prepare(slot_ids, ids, chunk)
        received = self._dispatch(exchange, x, scales, chunk)
        computed = self._compute(received)
        if chunk.last:
            stages.start_set_cpu_stage()
        y = self._combine(exchange, received, computed)
        if chunk.last:
            stages.done_set_cpu_stage()
        return _Output(y, ids, scales)

    def _top_k(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        choose = partial(self.routing_method.apply, router_logits)
        return self.device.run(Kind.TOPK, self.layer_idx, choose, a=router_logits.shape[0])

    def _route(self, ids: Tensor) -> Tensor:
        slot_ids = self._stages.route(ids, offset_by_ep_rank=True)
        if self.probe is not None:
            self.device.observe(partial(self.probe.routed, self.layer_idx, ids, slot_ids))
        return slot_ids

    def _prepare(self, slot_ids: Tensor, ids: Tensor, chunk: Chunk) -> Exchange:
        counts = self._statistics.local_counts(chunk)
        votes = chunk.last and self._statistics.carries_agreement
        lanes = self._stages.get_agreement_lanes() if votes else None
        given = [rider.to(torch.int64) for rider in (counts, lanes) if rider is not None]
        riders = torch.cat(given) if given else None
        prepare = partial(self._dispatcher.prepare, slot_ids, ids, riders, chunk.tokens)
        size = self._dispatcher.prepare_bytes(riders, chunk.tokens)
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

    def _dispatch(self, exchange: Exchange, x: Tensor, scales: Tensor, chunk: Chunk) -> Received:
        send = partial(exchange.dispatch, x, scales)
        late = exchange.riders is None
        received = self.device.run(Kind.DISPATCH, self.layer_idx, send, a=exchange.dispatch_bytes)
        if late:
            self._hand_out(exchange.riders, has_counts=False, has_lanes=True)
        self._statistics.after_dispatch(received, chunk)
        return received

    def _compute(self, received: Received) -> _Computed:
        def compute() -> _Computed:
            beside_copying = partial(self._stages.mark_statistics, grouped=False)
            grouped = self.experts.group(
                received.hidden, received.slots, received.entries, beside_copying,
                first_slot=received.first_slot, likely=received.likely_entries,
            )  # fmt: skip
            self._stages.mark_statistics(grouped=True)
            return _Computed(self.experts.grouped_ffn(grouped), grouped.position, grouped.offs)

        computed = self.device.run(Kind.EXPERTS, self.layer_idx, compute, a=received.most_entries)
        self._stages.release_statistics()
        if self.probe is not None:
            processed = partial(self._report_processed, self.probe, received, computed.position, computed.offs)
            self.device.observe(processed)
        return computed

    def _report_output(self, probe: Probe, x: Tensor, router_logits: Tensor, parts: list[_Output], y: Tensor) -> None:
        ids, scales = (torch.cat([part[column] for part in parts]) for column in (1, 2))
        probe.output(self.layer_idx, x, router_logits, ids, scales, y)

    def _report_processed(self, probe: Probe, received: Received, position: Tensor, offs: Tensor) -> None:
        entries = entries_of(received.local_slots, position, offs)
        source, token = received.source_rank()[entries.row], received.token()[entries.row]
        probe.processed(self.layer_idx, source, token, entries.k, entries.slot + self.rank * self.slots_per_rank)

    def _combine(self, exchange: Exchange, received: Received, computed: _Computed) -> Tensor:
        """Sum what this rank computed of each row and bring it back; weights may be handed over by now."""

        def combine() -> Tensor:
            sums = sum_over_k(computed.output, computed.position, received.scales, exchange.partial_dtype)
            return exchange.combine(sums)

        return self.device.run(Kind.COMBINE, self.layer_idx, combine, a=exchange.combine_bytes)
